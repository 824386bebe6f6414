"""KALAVAI's two-layer router on a causal running mean of hidden states."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Self, cast

import torch
from pydantic import Field
from torch import Tensor

from molora_fed.errors import ShapeError
from molora_fed.routing.contract import RouterOptions
from molora_kalavai.hidden import HiddenOptions, HiddenRouter, draw_rows

if TYPE_CHECKING:
    from molora_fed.bank import CalibrationBank

__all__ = ["MlpOptions", "MlpRouter"]


class MlpOptions(HiddenOptions):
    """Options of the two-layer router.

    Attributes:
        units: H, hidden units.
    """

    units: int = Field(default=256, ge=1)


class MlpRouter(HiddenRouter):
    """Gates softmax(V relu(U m_t)), m_t the mean of the document's hidden states up to t.

    Source: arXiv 2603.22755, protocol (D -> 256 -> E). Deviations as those of `linear`.
    """

    Options: ClassVar[type[RouterOptions]] = MlpOptions
    label: ClassVar[str] = "mlp"

    def __init__(
        self, num_experts: int, options: HiddenOptions, inner: Tensor, outer: Tensor
    ) -> None:
        super().__init__(num_experts, options)
        self.inner = inner  # U, (H, D)
        self.outer = outer  # V, (E, H)

    @classmethod
    def draw(cls, bank: "CalibrationBank", options: HiddenOptions, seed: int) -> Self:
        """U by number of the unit and V by name of the expert, uniform in +-inputs^-1/2."""
        units = cast(MlpOptions, options).units  # `narrow` has checked them
        inner = draw_rows([f"unit {unit}" for unit in range(units)], bank.hidden_size, seed)
        outer = draw_rows(bank.expert_names, units, seed)
        return cls(bank.num_experts, options, inner.to(bank.device), outer.to(bank.device))

    def parameters(self) -> Sequence[Tensor]:
        """U and V."""
        return [self.inner, self.outer]

    @property
    def width(self) -> int:
        """D."""
        return int(self.inner.shape[1])

    def score(self, pooled: Tensor) -> Tensor:
        """V relu(U m)."""
        active = torch.relu(pooled @ self.inner.T.to(pooled.device))
        return active @ self.outer.T.to(pooled.device)

    def state_tensors(self) -> dict[str, Tensor]:
        """U, (H, D), as `inner` and V, (E, H), as `outer`."""
        return {"inner": self.inner.detach(), "outer": self.outer.detach()}

    @classmethod
    def from_state(
        cls, num_experts: int, options: RouterOptions, tensors: Mapping[str, Tensor]
    ) -> Self:
        """The router with this U and V.

        Raises:
            ShapeError: If one is missing, or they do not fit each other or the experts.
        """
        chosen = cls.narrow(options)
        got = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        inner, outer = got.get("inner", ()), got.get("outer", ())
        if len(got) != 2 or len(inner) != 2 or outer != (num_experts, inner[0]):
            raise ShapeError(
                f"Cannot load router 'mlp': expected inner (H, D) and outer ({num_experts}, H), "
                f"got {got or 'nothing'}. Fuse again."
            )
        return cls(num_experts, chosen, tensors["inner"], tensors["outer"])
