"""KALAVAI's linear router on a causal running mean of hidden states, and its published form."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Self

from torch import Tensor

from molora_fed.bank.views import RouterView
from molora_fed.errors import RoutingError, ShapeError
from molora_fed.routing.contract import RouterOptions, RouterState
from molora_kalavai.hidden import HiddenOptions, HiddenRouter, draw_rows

if TYPE_CHECKING:
    from molora_fed.bank import CalibrationBank

__all__ = ["LinearOptions", "LinearRouter", "NoncausalLinearRouter"]


class LinearOptions(HiddenOptions):
    """Options of the linear routers."""


class LinearRouter(HiddenRouter):
    """Gates softmax(W m_t), m_t the mean of the document's hidden states up to t.

    Source: arXiv 2603.22755, protocol. Deviations: the mean runs over the document so far, not
    over the whole sequence, so that the gate sees no future token; batches draw domains in turn.
    """

    Options: ClassVar[type[RouterOptions]] = LinearOptions
    label: ClassVar[str] = "linear"

    def __init__(self, num_experts: int, options: HiddenOptions, weight: Tensor) -> None:
        super().__init__(num_experts, options)
        self.weight = weight  # (E, D)

    @classmethod
    def draw(cls, bank: "CalibrationBank", options: HiddenOptions, seed: int) -> Self:
        """W at the start, a row drawn for each expert's name."""
        weight = draw_rows(bank.expert_names, bank.hidden_size, seed).to(bank.device)
        return cls(bank.num_experts, options, weight)

    def parameters(self) -> Sequence[Tensor]:
        """W alone."""
        return [self.weight]

    @property
    def width(self) -> int:
        """D."""
        return int(self.weight.shape[1])

    def score(self, pooled: Tensor) -> Tensor:
        """W m."""
        return pooled @ self.weight.T.to(pooled.device)

    def state_tensors(self) -> dict[str, Tensor]:
        """W, (E, D)."""
        return {"weight": self.weight.detach()}

    @classmethod
    def from_state(
        cls, num_experts: int, options: RouterOptions, tensors: Mapping[str, Tensor]
    ) -> Self:
        """The router with this W.

        Raises:
            ShapeError: If W is missing or is not (E, D).
        """
        weight = tensors.get("weight")
        if weight is None or weight.ndim != 2 or len(weight) != num_experts:
            got = "nothing" if weight is None else str(tuple(weight.shape))
            raise ShapeError(
                f"Cannot load router '{cls.label}': expected a weight ({num_experts}, D), "
                f"got {got}. Fuse again."
            )
        return cls(num_experts, cls.narrow(options), weight)


class NoncausalLinearRouter(LinearRouter):
    """Gates softmax(W m), m the mean over the whole block: sees the future, cannot generate.

    Source: arXiv 2603.22755, published code; kept for reproduction only.
    """

    causal: ClassVar[bool] = False
    label: ClassVar[str] = "linear-noncausal"
    pooling: ClassVar[str] = "block-mean"

    @staticmethod
    def pool(hidden: Tensor, view: RouterView) -> Tensor:
        """The block's mean at every position, (B, T, D) float32."""
        return hidden.float().mean(dim=1, keepdim=True).expand(hidden.shape)

    def step(self, view: RouterView, state: RouterState) -> tuple[Tensor, RouterState]:
        """Refused: the gates of a position need the text after it.

        Raises:
            RoutingError: Always.
        """
        raise RoutingError(
            "Cannot decode with router 'linear-noncausal': expected a causal router, got one "
            "that reads the whole block. Use 'linear' or 'evidence'."
        )
