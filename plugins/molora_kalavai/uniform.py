"""The same gate for every expert: what routing has to beat."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from molora_fed.bank.views import RouterView
from molora_fed.errors import ShapeError
from molora_fed.routing.contract import OutputRouter, RouterOptions, RouterState
from molora_fed.routing.fitting import check_calibration
from molora_fed.types import Progress, Reading

if TYPE_CHECKING:
    from molora_fed.bank import CalibrationBank

__all__ = ["UniformRouter"]


class UniformRouter(OutputRouter):
    """Gates 1/E, the base included where it is an expert. Nothing is read or fitted.

    Source: arXiv 2603.22755, table of routers.
    """

    @classmethod
    def reads(cls, options: RouterOptions) -> frozenset[Reading]:
        """Nothing."""
        return frozenset()

    @classmethod
    def fit(
        cls,
        bank: "CalibrationBank",
        options: RouterOptions,
        seed: int,
        progress: Progress | None = None,
    ) -> Self:
        """The router for the bank's experts; reads nothing else of it."""
        check_calibration(bank)
        return cls(bank.num_experts, options)

    def scores(self, view: RouterView) -> Tensor:
        """0 for every expert, (B, T, E)."""
        starts = view.document_starts
        return torch.zeros(*starts.shape, self.num_experts, device=starts.device)

    def init_state(self, batch_size: int) -> RouterState:
        """Nothing is remembered."""
        return {}

    def step(self, view: RouterView, state: RouterState) -> tuple[Tensor, RouterState]:
        """Gates of these positions, (B, t, E)."""
        return self.gates(view), state

    def state_tensors(self) -> dict[str, Tensor]:
        """Nothing was learned."""
        return {}

    @classmethod
    def from_state(
        cls, num_experts: int, options: RouterOptions, tensors: Mapping[str, Tensor]
    ) -> Self:
        """The router for this number of experts.

        Raises:
            ShapeError: If there are tensors: they belong to another router.
        """
        if tensors:
            raise ShapeError(
                f"Cannot load router 'uniform': expected no tensors, "
                f"got {', '.join(sorted(tensors))}. Fuse again."
            )
        return cls(num_experts, options)
