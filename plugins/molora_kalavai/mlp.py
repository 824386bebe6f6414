"""KALAVAI's two-layer router on a causal running mean of hidden states."""

from collections.abc import Callable, Sequence
from typing import ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from molora_kalavai.hidden import HiddenOptions, HiddenRouter, draw_rows

__all__ = ["MlpOptions", "MlpRouter"]


class MlpOptions(HiddenOptions):
    """Options of the two-layer router.

    Attributes:
        units: H, hidden units.
    """

    units: int = Field(default=256, ge=1)


class MlpRouter(HiddenRouter[MlpOptions]):
    """Gates softmax(V relu(U m_t)), m_t the mean of the document's hidden states up to t.

    Source: arXiv 2603.22755, protocol (D -> 256 -> E). Deviations as those of `linear`.
    """

    name: ClassVar[str] = "mlp"

    @classmethod
    @override
    def shapes(cls, num_experts: int, options: MlpOptions) -> dict[str, tuple[int | str, ...]]:
        return {"inner": ("H", "D"), "outer": (num_experts, "H")}

    @classmethod
    @override
    def draw(cls, names: Sequence[str], width: int, options: MlpOptions, seed: int) -> Self:
        """U by number of the unit and V by name of the expert, uniform in +-inputs^-1/2."""
        units = [f"unit {unit}" for unit in range(options.units)]
        inner, outer = draw_rows(units, width, seed), draw_rows(names, options.units, seed)
        return cls(len(names), options, {"inner": inner, "outer": outer})

    @property
    @override
    def width(self) -> int:
        return int(self.inner.shape[1])

    @override
    def scorer(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        inner, outer = self.inner.to(device), self.outer.to(device)
        return lambda pooled: torch.relu(pooled @ inner.T) @ outer.T
