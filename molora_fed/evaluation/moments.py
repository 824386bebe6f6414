"""What contributors say of losses on texts that stay with them: sums over document clusters.

A ratio estimate and its standard error by cluster need, of each column of figures x and of the
clusters' tokens n, no more than the number of clusters, sum n, sum n^2, sum x, sum x^2 and sum x n.
These add up over contributors. Where a function wants clusters, such as a fitness scope, stand-ins
with the same sums take their place.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from molora_fed.errors import SumError
from molora_fed.evaluation.bootstrap import LEVEL

__all__ = [
    "INTERVAL_METHOD",
    "MIN_CLUSTERS",
    "Moments",
    "StandIns",
    "add_by_domain",
    "build_stand_ins",
    "check_clusters",
    "estimate",
    "measure_moments",
]

INTERVAL_METHOD = "Student's t by document cluster"
"""How `estimate` finds an interval, in the words of a report."""

MIN_CLUSTERS = 4
"""Clusters that sums may be said of: of two, the sums tell each one's loss."""

MAX_CLUSTERS = 1_000_000  # stand-ins take memory for each
_TOLERANCE = 1e-9
_LARGEST = 1e100  # of a sum: what is below can be squared and added up


@dataclass(frozen=True)
class Moments:
    """Sums over the document clusters of one domain.

    Attributes:
        clusters: C.
        tokens: Sum over clusters of their predicted tokens n.
        squares: Sum of n^2.
        columns: Sum x, sum x^2 and sum x n of each column of figures by name, nats.
    """

    clusters: int
    tokens: float
    squares: float
    columns: Mapping[str, tuple[float, float, float]] = field(repr=False)

    def add(self, other: "Moments") -> "Moments":
        """The moments of both sets of clusters together."""
        columns = {
            name: tuple(a + b for a, b in zip(sums, other.columns[name], strict=True))
            for name, sums in self.columns.items()
        }
        return Moments(
            self.clusters + other.clusters,
            self.tokens + other.tokens,
            self.squares + other.squares,
            columns,  # type: ignore[arg-type]
        )

    def rename(self, names: Mapping[str, str]) -> "Moments":
        """The same clusters with some of the columns under other names.

        Args:
            names: The column's present name by its new one.
        """
        columns = {new: self.columns[old] for new, old in names.items()}
        return replace(self, columns=columns)

    def take_residual(self, one: str, other: str, difference: str, share: float) -> "Moments":
        """The same clusters with the one column (one - other) - share * one, named "residual".

        It is what a reduction by `share` leaves: its variance is that of the reduction. The sum of
        products of two columns follows from the squares of both and of their difference.

        Args:
            one: Column of a reference.
            other: Column of what is compared with it.
            difference: Column of one less the other, or of the other less the one.
            share: Of the reference, by which the other is lower.
        """
        a, b = self.columns[one], self.columns[other]
        apart = self.columns[difference][1]
        common = (a[1] - b[1] + apart) / 2  # of the difference and the reference
        squares = apart - 2 * share * common + share**2 * a[1]
        total, products = ((1 - share) * a[i] - b[i] for i in (0, 2))
        return replace(self, columns={"residual": (total, squares, products)})

    def mean(self, name: str) -> float:
        """A column's sum by token, nats."""
        return self.columns[name][0] / self.tokens

    def variance(self, name: str) -> float:
        """Linearised variance of that mean by cluster.

        Source: Cochran, Sampling Techniques, 3rd ed., section 6.4 (ratio estimate).
        """
        _, squares, products = self.columns[name]
        ratio = self.mean(name)
        residuals = max(0.0, squares - 2 * ratio * products + ratio**2 * self.squares)
        return self.clusters / (self.clusters - 1) * residuals / self.tokens**2

    def to_json(self) -> dict[str, Any]:
        """JSON values that `from_json` reads."""
        return {
            "clusters": self.clusters,
            "tokens": self.tokens,
            "squares": self.squares,
            "columns": {name: list(sums) for name, sums in self.columns.items()},
        }

    @classmethod
    def from_json(cls, value: Any, names: Sequence[str], *, who: str) -> "Moments":
        """Read a contributor's moments, who is not trusted.

        Args:
            value: JSON value.
            names: Columns that were asked for.
            who: The contributor, for errors.

        Raises:
            SumError: If it is malformed, or no clusters could have these sums.
        """
        try:
            found = cls(
                clusters=_read_count(value["clusters"]),
                tokens=float(value["tokens"]),
                squares=float(value["squares"]),
                columns={name: _read_sums(value["columns"][name]) for name in names},
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise _refuse(who, f"'{str(error)[:80]}'") from error
        faults = found._list_faults()
        if faults:
            raise _refuse(who, "; ".join(faults[:5]))
        return found

    def _list_faults(self) -> list[str]:
        sums = [self.tokens, self.squares, *(x for own in self.columns.values() for x in own)]
        if not all(abs(one) <= _LARGEST for one in sums):  # NaN is not
            return ["a sum that is not finite"]
        if not MIN_CLUSTERS <= self.clusters <= MAX_CLUSTERS or self.tokens < self.clusters:
            return [f"{self.clusters} clusters of {self.tokens} tokens"]
        mean = self.tokens**2 / self.clusters
        # Positive sizes have a sum of squares below the square of their sum.
        if not mean * (1 - _TOLERANCE) <= self.squares < self.tokens**2:
            return [f"squares {self.squares} of {self.clusters} clusters of {self.tokens} tokens"]
        faults = []
        for name, (total, squares, products) in self.columns.items():
            spread = squares - total**2 / self.clusters
            common = products - total * self.tokens / self.clusters
            limit = max(0.0, spread) * max(0.0, self.squares - mean)
            slack = _TOLERANCE * squares * self.squares
            if spread < -_TOLERANCE * squares or common**2 > limit + slack:
                faults.append(f"impossible sums of '{name}'")
        return faults


def _refuse(who: str, got: str) -> SumError:
    return SumError(
        f"Cannot use the figures of '{who}': expected finite sums of at least {MIN_CLUSTERS} "
        f"document clusters in each column, got {got}. Ask that contributor to run the same "
        "molora-fed version, or withdraw it."
    )


def _read_count(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"count {value!r}")
    return value


def _read_sums(value: Any) -> tuple[float, float, float]:
    first, second, third = (float(item) for item in value)
    return first, second, third


def measure_moments(
    counts: NDArray[np.float64], columns: Mapping[str, NDArray[np.float64]]
) -> Moments:
    """Sums over the clusters of one domain.

    Args:
        counts: Predicted tokens of each cluster, (C,).
        columns: Sums of a figure per cluster by name, (C,) nats.

    Raises:
        SumError: If there are too few clusters to say sums of.
    """
    if len(counts) < MIN_CLUSTERS:
        raise SumError(
            f"Cannot say sums over documents: expected {MIN_CLUSTERS} document clusters at least, "
            f"so that none can be told from them, got {len(counts)}. Use more text, or fewer "
            "guard samples."
        )
    return Moments(
        clusters=len(counts),
        tokens=float(counts.sum()),
        squares=float(counts @ counts),
        columns={n: (float(x.sum()), float(x @ x), float(x @ counts)) for n, x in columns.items()},
    )


def check_clusters(clusters: int, *, least: int = MIN_CLUSTERS, who: str) -> None:
    """Refuse text of which no sums may be said, before anything is measured on it.

    Args:
        clusters: Document clusters of the text.
        least: How many there must be.
        who: Whose text it is, for errors.

    Raises:
        SumError: If there are too few.
    """
    if clusters < least:
        raise SumError(
            f"Cannot say sums over documents of '{who}': expected {least} document clusters at "
            f"least, so that none can be told from them, got {clusters}. Use more text, or compare "
            "fewer routers and baselines."
        )


def add_by_domain(parts: Sequence[tuple[str, Moments]]) -> dict[str, Moments]:
    """Moments of each domain, its contributors' added up in the order given.

    Args:
        parts: Domain and moments of each contributor, of equal columns.

    Returns:
        By domain, sorted.
    """
    totals: dict[str, Moments] = {}
    for domain, own in parts:
        totals[domain] = totals[domain].add(own) if domain in totals else own
    return dict(sorted(totals.items()))


def estimate(
    domains: Sequence[Moments], names: Sequence[str], factor: float = 1.0
) -> dict[str, float]:
    """Plain mean over domains of a column of each, times a factor, with its interval.

    Args:
        domains: Moments of each domain.
        names: The column that is taken of each.
        factor: What point and ends are multiplied by.

    Returns:
        `point`, and `low` and `high` of the interval by document cluster.

    Source: Cochran, Sampling Techniques, 3rd ed., sections 6.4 and 5.4, as in population/guard.py.
    """
    pairs = list(zip(domains, names, strict=True))
    spread = np.array([own.variance(name) for own, name in pairs])
    freedom = np.array([own.clusters - 1.0 for own in domains])
    squares = float((spread**2 / freedom).sum())
    degrees = float(spread.sum()) ** 2 / squares if squares > 0 else float(freedom.sum())
    error = float(np.sqrt(spread.sum())) / len(pairs)
    point = factor * float(np.mean([own.mean(name) for own, name in pairs]))
    width = abs(factor) * float(stats.t.ppf(0.5 + LEVEL / 2, degrees)) * error
    return {"point": point, "low": point - width, "high": point + width}


@dataclass(frozen=True, eq=False)
class StandIns:
    """Clusters that never were, with the sums of those that are.

    Attributes:
        counts: Predicted tokens of each, (C,).
        domain_of: Index of each one's domain, (C,).
        columns: Sums of a figure by name, (C,) nats.
    """

    counts: NDArray[np.float64]
    domain_of: NDArray[np.int64]
    columns: Mapping[str, NDArray[np.float64]] = field(repr=False)


def build_stand_ins(domains: Sequence[Moments]) -> StandIns:
    """Clusters whose number and sums are these, domain after domain.

    In each domain one cluster takes all the spread of the sizes, which keeps all of them positive;
    of each column what goes with the size lies along the same direction, and the rest between two
    others. Whatever depends on clusters through these sums alone comes out as on the real ones.

    Args:
        domains: One of each domain, at least one, of equal columns.
    """
    counts: list[NDArray[np.float64]] = []
    columns: dict[str, list[NDArray[np.float64]]] = {name: [] for name in domains[0].columns}
    for own in domains:
        size = own.clusters
        along = np.full(size, -1 / math.sqrt(size - 1))
        along[0] = math.sqrt(size - 1)
        across = np.zeros(size)
        across[1], across[2] = math.sqrt(size / 2), -math.sqrt(size / 2)
        spread = math.sqrt(max(0.0, own.squares / size - (own.tokens / size) ** 2))
        counts.append(own.tokens / size + spread * along)
        for name, (total, squares, products) in own.columns.items():
            common = products / size - total * own.tokens / size**2
            slope = common / spread if spread > 0 else 0.0
            rest = squares / size - (total / size) ** 2 - slope**2
            column = total / size + slope * along + math.sqrt(max(0.0, rest)) * across
            columns[name].append(column)
    return StandIns(
        counts=np.concatenate(counts),
        domain_of=np.repeat(np.arange(len(domains)), [own.clusters for own in domains]),
        columns={name: np.concatenate(parts) for name, parts in columns.items()},
    )
