"""Intervals by resampling whole clusters of near-duplicate documents within each domain."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from molora_fed.errors import BankError

__all__ = ["ClusterIndex", "compute_interval", "resample_domain_means"]

LEVEL = 0.95
RESAMPLES = 4000
_DRAWS_AT_ONCE = 2**22  # counts held at once: resamples times clusters


@dataclass(frozen=True, eq=False)
class ClusterIndex:
    """Which cluster every predicted token belongs to, so that sums over clusters are one call.

    Attributes:
        of_token: Index of each token's cluster, (N * (T-1),).
        domain_of: Index of each cluster's domain, (C,).
        counts: Tokens of each cluster, (C,).
        num_domains: Number of domains.
    """

    of_token: NDArray[np.int64]
    domain_of: NDArray[np.int64]
    counts: NDArray[np.float64]
    num_domains: int

    @staticmethod
    def build(clusters: NDArray[np.int64], domain_of: NDArray[np.int64]) -> "ClusterIndex":
        """Index the predicted tokens of a bank.

        Args:
            clusters: Cluster of every token, (N, T), unique over all domains.
            domain_of: Index of each block's domain, (N,).

        Raises:
            BankError: If a cluster lies in two domains.
        """
        predicted = clusters[:, 1:]
        unique, of_token = np.unique(predicted, return_inverse=True)
        token_domain = np.repeat(domain_of, predicted.shape[1])
        lowest = np.full(len(unique), np.iinfo(np.int64).max)
        highest = np.full(len(unique), -1)
        np.minimum.at(lowest, of_token.ravel(), token_domain)
        np.maximum.at(highest, of_token.ravel(), token_domain)
        if np.any(lowest != highest):
            raise BankError(
                "Cannot index clusters: expected each in one domain, got "
                f"{int(np.sum(lowest != highest))} in several. Prepare the corpus again."
            )
        counts = np.bincount(of_token.ravel(), minlength=len(unique)).astype(np.float64)
        return ClusterIndex(of_token.ravel(), highest, counts, int(domain_of.max()) + 1)

    def sum(self, values: NDArray[np.float32]) -> NDArray[np.float64]:
        """Sum per cluster of a figure per predicted token, (N, T-1) -> (C,)."""
        flat = values.reshape(-1).astype(np.float64)
        sums = np.bincount(self.of_token, weights=flat, minlength=len(self.counts))
        return sums.astype(np.float64, copy=False)

    def domain_means(self, sums: NDArray[np.float64]) -> NDArray[np.float64]:
        """Mean per predicted token of each domain, (C,) -> (num_domains,)."""
        totals = np.bincount(self.domain_of, weights=sums, minlength=self.num_domains)
        counts = np.bincount(self.domain_of, weights=self.counts, minlength=self.num_domains)
        return totals / counts


def resample_domain_means(
    index: ClusterIndex,
    sums: Sequence[NDArray[np.float64]],
    *,
    seed: int,
    resamples: int = RESAMPLES,
) -> NDArray[np.float64]:
    """Domain means of several figures under the same resamples of clusters.

    In each resample every domain draws as many clusters as it has, with replacement; the mean is
    over the tokens drawn. Figures share the draws, so that their differences are paired.

    Args:
        index: Clusters of the predicted tokens.
        sums: A figure's sums per cluster, (C,), each from `index.sum`.
        seed: Of the draws.
        resamples: Number of resamples R.

    Returns:
        (R, figures, num_domains).

    Source: cluster bootstrap of a ratio; own vectorisation as multinomial counts, because
    scipy.stats.bootstrap cannot resample several strata of clusters at once.
    """
    generator = np.random.default_rng(seed)
    means = np.empty((resamples, len(sums), index.num_domains))
    for domain in range(index.num_domains):
        own = np.flatnonzero(index.domain_of == domain)
        figures = np.stack([*(values[own] for values in sums), index.counts[own]], axis=1)
        share = np.full(len(own), 1 / len(own))
        at_once = max(1, _DRAWS_AT_ONCE // len(own))
        for start in range(0, resamples, at_once):
            size = min(at_once, resamples - start)
            draws = generator.multinomial(len(own), share, size=size)  # (size, clusters)
            totals = draws @ figures  # (size, figures + 1)
            means[start : start + size, :, domain] = totals[:, :-1] / totals[:, -1:]
    return means


def compute_interval(
    statistics: NDArray[np.float64], *, level: float = LEVEL
) -> tuple[float, float]:
    """Percentile interval of resampled statistics.

    Args:
        statistics: One number per resample, (R,).
        level: Nominal coverage in (0, 1).

    Returns:
        Lower and upper end.
    """
    tail = (1 - level) / 2
    low, high = np.quantile(statistics, [tail, 1 - tail])
    return float(low), float(high)
