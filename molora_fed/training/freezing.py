"""How many blocks to freeze for a planned number of training steps. Imports nothing heavy.

Frozen blocks cost gain in short trainings, because they cannot learn, and save it in long ones,
because specialists drift apart where routers need them alike. Where the two meet is measured.
"""

from dataclasses import dataclass
from itertools import pairwise
from math import log

from molora_fed.errors import ConfigError

__all__ = ["MEASURED", "PUBLISHED", "FreezeAdvice", "FreezeCurve", "recommend_frozen_depth"]


@dataclass(frozen=True)
class FreezeCurve:
    """Gains with and without frozen blocks after several trainings, and where they cross.

    Attributes:
        crossover_steps: Optimiser steps from which freezing is better; None if no crossover was
            seen within what was measured.
        frozen_blocks: K of the frozen trainings.
        num_blocks: Blocks of the base they were measured on.
        gains: (steps, gain without, gain with frozen blocks), gains in percent against the base.
        source: Where it comes from.
    """

    crossover_steps: int | None
    frozen_blocks: int
    num_blocks: int
    gains: tuple[tuple[int, float, float], ...]
    source: str

    def compute_difference(self, steps: int) -> float:
        """What freezing changed, percentage points of gain, at a number of steps.

        Linear between measured points over the logarithm of steps; the ends hold outside them.
        """
        points = [(log(number), with_ - without) for number, without, with_ in self.gains]
        at = log(steps)
        if at <= points[0][0]:
            return points[0][1]
        for (left, low), (right, high) in pairwise(points):
            if at <= right:
                return low + (high - low) * (at - left) / (right - left)
        return points[-1][1]


PUBLISHED = FreezeCurve(
    crossover_steps=10_000,
    frozen_blocks=4,
    num_blocks=24,
    gains=(
        (50, 4.0, 3.5),
        (100, 5.1, 4.5),
        (500, 9.2, 8.3),
        (1_000, 12.1, 10.8),
        (2_000, 15.5, 14.2),
        (5_000, 17.7, 17.5),
        (10_000, 16.7, 17.7),
        (20_000, 14.7, 17.0),
    ),
    source="arXiv 2603.22755, Pythia-410M, effective batch 8",
)
"""The published curve. The crossover is the paper's round figure: its points cross at 5,700 steps
if the logarithm of steps is interpolated, and nothing was measured between 5,000 and 10,000."""


MEASURED = FreezeCurve(
    crossover_steps=None,
    frozen_blocks=1,
    num_blocks=4,
    gains=((50, 0.00, 0.21), (150, 1.41, 1.14), (600, 3.97, 3.25), (1_800, 7.30, 6.07)),
    source="study `duration`, the built-in base, weights chosen by validation, 3 seeds",
)
"""Our own curve, docs/results/kalavai/duration.md. At 50 steps the default rate is too high without
frozen blocks, and validation keeps the base. Longer trainings were not measured; early stopping
keeps out the over-fitting that makes the published curves cross."""


@dataclass(frozen=True)
class FreezeAdvice:
    """A recommendation, and what it rests on.

    Attributes:
        steps: Planned optimiser steps.
        frozen_depth: K to freeze; 0 freezes embedding, head and norms only.
        difference_percent: What freezing changed at that many steps in the curve, percentage
            points of gain.
        curve: The curve.
    """

    steps: int
    frozen_depth: int
    difference_percent: float
    curve: FreezeCurve

    def describe(self) -> str:
        """The recommendation in one sentence for people."""
        crossover = self.curve.crossover_steps
        if crossover is None:
            side = "no crossover was seen"
        else:
            where = "at or above" if self.steps >= crossover else "below"
            side = f"{where} the crossover at {crossover:,}"
        return (
            f"Frozen depth {self.frozen_depth} for {self.steps:,} steps, {side}: there "
            f"{self.curve.frozen_blocks} of {self.curve.num_blocks} blocks frozen changed the gain "
            f"by {self.difference_percent:+.1f} percentage points ({self.curve.source}; measured "
            f"from {self.curve.gains[0][0]:,} to {self.curve.gains[-1][0]:,} steps)."
        )


def recommend_frozen_depth(
    steps: int, num_blocks: int, *, curve: FreezeCurve = PUBLISHED
) -> FreezeAdvice:
    """Recommend a frozen depth: none below the crossover, the curve's share of blocks above it.

    Args:
        steps: Planned optimiser steps of a specialist.
        num_blocks: Decoder blocks of the base.
        curve: What was measured; the published curve by default.

    Raises:
        ConfigError: If there are no steps or no blocks.

    Source: arXiv 2603.22755, freeze depth by training length; the share of blocks is the one
    measured there, 4 of 24, rounded, and at least one block stays free.
    """
    if steps < 1 or num_blocks < 1:
        raise ConfigError(
            f"Cannot recommend a frozen depth: expected at least 1 step and 1 block, got {steps} "
            f"steps and {num_blocks} blocks. Name the steps that are planned."
        )
    depth = 0
    if curve.crossover_steps is not None and steps >= curve.crossover_steps and num_blocks > 1:
        share = round(num_blocks * curve.frozen_blocks / curve.num_blocks)
        depth = min(max(1, share), num_blocks - 1)
    return FreezeAdvice(steps, depth, curve.compute_difference(steps), curve)
