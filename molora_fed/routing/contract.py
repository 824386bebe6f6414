"""What a router is: the contract of `register_routers`, and the view it reads.

A view at position t holds only what is known after reading token x_t, and `gates[:, t]` weigh
the experts' predictions of x_{t+1}. `molora_fed.testing.check_router_conformance` proves it.
"""

import abc
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from molora_fed.bank.views import RouterView
from molora_fed.types import Progress, Reading

if TYPE_CHECKING:
    from molora_fed.bank import CalibrationBank

__all__ = [
    "OutputRouter",
    "RouterOptions",
    "RouterState",
]


RouterState = Mapping[str, Tensor]
"""What a router remembers between decoding steps: tensors with the batch first."""


class RouterOptions(BaseModel):
    """Base of every router's options: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class OutputRouter(abc.ABC):
    """A fitted router whose gates mix the experts' output distributions.

    There is no unfitted router: `fit` makes one from a calibration bank, `from_state` from a file.

    Attributes:
        Options: Pydantic model of the router's options.
        causal: False only for forms kept for reproduction; these cannot generate.
        num_experts: E.
        options: The options it was fitted with.
    """

    Options: ClassVar[type[RouterOptions]] = RouterOptions
    causal: ClassVar[bool] = True

    def __init__(self, num_experts: int, options: RouterOptions) -> None:
        self.num_experts = num_experts
        self.options = options

    @classmethod
    @abc.abstractmethod
    def reads(cls, options: RouterOptions) -> frozenset[Reading]:
        """The columns `fit` and `gates` read under these options."""

    @classmethod
    @abc.abstractmethod
    def fit(
        cls,
        bank: "CalibrationBank",
        options: RouterOptions,
        seed: int,
        progress: Progress | None = None,
    ) -> Self:
        """Fit on calibration data; the same bank, options and seed give the same router."""

    @abc.abstractmethod
    def scores(self, view: RouterView) -> Tensor:
        """Rank all experts at every position, (B, T, E); higher is better, any scale."""

    def gates(self, view: RouterView) -> Tensor:
        """Gates of shape (B, T, E), non-negative, summing to 1 over E."""
        return torch.softmax(self.scores(view), dim=-1)

    @abc.abstractmethod
    def init_state(self, batch_size: int) -> RouterState:
        """State before the first token."""

    @abc.abstractmethod
    def step(self, view: RouterView, state: RouterState) -> tuple[Tensor, RouterState]:
        """Gates of the view's positions (B, t, E), given the state before them, and the next.

        Stepping through a text in pieces of any length gives the gates of the full form.
        """

    def reorder(self, state: RouterState, index: Tensor) -> RouterState:
        """State whose row b is the old row `index[b]`, for beam search."""
        return {name: tensor.index_select(0, index) for name, tensor in state.items()}

    @abc.abstractmethod
    def state_tensors(self) -> dict[str, Tensor]:
        """Everything learned, for safetensors."""

    @classmethod
    @abc.abstractmethod
    def from_state(
        cls, num_experts: int, options: RouterOptions, tensors: Mapping[str, Tensor]
    ) -> Self:
        """The router that `state_tensors` came from."""
