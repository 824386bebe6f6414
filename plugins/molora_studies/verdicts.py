"""Verdicts by intervals over independent replicates, one rule for all studies.

A claim holds only if its interval over independent replicates says so: trainings, sets of
specialists, or conditions that share none. Figures that rest on documents must agree, at every
seed where intervals by document cluster are kept for each, else by that of the mean. Refits on one
set of specialists, tasks at fixed models and conditions that share specialists are no replicates.
See docs/studies.md.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from molora_studies.framework.contract import Verdict

__all__ = [
    "LEVEL",
    "PREVENTION",
    "Span",
    "compute_share",
    "compute_span",
    "join_verdicts",
    "judge_above",
    "judge_below",
    "judge_exists",
    "judge_prevention",
    "judge_within",
    "name_unit",
]

LEVEL = 0.95


@dataclass(frozen=True)
class Span:
    """An interval of a figure, in the figure's unit.

    Attributes:
        low: Lower end; None if there is one replicate only, which has no interval.
        high: Upper end; None likewise.
    """

    low: float | None
    high: float | None

    @classmethod
    def of(cls, interval: Any) -> "Span":
        """The ends of anything with `low` and `high`, as attributes or as keys."""
        if isinstance(interval, Mapping):
            return cls(interval["low"], interval["high"])
        return cls(interval.low, interval.high)

    def show(self, digits: int = 2, *, sign: bool = True) -> str:
        """As text, e.g. "[+5.31, +6.61]"; "no interval" of one replicate."""
        if self.low is None or self.high is None:
            return "no interval"
        form = f"{'+' if sign else ''}.{digits}f"
        return f"[{self.low:{form}}, {self.high:{form}}]"


def compute_span(values: Iterable[float]) -> Span:
    """Student's 95 % interval of the mean of one figure a replicate.

    Args:
        values: One figure an independent replicate; fewer than two have no interval.
    """
    numbers = np.asarray(list(values), dtype=float)
    if len(numbers) < 2:
        return Span(None, None)
    half = float(stats.t.ppf(0.5 + LEVEL / 2, len(numbers) - 1) * stats.sem(numbers))
    mean = float(numbers.mean())
    return Span(mean - half, mean + half)


def compute_share(count: int, total: int) -> Span:
    """Exact 95 % interval of a share of replicates, in [0, 1] (Clopper and Pearson)."""
    if total == 0:
        return Span(0.0, 1.0)
    found = stats.binomtest(count, total).proportion_ci(LEVEL, method="exact")
    return Span(float(found.low), float(found.high))


def judge_above(spans: Sequence[Span], bound: float = 0.0) -> Verdict:
    """Whether a figure lies above a bound: all of its intervals must agree.

    Args:
        spans: Its interval over replicates, and those by document cluster.
        bound: In the figure's unit.

    Returns:
        `holds` if all lie above, `does not hold` if all lie below, else `not decided`, so also if
        one has no ends.
    """
    ends = [(s.low, s.high) for s in spans]
    if ends and all(low is not None and low > bound for low, _ in ends):
        return "holds"
    if ends and all(high is not None and high < bound for _, high in ends):
        return "does not hold"
    return "not decided"


def judge_below(spans: Sequence[Span], bound: float = 0.0) -> Verdict:
    """Whether a figure lies below a bound; as `judge_above`."""
    turned = [
        Span(None if s.high is None else -s.high, None if s.low is None else -s.low) for s in spans
    ]
    return judge_above(turned, -bound)


def judge_within(spans: Sequence[Span], bound: float) -> Verdict:
    """Whether a figure lies within -bound and bound: all of its intervals must agree.

    Args:
        spans: Its interval over replicates, and those by document cluster.
        bound: Largest size that still counts as equal, in the figure's unit.
    """
    sides = (judge_above(spans, -bound), judge_below(spans, bound))
    if sides == ("holds", "holds"):
        return "holds"
    return "does not hold" if "does not hold" in sides else "not decided"


def judge_exists(count: int) -> Verdict:
    """Whether something happens at all: one replicate shows it, none of a few refutes nothing."""
    return "holds" if count else "not decided"


PREVENTION = (
    "holds if no set collapses with it and more do without than chance gives (exact sign test at "
    "5 %), differs if such a test shows that it prevents some; not decided where none collapses "
    "without it, or too few sets were made"
)


def judge_prevention(without: int, with_it: int) -> Verdict:
    """Whether a remedy prevents something, on the same replicates with it and without.

    Args:
        without: Replicates on which it happens without the remedy.
        with_it: On which it happens with it.

    Returns:
        As `PREVENTION` says; `does not hold` if it happens as often with the remedy.
    """
    if not without:
        return "not decided"
    if with_it >= without:
        return "does not hold"
    is_sure = stats.binomtest(without - with_it, without - with_it).pvalue < 1 - LEVEL
    if not is_sure:
        return "not decided"
    return "differs" if with_it else "holds"


def join_verdicts(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict on a claim of several parts: as good as its worst part.

    Raises:
        ValueError: If there is none.
    """
    order: tuple[Verdict, ...] = (
        "does not hold", "differs", "not decided", "not tuned", "by construction", "holds",
    )  # fmt: skip
    return min(verdicts, key=order.index)


def name_unit(what: str, count: int) -> str:
    """The unit of replication with its number, e.g. "training seed (3)"."""
    return f"{what} ({count})"
