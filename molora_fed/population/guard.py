"""The guard of a population: a lifecycle is kept only if it is shown not to harm.

A generation's lifecycle branch is compared with its twin, which had the same adaptation and no
lifecycle, on guard documents. Let d be the mean over domains of the loss of the lifecycle branch
less that of its twin, nats per token. The branch is kept if the one-sided upper confidence bound of
d, by document cluster, is at most delta; a branch that harms by more than delta is then kept with
a probability of at most 1 - level.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from molora_fed.errors import PopulationError

__all__ = ["DELTA_NATS", "LEVEL", "Comparison", "GuardMode", "compare_branches", "spend_level"]

DELTA_NATS = 0.002
LEVEL = 0.95
MIN_CLUSTERS = 2

GuardMode = Literal["fresh", "spending", "off"]
"""Documents never used before for each generation; the same ones at a level that pays for it; or
no guard, so that every lifecycle is kept."""


@dataclass(frozen=True)
class Comparison:
    """A lifecycle branch against its twin.

    Attributes:
        difference: Mean over domains of lifecycle less twin, nats per token.
        error: Its standard error by document cluster.
        degrees: Degrees of freedom of the error.
        bound: One-sided upper confidence bound of the difference.
        level: Of the bound.
        delta: Largest bound that is kept, nats.
        clusters: Guard clusters of each domain.
    """

    difference: float
    error: float
    degrees: float
    bound: float
    level: float
    delta: float
    clusters: tuple[int, ...]

    @property
    def kept(self) -> bool:
        """Whether the population goes on with the lifecycle."""
        return self.bound <= self.delta

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "clusters": list(self.clusters), "kept": self.kept}


def compare_branches(
    lifecycle: NDArray[np.float64],
    twin: NDArray[np.float64],
    counts: NDArray[np.float64],
    domain_of: NDArray[np.int64],
    *,
    domains: Sequence[str] | None = None,
    delta: float = DELTA_NATS,
    level: float = LEVEL,
) -> Comparison:
    """Bound the harm of a lifecycle from above.

    In each domain the difference is a ratio, the sum over clusters of differences by the sum of
    their tokens; its variance is the linearised one. The mean over K domains has the variances'
    sum by K^2, and Student's t with Welch and Satterthwaite's degrees of freedom.

    Args:
        lifecycle: Sum of the lifecycle branch's losses per guard cluster, (C,) nats.
        twin: The same of its twin.
        counts: Predicted tokens of each cluster, (C,).
        domain_of: Index of each cluster's domain, (C,).
        domains: Names of the domains, for errors; each must have clusters. Numbers if None.
        delta: Largest upper bound that is kept, nats.
        level: Of the bound, in (0, 1).

    Raises:
        PopulationError: If shapes differ, a number is not finite, a setting is out of range, or a
            domain has fewer than two clusters.

    Source: Cochran, Sampling Techniques, 3rd ed., sections 6.4 (ratio estimate) and 5.4 (degrees
    of freedom over strata).
    """
    names = [str(n) for n in range(int(domain_of.max(initial=-1)) + 1)]
    names = names if domains is None else list(domains)
    _check(lifecycle, twin, counts, domain_of, names, delta, level)
    differences = lifecycle - twin
    means, variances, sizes = [], [], []
    for domain in range(len(names)):
        own = domain_of == domain
        size, tokens = int(own.sum()), counts[own].sum()
        mean = differences[own].sum() / tokens
        residuals = differences[own] - mean * counts[own]
        means.append(mean)
        variances.append(size / (size - 1) * np.square(residuals).sum() / tokens**2)
        sizes.append(size)
    spread = np.array(variances)
    freedom = np.array(sizes) - 1.0
    total = float(spread.sum())
    squares = float((spread**2 / freedom).sum())
    # Where nothing varies, or its square is too small for a number, any degrees do.
    degrees = total**2 / squares if squares > 0 else float(freedom.sum())
    error = float(np.sqrt(total)) / len(names)
    difference = float(np.mean(means))
    return Comparison(
        difference=difference,
        error=error,
        degrees=degrees,
        bound=difference + float(stats.t.ppf(level, degrees)) * error,
        level=level,
        delta=delta,
        clusters=tuple(sizes),
    )


def _check(
    lifecycle: NDArray[np.float64],
    twin: NDArray[np.float64],
    counts: NDArray[np.float64],
    domain_of: NDArray[np.int64],
    names: Sequence[str],
    delta: float,
    level: float,
) -> None:
    shapes = {array.shape for array in (lifecycle, twin, counts, domain_of)}
    faults = [f"shapes {sorted(shapes)}"] if len(shapes) > 1 else []
    if not all(np.isfinite(array).all() for array in (lifecycle, twin)):
        faults.append("a loss that is not finite")
    if not 0 < level < 1 or not np.isfinite(delta):
        faults.append(f"delta {delta} at level {level}")
    if not faults:
        found = np.bincount(domain_of, minlength=len(names))
        if len(found) > len(names) or not (counts > 0).all():
            faults.append("clusters without a domain or without tokens")
        faults += [
            f"{count} guard clusters of domain '{name}'"
            for name, count in zip(names, found, strict=False)
            if count < MIN_CLUSTERS
        ]
    if faults or not names:
        raise PopulationError(
            f"Cannot guard a lifecycle: expected finite losses of at least {MIN_CLUSTERS} guard "
            f"clusters of each domain, got {'; '.join(faults) or 'none'}. Ask for more calibration "
            "blocks, evolve fewer generations, or use guard 'spending'."
        )


def spend_level(level: float, generations: int, comparisons: int) -> float:
    """Level of a comparison on guard documents that earlier comparisons have seen.

    Each comparison tells one bit, kept or not, so that what is compared at comparison k (from 0)
    is one of 2^k branches that could have come about, all fixed before the documents were looked
    at. With (1 - level) / (generations * 2^k) for each, all that could be compared is covered:
    the chance that any lifecycle is kept that harms by more than delta is 1 - level at most.

    Args:
        level: Of all comparisons together.
        generations: Comparisons there may be at most.
        comparisons: Those made before, k.

    Source: own derivation: Bonferroni over all branches that could be compared; see
    docs/populations.md.
    """
    return 1.0 - (1.0 - level) / (generations * 2.0**comparisons)
