"""Intervals around forecasts from few residuals, with a level that claims no more than they show.

With n residuals of earlier cases and one new case exchangeable with them, the new residual is
larger in size than all n with probability at most 1 / (n + 1). The interval
`point +- max |residual|` therefore covers with probability at least n / (n + 1): split conformal
prediction at the only level that n residuals support without interpolation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from molora_fed.errors import ConfigError

__all__ = ["Interval", "Line", "compute_interval", "fit_line", "leave_one_out_residuals"]

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


def compute_interval(point: float, residuals: Sequence[float]) -> Interval:
    """Widen a point by the largest residual seen.

    Args:
        point: Forecast, any unit.
        residuals: Outcome minus forecast of earlier independent cases, same unit, one a case.

    Returns:
        `point +- max |residual|` at level n / (n + 1).

    Raises:
        ConfigError: If there is no residual.

    Source: Vovk, Gammerman, Shafer, Algorithmic Learning in a Random World, section 2.
    """
    if not residuals:
        raise ConfigError(
            "Cannot compute an interval: expected at least one residual, got none. "
            "Forecast without an interval."
        )
    half = max(abs(residual) for residual in residuals)
    return Interval(point - half, point + half, len(residuals) / (len(residuals) + 1))


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


def leave_one_out_residuals(
    inputs: Sequence[float],
    outcomes: Sequence[float],
    fit: Callable[[Sequence[float], Sequence[float]], Line],
) -> list[float]:
    """Residual of each case under a curve fitted to all the others.

    Args:
        inputs: One number a case.
        outcomes: One number a case.
        fit: Fits a curve to inputs and outcomes.

    Returns:
        Outcome minus prediction, one a case, in the outcomes' unit.

    Raises:
        ConfigError: If a fit is refused.
    """
    residuals = []
    for left_out, (x, y) in enumerate(zip(inputs, outcomes, strict=True)):
        others_in = [v for i, v in enumerate(inputs) if i != left_out]
        others_out = [v for i, v in enumerate(outcomes) if i != left_out]
        residuals.append(y - fit(others_in, others_out)(x))
    return residuals
