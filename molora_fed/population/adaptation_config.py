"""Settings of an adaptation."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from molora_fed.bank.states import BaseStates
from molora_fed.errors import TrainingError

__all__ = ["AdaptationConfig"]

_POSITIVE = ("steps", "batch", "threads", "warmup", "clip_norm", "checkpoint_every")
_NOT_NEGATIVE = ("learning_rate", "router_learning_rate", "first_step")


@dataclass(frozen=True)
class AdaptationConfig:
    """Settings of one adaptation.

    Rates and the router's anneal follow the whole run that this adaptation is a part of: several
    adaptations of `steps` each, one per generation, go through one schedule.

    Attributes:
        steps: Optimiser steps, all taken.
        batch: Blocks per step, a multiple of the number of domains.
        seed: Of the data order.
        threads: Torch threads of a run that starts; one that is resumed keeps its own.
        learning_rate: Peak of AdamW's rate for the adapters' factors; 0 freezes them.
        router_learning_rate: The same for the router; 0 freezes it.
        first_step: Steps of the whole run before this adaptation.
        total_steps: Steps of the whole run; None is `first_step + steps`.
        warmup: Steps over which the rate rises, from the start of this adaptation: AdamW's moments
            start anew with it.
        clip_norm: Largest norm of the gradient, of the factors and of the router each.
        checkpoint_every: Steps between checkpoints; the last step makes one too.
    """

    steps: int
    batch: int
    seed: int
    threads: int
    learning_rate: float = 1e-3
    router_learning_rate: float = 1e-2
    first_step: int = 0
    total_steps: int | None = None
    warmup: int = 10
    clip_norm: float = 1.0
    checkpoint_every: int = 100

    @property
    def whole(self) -> int:
        """Steps of the whole run."""
        return self.first_step + self.steps if self.total_steps is None else self.total_steps

    def scale_rate(self, step: int) -> float:
        """Factor of both rates at a step of this adaptation, from 0: warm-up times a cosine."""
        share = (self.first_step + step) / self.whole
        return min(1.0, (step + 1) / self.warmup) * 0.5 * (1.0 + math.cos(math.pi * share))

    def check(self, states: Sequence[BaseStates]) -> None:
        """Check that these settings can be trained with on these blocks.

        Raises:
            TrainingError: Naming all that is wrong.
        """
        values = asdict(self)
        problems = [f"{name} {values[name]}" for name in _POSITIVE if not values[name] > 0]
        problems += [
            f"{name} {values[name]}" for name in _NOT_NEGATIVE if not 0 <= values[name] < math.inf
        ]
        if self.first_step + self.steps > self.whole:
            problems.append(f"steps up to {self.first_step + self.steps} of {self.whole}")
        sizes = {state.blocks.block_size for state in states}
        if len(sizes) != 1 or min(sizes) < 2:
            problems.append(f"block sizes {sorted(sizes) or 'none'}")
        if len({state.domain for state in states}) != len(states):
            problems.append("a domain twice")
        if problems:
            raise TrainingError(
                "Cannot adapt a population: expected positive settings, steps within the whole "
                f"run, and blocks of one size by domain, got {'; '.join(problems)}. Correct these."
            )
