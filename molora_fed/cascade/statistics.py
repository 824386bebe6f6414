"""Intervals and correlations of a cascade's figures, by scipy."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest, bootstrap, spearmanr

__all__ = ["compute_bootstrap_interval", "compute_correlation", "compute_share"]

RESAMPLES = 2_000


def compute_share(hits: int, total: int) -> dict[str, float]:
    """A share with its 95 % Wilson interval.

    Args:
        hits: How many.
        total: Of how many, at least 1.

    Returns:
        point, low, high in [0, 1].
    """
    interval = binomtest(hits, total).proportion_ci(0.95, method="wilson")
    return {"point": hits / total, "low": float(interval.low), "high": float(interval.high)}


def compute_bootstrap_interval(values: ArrayLike, *, seed: int = 0) -> dict[str, float]:
    """A mean with its 95 % bootstrap interval (percentile).

    Args:
        values: One a task, at least one.
        seed: Of the resampling.

    Returns:
        point, low, high.
    """
    sample = np.asarray(values, dtype=float)
    point = float(sample.mean())
    if np.ptp(sample) == 0:
        return {"point": point, "low": point, "high": point}
    interval = bootstrap(
        (sample,),
        np.mean,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(seed),
        batch=100,
    ).confidence_interval
    return {"point": point, "low": float(interval.low), "high": float(interval.high)}


def compute_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None where one of the two never changes.

    Args:
        first: Values.
        second: As many values.
    """
    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(spearmanr(first, second).statistic)
