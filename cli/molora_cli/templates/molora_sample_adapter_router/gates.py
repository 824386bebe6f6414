"""The adapter router: how much of every slot's adapter counts at a token."""

from typing import Any, Self

import torch
from molora_fed import AdapterRouter, AdapterRouterOptions, GateView
from molora_fed.bank.views import GateReading
from molora_fed.errors import PopulationError
from torch import Tensor, nn


class SampleOptions(AdapterRouterOptions):
    """Options, set where the charter names the router.

    Attributes:
        start: Score a fresh slot begins with; its gate is sigmoid(start).
    """

    start: float = 0.0


class SampleAdapterRouter(AdapterRouter):
    """One learned score a slot, the same at every token."""

    Options = SampleOptions
    options: SampleOptions

    def __init__(self, num_slots: int, width: int, options: Any) -> None:
        super().__init__(num_slots, width, options)
        self.scores = nn.Parameter(torch.full((num_slots,), float(options.start)))

    @classmethod
    def build(cls, num_slots: int, width: int, options: Any, seed: int) -> Self:
        """A fresh router; nothing is drawn, so that the seed decides nothing."""
        return cls(num_slots, width, options)

    @classmethod
    def reads(cls, options: Any) -> frozenset[GateReading]:
        """No column; `base_hidden` and `embeddings` can be read, both (B, T, D)."""
        return frozenset()

    def forward(self, view: GateView) -> Tensor:
        """Gate every slot at every position: the one method to fill in.

        Position t may depend on tokens up to x_t only. Gates are trained through the model, so
        that they need a gradient.

        Args:
            view: B texts of T tokens; columns that `reads` does not name are None.

        Returns:
            Gates of the P slots, (B, T, P), each in [0, 1]; they need not sum to 1.

        See docs/hooks/adapter-routers.md, and docs/populations.md.
        """
        return torch.sigmoid(self.scores).expand(*view.document_starts.shape, -1)

    def set_progress(self, share: float) -> None:
        """Nothing is annealed."""

    @torch.no_grad()
    def reset_slot(self, slot: int, parent: int | None, seed: int) -> None:
        """Give a newborn its parent's score, or a fresh one.

        Raises:
            PopulationError: If there is no such slot.
        """
        places = [slot] if parent is None else [slot, parent]
        if not all(0 <= place < self.num_slots for place in places):
            raise PopulationError(
                f"Cannot reset slot {slot}: expected slots below {self.num_slots}, got {places}. "
                "Name a slot of this population."
            )
        self.scores[slot] = self.options.start if parent is None else self.scores[parent].clone()
