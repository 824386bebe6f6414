"""How good forecasts were: error, bias, coverage with its own interval, interval score."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from scipy.stats import binomtest

from molora_fed.forecasting.intervals import compute_interval_score

__all__ = ["Coverage", "Score", "ScoredForecast", "compute_coverage", "score_all"]

CONFIDENCE = 0.95


@dataclass(frozen=True)
class ScoredForecast:
    """A forecast and its outcome.

    Attributes:
        group: The condition without its seed; forecasts of one group are not independent.
        point: Forecast gain, percent; None if only an interval was claimed.
        low: Lower end of the interval, percent; None without an interval.
        high: Upper end, percent; None likewise.
        level: Nominal coverage; None likewise.
        actual: Measured gain, percent.
    """

    group: str
    point: float | None
    low: float | None
    high: float | None
    level: float | None
    actual: float

    @property
    def is_inside(self) -> bool | None:
        """Whether the interval held; None without one."""
        if self.low is None or self.high is None:
            return None
        return self.low <= self.actual <= self.high

    @property
    def interval_score(self) -> float | None:
        """Interval score in percentage points, lower is better; None without an interval."""
        if self.low is None or self.high is None or self.level is None:
            return None
        return compute_interval_score(self.low, self.high, self.level, self.actual)


@dataclass(frozen=True)
class Coverage:
    """How often intervals held.

    Attributes:
        inside: Number that held.
        count: Number that were claimed.
        low: Lower end of the 95 % Clopper-Pearson interval of the share.
        high: Upper end.
    """

    inside: int
    count: int
    low: float
    high: float


@dataclass(frozen=True)
class Score:
    """How good a predictor's forecasts were; None where nothing was claimed.

    Attributes:
        count: Forecasts with an outcome.
        groups: Groups they are of.
        rmse: Root mean square of outcome minus point, percentage points.
        mae: Mean of its size.
        bias: Its mean; positive if forecasts were low.
        level: Mean nominal coverage.
        runs: Coverage over single forecasts; seeds of a group are not independent.
        by_group: Coverage over groups; one holds if every interval of it does.
        interval_score: Mean over forecasts, percentage points; lower is better.
        width: Mean width of the intervals, percentage points.
    """

    count: int
    groups: int
    rmse: float | None
    mae: float | None
    bias: float | None
    level: float | None
    runs: Coverage | None
    by_group: Coverage | None
    interval_score: float | None
    width: float | None

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def compute_coverage(held: Sequence[bool]) -> Coverage | None:
    """Share of intervals that held, with its exact 95 % interval; None if there are none.

    Source: Clopper and Pearson, 1934 (scipy.stats.binomtest).
    """
    if not held:
        return None
    interval = binomtest(sum(held), len(held)).proportion_ci(CONFIDENCE, method="exact")
    return Coverage(sum(held), len(held), float(interval.low), float(interval.high))


def score_all(forecasts: Iterable[ScoredForecast]) -> Score:
    """Score forecasts of one predictor together."""
    scored = list(forecasts)
    errors = [f.actual - f.point for f in scored if f.point is not None]
    claimed = [f for f in scored if f.is_inside is not None]
    groups: dict[str, list[bool]] = {}
    for one in claimed:
        groups.setdefault(one.group, []).append(bool(one.is_inside))
    scores = [f.interval_score for f in claimed if f.interval_score is not None]
    return Score(
        count=len(scored),
        groups=len({f.group for f in scored}),
        rmse=math.sqrt(fmean(e * e for e in errors)) if errors else None,
        mae=fmean(map(abs, errors)) if errors else None,
        bias=fmean(errors) if errors else None,
        level=fmean(f.level for f in claimed if f.level is not None) if scores else None,
        runs=compute_coverage([bool(f.is_inside) for f in claimed]),
        by_group=compute_coverage([all(held) for held in groups.values()]),
        interval_score=fmean(scores) if scores else None,
        width=fmean(f.high - f.low for f in claimed if f.high is not None and f.low is not None)
        if claimed
        else None,
    )
