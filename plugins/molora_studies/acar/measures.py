"""Statistics of the study `acar`: means over seeds, intervals over tasks and over seeds.

Tasks asked of the same models are no replicates of a training: bootstrap intervals over tasks say
how other tasks would come out on these models, Student's over seeds how other models would.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from molora_studies.verdicts import Span, compute_span

__all__ = [
    "RESAMPLES",
    "Estimate",
    "Sampled",
    "Values",
    "compare_correlation",
    "estimate",
    "integrate",
    "interpolate",
    "pack_numbers",
    "unpack_numbers",
]

RESAMPLES = 2000
_SEED = 0

Floats = NDArray[np.float64]
Values = Sequence[float] | NDArray[Any]
"""A number a task."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval.

    Attributes:
        point: Mean over seeds.
        low: Lower end of the interval over tasks, the seeds' models fixed.
        high: Upper end.
        by_seed: The figure of each seed, whose models are trained anew.
    """

    point: float
    low: float
    high: float
    by_seed: tuple[float, ...]

    @property
    def over_seeds(self) -> Span:
        """Student's 95 % interval over trainings."""
        return compute_span(self.by_seed)

    @property
    def spans(self) -> list[Span]:
        """The intervals that must agree: over trainings, and over tasks."""
        return [self.over_seeds, Span(self.low, self.high)]

    def scale(self, factor: float) -> "Estimate":
        """All figures times a number."""
        low, high = sorted((factor * self.low, factor * self.high))
        return Estimate(factor * self.point, low, high, tuple(factor * one for one in self.by_seed))

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {**vars(self), "by_seed": list(self.by_seed)}

    def show(self, digits: int = 1, sign: str = "") -> str:
        """Point and interval, e.g. "45.4 [43.9, 46.8]"."""
        return (
            f"{self.point:{sign}.{digits}f} [{self.low:{sign}.{digits}f}, "
            f"{self.high:{sign}.{digits}f}]"
        )

    def show_both(self, unit: str, digits: int = 1) -> str:
        """Point, interval over trainings, interval over tasks, e.g. for a claim."""
        seeds, tasks = (span.show(digits) for span in self.spans)
        figure = f"{self.point:+.{digits}f} {unit}".strip()
        count = len(self.by_seed)
        return f"{figure} {seeds} over {count} seed{'s' if count > 1 else ''}, {tasks} over tasks"


class Sampled:
    """Tasks of several seeds, and how often each is drawn in every resample.

    A resample draws as many tasks as there are from those of each seed; the seeds' models stay.
    Every statistic is computed on the same resamples, so that differences are paired.
    """

    def __init__(self, tasks: Sequence[int]) -> None:
        """Draw the resamples.

        Args:
            tasks: Number of tasks of each seed.
        """
        generator = np.random.default_rng(_SEED)
        self.shares = [
            generator.multinomial(count, np.full(count, 1 / count), size=RESAMPLES) / count
            for count in tasks
        ]

    def mean(self, values: Sequence[Values]) -> tuple[Floats, Floats]:
        """Means of a number a task.

        Args:
            values: Of each seed's tasks.

        Returns:
            By seed (S,), and by seed in every resample (S, RESAMPLES).
        """
        arrays = [np.asarray(one, dtype=float) for one in values]
        seeds = np.array([one.mean() for one in arrays])
        pairs = zip(self.shares, arrays, strict=True)
        return seeds, np.stack([share @ one for share, one in pairs])


def estimate(seeds: Floats, resampled: Floats) -> Estimate:
    """A figure from its values by seed (S,) and by seed in every resample (S, RESAMPLES)."""
    low, high = np.quantile(resampled.mean(axis=0), [0.025, 0.975])
    return Estimate(float(seeds.mean()), float(low), float(high), tuple(map(float, seeds)))


def integrate(cost: Floats, accuracy: Floats, low: Floats, high: Floats) -> Floats:
    """Mean accuracy over all budgets between two costs, of policies mixed at random.

    Between two policies a budget is met by tossing a coin for each task; beyond the dearest the
    money is not spent.

    Args:
        cost: Of each policy, (..., P).
        accuracy: Of each policy, (..., P).
        low: Least budget, (...).
        high: Largest, (...).
    """
    found = np.empty(cost.shape[:-1])
    for at in np.ndindex(found.shape):
        order = np.argsort(cost[at], kind="stable")
        budgets = np.linspace(low[at], high[at], 101)
        best = np.maximum.accumulate(accuracy[at][order])
        found[at] = np.interp(budgets, cost[at][order], best).mean()
    return found


def interpolate(cost: Floats, accuracy: Floats, budget: Floats) -> Floats:
    """Accuracy at a budget of policies mixed at random; outside, that of the nearest.

    Args:
        cost: Of each policy, (..., P), rising.
        accuracy: Of each policy, (..., P).
        budget: The budget, (...).
    """
    found = np.empty(budget.shape)
    for at in np.ndindex(found.shape):
        found[at] = np.interp(budget[at], cost[at], accuracy[at])
    return found


def pack_numbers(values: Iterable[float]) -> str:
    """Numbers as one text, which takes a tenth of the lines of a JSON list."""
    return " ".join(f"{value:.10g}" for value in values)


def unpack_numbers(text: str) -> Floats:
    """Numbers of `pack_numbers`."""
    return np.array(text.split(), dtype=float)


def compare_correlation(
    sampled: Sampled, one: Sequence[Values], other: Sequence[Values]
) -> Estimate:
    """Rank correlation (Spearman) of two numbers a task, mean over seeds.

    Ranks are those of the whole sample; resamples weigh them.

    Args:
        sampled: The resamples.
        one: Of each seed's tasks.
        other: The same.
    """
    seeds, drawn = [], []
    for share, left, right in zip(sampled.shares, one, other, strict=True):
        a, b = (rankdata(one) - (len(one) + 1) / 2 for one in (left, right))
        whole = np.full((1, len(a)), 1 / len(a))
        seeds.append(float(_correlate(whole, a, b)[0]))
        drawn.append(_correlate(share, a, b))
    return estimate(np.array(seeds), np.stack(drawn))


def _correlate(share: Floats, a: Floats, b: Floats) -> Floats:
    """Weighed Pearson correlation in every row of `share`; 0 where one of them is constant."""
    mean_a, mean_b = share @ a, share @ b
    spread = (share @ a**2 - mean_a**2) * (share @ b**2 - mean_b**2)
    covariance = share @ (a * b) - mean_a * mean_b
    return np.where(spread > 1e-12, covariance / np.sqrt(np.maximum(spread, 1e-12)), 0.0)
