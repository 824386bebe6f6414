"""Statistics of paired designs: what an effect is, what could be seen, and when it is null.

Values are one figure a seed, differences between cells of that seed, so that everything seeds share
cancels. Tests are two-sided at 5 % unless said otherwise.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from molora_fed.errors import StudyError
from molora_studies.framework.contract import Verdict

__all__ = [
    "MARGIN_NATS",
    "Effect",
    "adjust_by_holm",
    "aggregate_arithmetic",
    "aggregate_balanced",
    "compute_contrasts",
    "compute_detectable",
    "judge",
    "measure_effect",
]

MARGIN_NATS = 0.005
"""Effects within plus or minus this are as good as none."""

LEVEL = 0.95
POWER = 0.8


@dataclass(frozen=True)
class Effect:
    """A mean of paired differences.

    Attributes:
        mean: Mean over seeds.
        low: Lower end of the 95 % interval, Student's t.
        high: Upper end.
        spread: Standard deviation of the differences.
        count: Number of seeds n.
        t: Student's t of n - 1 degrees of freedom; None if all differences are equal.
        p: Of the two-sided paired t test; 1 for differences all 0, 0 for others all equal.
        detectable: Smallest true effect that this test finds with a power of 80 %, were the
            spread the true one.
        margin: Half width of the zone of equivalence.
        equivalence_p: Of the two one-sided tests against the margin: below 0.05 the effect is
            within it.
    """

    mean: float
    low: float
    high: float
    spread: float
    count: int
    t: float | None
    p: float
    detectable: float
    margin: float
    equivalence_p: float

    @property
    def is_null(self) -> bool:
        """Whether it is shown to lie within the margin."""
        return self.equivalence_p < 1 - LEVEL

    def show(self, digits: int = 4, unit: str = "") -> str:
        """As text, e.g. "+0.0426 [+0.0284, +0.0568]"."""
        form = f"{{:+.{digits}f}}"
        text = f"{form.format(self.mean)} [{form.format(self.low)}, {form.format(self.high)}]"
        return f"{text} {unit}".rstrip()

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "is_null": self.is_null}


def measure_effect(differences: Sequence[float], *, margin: float = MARGIN_NATS) -> Effect:
    """Mean of paired differences with everything that is said about it.

    Args:
        differences: One a seed, two at least.
        margin: Half width of the zone of equivalence, in their unit.

    Raises:
        StudyError: If there are fewer than two, or one is not finite.

    Source: Student's paired t test; equivalence by two one-sided tests (Schuirmann 1987).
    """
    values = np.asarray(list(differences), dtype=float)
    if len(values) < 2 or not np.isfinite(values).all() or not margin > 0:
        raise StudyError(
            "Cannot measure an effect: expected finite differences of two seeds at least and a "
            f"positive margin, got {values.tolist()} and {margin}. Run more seeds."
        )
    mean, count = float(values.mean()), len(values)
    if np.ptp(values) == 0:  # nothing varies: the mean is known as it is
        mean = float(values[0])
        inside = abs(mean) < margin
        return Effect(
            mean, mean, mean, 0.0, count, None, float(mean == 0), 0.0, margin, float(not inside)
        )
    spread = float(values.std(ddof=1))
    error, degrees = spread / math.sqrt(count), count - 1
    half = float(stats.t.ppf(0.5 + LEVEL / 2, degrees)) * error
    t = mean / error
    above = float(stats.t.sf((mean + margin) / error, degrees))  # of an effect <= -margin
    below = float(stats.t.cdf((mean - margin) / error, degrees))
    return Effect(
        mean=mean,
        low=mean - half,
        high=mean + half,
        spread=spread,
        count=count,
        t=t,
        p=float(2 * stats.t.sf(abs(t), degrees)),
        detectable=compute_detectable(spread, count),
        margin=margin,
        equivalence_p=max(above, below),
    )


def compute_detectable(spread: float, count: int) -> float:
    """Smallest true mean that a two-sided paired t test at 5 % finds with a power of 80 %.

    Args:
        spread: True standard deviation of the differences.
        count: Number of pairs n, at least 2.

    Source: power by the noncentral t distribution (Cohen 1988, section 2.2).
    """
    degrees = count - 1
    critical = float(stats.t.ppf(0.5 + LEVEL / 2, degrees))
    # Findings in the wrong direction, fewer than one in a thousand here, are not counted.
    noncentrality = float(special.nctdtrinc(degrees, 1 - POWER, critical))
    return noncentrality * spread / math.sqrt(count)


def adjust_by_holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p values of a family of tests, in the family's order.

    Args:
        p_values: By the effect's name.

    Source: Holm 1979, step-down Bonferroni.
    """
    adjusted: dict[str, float] = {}
    largest = 0.0
    for place, name in enumerate(sorted(p_values, key=lambda key: p_values[key])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def compute_contrasts(
    factors: Sequence[str], cells: Mapping[tuple[bool, ...], Sequence[float]]
) -> dict[str, NDArray[np.float64]]:
    """Main effects and interactions of a full 2^k design, for each seed.

    A main effect is the mean of the cells with the factor less that of the cells without it. The
    interaction of two is half the difference between one's effect with and without the other; and
    so on: each is a sum over all cells, with signs, divided by 2^(k-1).

    Args:
        factors: Names of the k factors.
        cells: One figure a seed of each of the 2^k cells, by which factors are on.

    Returns:
        By name ("router", "router x scope", ...), main effects first, one figure a seed, (n,).

    Raises:
        StudyError: If a cell is missing or has another number of seeds.

    Source: Montgomery, Design and Analysis of Experiments, section 6.3.
    """
    wanted = list(itertools.product((False, True), repeat=len(factors)))
    counts = {len(values) for values in cells.values()}
    if set(cells) != set(wanted) or len(counts) != 1:
        raise StudyError(
            f"Cannot compute contrasts of {', '.join(factors)}: expected all {len(wanted)} cells "
            f"of one number of seeds, got {len(cells)} of {sorted(counts)}. Run what is missing."
        )
    table = np.array([cells[cell] for cell in wanted], dtype=float)  # (2^k, n)
    signs = np.where(np.array(wanted, dtype=bool), 1.0, -1.0)  # (2^k, k)
    found = {}
    for size in range(1, len(factors) + 1):
        for chosen in itertools.combinations(range(len(factors)), size):
            weights = signs[:, list(chosen)].prod(axis=1)
            name = " x ".join(factors[index] for index in chosen)
            found[name] = weights @ table / 2 ** (len(factors) - 1)
    return found


def aggregate_balanced(losses: Mapping[str, float]) -> float:
    """Balanced log-perplexity: the mean over domains of the loss, nats.

    It is the log of the geometric mean of perplexities. Source: arXiv 2605.11153.
    """
    return float(np.mean(list(losses.values())))


def aggregate_arithmetic(losses: Mapping[str, float]) -> float:
    """Log of the arithmetic mean over domains of the perplexity, nats.

    The domain that is worst weighs most, so that it can order two models differently than the
    balanced one does.
    """
    values = np.array(list(losses.values()), dtype=float)
    return float(special.logsumexp(values) - math.log(len(values)))


def judge(effect: Effect, published: float | None, p: float | None = None) -> Verdict:
    """What an effect says about a published one.

    Args:
        effect: Ours.
        published: Theirs, in the same unit; None for a published null.
        p: Adjusted p value; the effect's own if None.

    Returns:
        For a published null: `holds` if ours is shown to lie within the margin, `does not hold` if
        it is significant and not within it. For others: `holds` if ours is significant in that
        direction with the published size in its interval, `differs` if significant with another
        size, `does not hold` if significant the other way or shown to lie within the margin. Else
        `not decided`.
    """
    significant = (effect.p if p is None else p) < 1 - LEVEL
    if published is None:
        if effect.is_null:
            return "holds"
        return "does not hold" if significant else "not decided"
    if significant and effect.mean * published > 0:
        return "holds" if effect.low <= published <= effect.high else "differs"
    return "does not hold" if significant or effect.is_null else "not decided"
