"""Methods against each other on the same held-out text, and what follows for a claim."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from molora_studies.framework.contract import Task, TaskContext
from molora_studies.framework.fusions import load_evaluation
from molora_studies.verdicts import Span, compute_span, name_unit

__all__ = ["Replicated", "compare_methods", "plan_differences", "show_interval"]


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


@dataclass(frozen=True)
class Replicated:
    """A figure measured on trainings of several seeds and on held-out documents.

    Attributes:
        seeds: The figure of each seed.
        documents: Intervals by document cluster: one a seed, or that of the mean over seeds.
        point: The figure of the mean over seeds.
    """

    seeds: Sequence[float]
    documents: Sequence[Span]
    point: float

    @classmethod
    def of_difference(cls, found: Mapping[str, Any]) -> "Replicated":
        """From `differences` of a `plan_differences` result, nats."""
        return cls(found["seeds"], [Span.of(found)], found["point"])

    @classmethod
    def of_seeds(cls, intervals: Sequence[Mapping[str, float]]) -> "Replicated":
        """From `point`, `low` and `high` by document cluster at every seed."""
        points = [each["point"] for each in intervals]
        return cls(points, [Span.of(each) for each in intervals], float(np.mean(points)))

    @property
    def spans(self) -> list[Span]:
        """All intervals that must agree: over seeds, and by document cluster."""
        return [compute_span(self.seeds), *self.documents]

    @property
    def unit(self) -> str:
        """What the verdict is judged over."""
        where = "at every seed" if len(self.documents) == len(self.seeds) else "of the mean"
        return f"{name_unit('training seed', len(self.seeds))}, and document cluster {where}"

    def show(self, unit: str, digits: int = 2) -> str:
        """As text: the point, then its intervals over seeds and over documents."""
        over = ", ".join(span.show(digits) for span in self.documents)
        count = len(self.seeds)
        return (
            f"{self.point:+.{digits}f} {unit} {compute_span(self.seeds).show(digits)} over "
            f"{count} seed{'s' if count > 1 else ''}, {over} over documents"
            f"{' at each' if len(self.documents) > 1 else ''}"
        )


def show_interval(
    interval: Mapping[str, float], unit: str, *, digits: int = 2, sign: bool = True
) -> str:
    """A figure with its interval as text, e.g. "+5.96 % [+5.31, +6.61]"."""
    form = f"{{:{'+' if sign else ''}.{digits}f}}"
    point, low, high = (form.format(interval[key]) for key in ("point", "low", "high"))
    return " ".join(part for part in (point, unit, f"[{low}, {high}]") if part)
