"""Methods against each other on the same held-out text, and what follows for a claim."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from molora_studies.framework.contract import Task, TaskContext, Verdict
from molora_studies.framework.fusions import load_evaluation

__all__ = ["compare_methods", "judge_sign", "judge_within", "plan_differences", "show_interval"]


def plan_differences(name: str, fusions: Sequence[Task], pairs: Sequence[tuple[str, str]]) -> Task:
    """Differences between methods of fusions that differ in seeds only.

    The result holds `differences`, by "METHOD - OTHER": equal-weight loss of the first minus the
    second's, the mean over fusions, `point`, `low` and `high` in nats per token (95 % by document
    cluster), and `seeds`, the difference of each fusion.

    Args:
        name: For people.
        fusions: Fusion tasks on the same held-out blocks.
        pairs: Methods as in `Evaluation.sums`, e.g. ("fused:statistics", "fused:linear").
    """
    return Task(
        name=name,
        action="compare-methods",
        settings={"pairs": [list(pair) for pair in pairs]},
        needs=tuple(fusions),
        seconds=3,
    )


def compare_methods(settings: Mapping[str, Any], context: TaskContext) -> dict[str, Any]:
    """Measure differences; see `plan_differences`."""
    found = [load_evaluation(done.folder) for done in context.needs]
    pairs = [tuple(pair) for pair in settings["pairs"]]
    methods = dict.fromkeys(method for pair in pairs for method in pair)
    mean = replace(
        found[0], sums={m: np.mean([each.sums[m] for each in found], axis=0) for m in methods}
    )
    return {
        "differences": {
            f"{one} - {other}": {
                **mean.difference(one, other),
                "seeds": [each.equal_weight(one) - each.equal_weight(other) for each in found],
            }
            for one, other in pairs
        }
    }


def judge_sign(interval: Mapping[str, float], *, positive: bool) -> Verdict:
    """Whether a figure has the claimed sign, by its interval.

    Args:
        interval: `low` and `high`.
        positive: The claimed sign.
    """
    low, high = (interval["low"], interval["high"])
    if not positive:
        low, high = -high, -low
    return "holds" if low > 0 else "does not hold" if high < 0 else "not decided"


def judge_within(interval: Mapping[str, float], bound: float) -> Verdict:
    """Whether a figure lies within -bound and bound, by its interval.

    Args:
        interval: `low` and `high`, the figure's unit.
        bound: Largest size that still counts as equal, same unit.
    """
    low, high = interval["low"], interval["high"]
    if -bound <= low and high <= bound:
        return "holds"
    return "does not hold" if low > bound or high < -bound else "not decided"


def show_interval(
    interval: Mapping[str, float], unit: str, *, digits: int = 2, sign: bool = True
) -> str:
    """A figure with its interval as text, e.g. "+5.96 % [+5.31, +6.61]"."""
    form = f"{{:{'+' if sign else ''}.{digits}f}}"
    point, low, high = (form.format(interval[key]) for key in ("point", "low", "high"))
    return " ".join(part for part in (point, unit, f"[{low}, {high}]") if part)
