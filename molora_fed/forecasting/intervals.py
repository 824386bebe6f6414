"""Intervals around forecasts from few residuals, with a level that claims no more than they show.

With n residuals of earlier groups and one new group exchangeable with them, the new residual's
size is above the k-th smallest of the n with probability at most 1 - k / (n + 1). The interval
`point +- k-th smallest |residual|` with k = ceil(level * (n + 1)) therefore covers with at least
the level asked for; if k is above n, the largest residual is taken and n / (n + 1) is claimed.
Where the point was fitted to the earlier groups, every residual is taken under a fit without its
group, and the interval reaches around the forecasts of all these fits (jackknife-minmax): this
keeps the level without assuming that the fits agree, which the jackknife+ does only at 2 * level
- 1.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from molora_fed.errors import ConfigError

__all__ = [
    "LEVEL",
    "Interval",
    "Line",
    "compute_interval",
    "compute_interval_score",
    "fit_line",
]

LEVEL = 0.8
"""Coverage asked for: four groups suffice for it."""

Line = Callable[[float], float]
"""A fitted curve: outcome from input."""


@dataclass(frozen=True)
class Interval:
    """A closed interval with its nominal coverage.

    Attributes:
        low: Lower end, in the unit of the point.
        high: Upper end.
        level: Nominal coverage in (0, 1).
    """

    low: float
    high: float
    level: float


def compute_interval(
    point: float | tuple[float, float],
    residuals: Sequence[float],
    *,
    fits: Sequence[float] = (),
    level: float = LEVEL,
) -> Interval:
    """Widen a point, or a bracket, by the residuals seen.

    Args:
        point: Forecast, any unit; or the two ends of a bracket, of which residuals are how far
            outcomes lay outside.
        residuals: Outcome minus forecast of earlier groups, same unit, one a group.
        fits: The new case's forecasts under the fits that the residuals come from; none if
            nothing was fitted.
        level: Coverage asked for.

    Returns:
        The interval, with the level asked for or the highest that so many residuals support.

    Raises:
        ConfigError: If there is no residual.

    Source: Barber, Candes, Ramdas, Tibshirani, Predictive inference with the jackknife+, 2021,
    theorem 2 (jackknife-minmax); Vovk, Gammerman, Shafer, Algorithmic Learning in a Random World.
    """
    if not residuals:
        raise ConfigError(
            "Cannot compute an interval: expected at least one residual, got none. "
            "Forecast without an interval."
        )
    count = len(residuals)
    # 1e-9: 0.8 * 5 must be 4, not the next number above it.
    rank = math.ceil(level * (count + 1) - 1e-9)
    half = sorted(map(abs, residuals))[min(rank, count) - 1]
    ends = [*(point if isinstance(point, tuple) else (point,)), *fits]
    claimed = level if rank <= count else count / (count + 1)
    return Interval(min(ends) - half, max(ends) + half, claimed)


def compute_interval_score(low: float, high: float, level: float, outcome: float) -> float:
    """Score an interval: its width, plus 2 / (1 - level) times how far the outcome lies outside.

    Args:
        low: Lower end.
        high: Upper end.
        level: Nominal coverage in (0, 1).
        outcome: What came out, same unit.

    Returns:
        The score in the outcome's unit; lower is better.

    Source: Gneiting and Raftery, Strictly proper scoring rules, 2007, equation 43.
    """
    outside = max(low - outcome, outcome - high, 0.0)
    return high - low + 2.0 / (1.0 - level) * outside


def fit_line(inputs: Sequence[float], outcomes: Sequence[float]) -> Line:
    """Fit `outcome = slope * input + offset` by least squares.

    Args:
        inputs: At least two different numbers.
        outcomes: As many numbers.

    Raises:
        ConfigError: If the lengths differ or no line is determined.
    """
    count = len(inputs)
    if count != len(outcomes) or len(set(inputs)) < 2:
        raise ConfigError(
            f"Cannot fit a line: expected two or more different inputs with an outcome each, "
            f"got {count} inputs and {len(outcomes)} outcomes. Give more cases."
        )
    mean_in, mean_out = sum(inputs) / count, sum(outcomes) / count
    spread = sum((x - mean_in) ** 2 for x in inputs)
    product = sum((x - mean_in) * (y - mean_out) for x, y in zip(inputs, outcomes, strict=True))
    slope = product / spread
    return lambda x: mean_out + slope * (x - mean_in)
