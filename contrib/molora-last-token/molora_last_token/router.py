"""Gates follow the evidence of the last token alone."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from molora_fed.bank.views import RouterView
from molora_fed.routing.contract import OutputRouter, RouterOptions, RouterState
from molora_fed.routing.fitting import check_calibration
from molora_fed.types import Progress, Reading

if TYPE_CHECKING:
    from molora_fed.bank import CalibrationBank


class LastTokenOptions(RouterOptions):
    """Options.

    Attributes:
        sharpness: Factor on the evidence, per nat; higher follows more sharply.
    """

    sharpness: float = 1.0


class LastTokenRouter(OutputRouter):
    """Gates softmax(sharpness * evidence_t): no memory, no training."""

    Options: ClassVar[type[RouterOptions]] = LastTokenOptions

    @classmethod
    def reads(cls, options: RouterOptions) -> frozenset[Reading]:
        """Evidence alone."""
        return frozenset({"evidence"})

    @classmethod
    def fit(
        cls,
        bank: "CalibrationBank",
        options: RouterOptions,
        seed: int,
        progress: Progress | None = None,
    ) -> Self:
        """The router for the bank's experts; a held-out bank is refused."""
        check_calibration(bank)
        return cls(bank.num_experts, options)

    def scores(self, view: RouterView) -> Tensor:
        """Scaled evidence, (B, T, E)."""
        return self.options.sharpness * view.evidence

    def init_state(self, batch_size: int) -> RouterState:
        """Nothing is remembered."""
        return {}

    def step(self, view: RouterView, state: RouterState) -> tuple[Tensor, RouterState]:
        """Gates of these positions, (B, t, E)."""
        return torch.softmax(self.scores(view), dim=-1), state

    def state_tensors(self) -> dict[str, Tensor]:
        """Nothing was learned."""
        return {}

    @classmethod
    def from_state(
        cls, num_experts: int, options: RouterOptions, tensors: Mapping[str, Tensor]
    ) -> Self:
        """The router for this number of experts."""
        return cls(num_experts, options)
