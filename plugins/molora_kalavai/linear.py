"""KALAVAI's linear router on a causal running mean of hidden states, and its published form."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from molora_fed.bank.views import RouterView
from molora_kalavai.hidden import HiddenOptions, HiddenRouter, draw_rows

__all__ = ["LinearOptions", "LinearRouter", "NoncausalLinearRouter"]


class LinearOptions(HiddenOptions):
    """Options of the linear routers."""


class LinearRouter(HiddenRouter[LinearOptions]):
    """Gates softmax(W m_t), m_t the mean of the document's hidden states up to t.

    Source: arXiv 2603.22755, protocol. Deviations: the mean runs over the document so far, not
    over the whole sequence, so that the gate sees no future token; batches draw domains in turn.
    """

    name: ClassVar[str] = "linear"

    @classmethod
    @override
    def shapes(cls, num_experts: int, options: HiddenOptions) -> dict[str, tuple[int | str, ...]]:
        return {"weight": (num_experts, "D")}

    @classmethod
    @override
    def draw(cls, names: Sequence[str], width: int, options: LinearOptions, seed: int) -> Self:
        return cls(len(names), options, {"weight": draw_rows(names, width, seed)})

    @property
    @override
    def width(self) -> int:
        return int(self.weight.shape[1])

    @override
    def scorer(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        return partial(functional.linear, weight=self.weight.to(device))


class NoncausalLinearRouter(LinearRouter):
    """Gates softmax(W m), m the mean over the whole block: sees the future, cannot generate.

    Source: arXiv 2603.22755, published code; kept for reproduction only.
    """

    causal: ClassVar[bool] = False
    name: ClassVar[str] = "linear-noncausal"
    pooling: ClassVar[str] = "block-mean"

    @staticmethod
    @override
    def pool(hidden: Tensor, view: RouterView) -> Tensor:
        """The block's mean at every position, (B, T, D) float32."""
        return hidden.float().mean(dim=1, keepdim=True).expand(hidden.shape)
