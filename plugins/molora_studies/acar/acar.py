"""The study `acar`: the paper's table on models of our own, its negative results, calibration."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from molora_studies.acar.claims import list_claims
from molora_studies.acar.figures import (
    draw_accuracy_by_family,
    draw_escalation,
    draw_frontier,
)
from molora_studies.acar.findings import CONFIGURATIONS, OTHERS, Findings
from molora_studies.acar.measures import Estimate
from molora_studies.acar.recipe import AcarOptions, plan_outcomes
from molora_studies.acar.tables import list_tables
from molora_studies.framework.contract import Cell, Figure, Study, StudyOptions, Summary

__all__ = ["AcarStudy"]

SHOWN = ("single", "arena-2", "ACAR-U", "arena-3", "oracle")


class AcarStudy(Study):
    """Single, two, three, escalation, oracle: accuracy and cost on tasks nobody trained on."""

    Options: ClassVar[type[StudyOptions]] = AcarOptions
    title: ClassVar[str] = "Escalation by disagreement against fixed ensembles"
    measures: ClassVar[tuple[str, ...]] = ("molora_acar",)

    @classmethod
    def plan(cls, options: AcarOptions) -> Sequence[Cell]:
        """A cell a seed."""
        return [
            Cell(f"seed {seed}", {"seed": seed}, plan_outcomes(options, seed))
            for seed in options.seeds
        ]

    @classmethod
    def summarise(cls, options: AcarOptions, results: Mapping[str, Mapping[str, Any]]) -> Summary:
        """The paper's table and claims, with intervals over tasks."""
        found = Findings([results[f"seed {seed}"] for seed in options.seeds])
        frontier, gains = found.frontiers()
        return Summary(
            findings=_collect(found, frontier, gains),
            claims=list_claims(found, gains),
            tables=list_tables(found, options.seeds),
            figures=_build_figures(found, frontier),
            notes=_list_notes(options, found),
        )


def _collect(
    found: Findings, frontier: Mapping[str, Any], gains: Mapping[str, Estimate]
) -> dict[str, Any]:
    names = [*CONFIGURATIONS, *OTHERS]
    return {
        "accuracy": {name: found.mean(name).to_json() for name in names},
        "relative_cost": {name: found.mean(name, "cost").to_json() for name in names},
        "sigma": {name: one.to_json() for name, one in found.sigma_shares().items()},
        "agreement_but_wrong": {
            name: one.to_json() for name, one in found.agreement_but_wrong().items()
        },
        "leave_one_out": {
            kind: {name: one.to_json() for name, one in found.attribution(kind).items()}
            for kind in ("cascade", "arena")
        },
        "proxies": {name: one.to_json() for name, one in found.proxies().items()},
        "frontier": frontier,
        "area_gains": {name: one.to_json() for name, one in gains.items()},
        "similarity_median": found.similarity(),
        "by_family": found.by_family(SHOWN),
        "chosen": [
            {"members": one["members"], "judge": one["judge"], **one["calibration"]}
            for one in found.results
        ],
    }


def _build_figures(found: Findings, frontier: Mapping[str, Any]) -> list[Figure]:
    shown = (*CONFIGURATIONS, "probe, single_agent", "probe, full_arena")
    points = {
        name: (found.mean(name, "cost").point, 100 * found.mean(name).point) for name in shown
    }
    lines = {name: [(cost, 100 * right) for cost, right in line] for name, line in frontier.items()}
    return [
        Figure(
            "frontier",
            "Right answers against operations, the single model's mean being 1; lines mix policies "
            "at random.",
            partial(draw_frontier, points=points, lines=lines),
        ),
        Figure(
            "escalation",
            "How many members the rule asks, by family.",
            partial(draw_escalation, shares=found.modes_by_family("ACAR-U")),
        ),
        Figure(
            "families",
            "Right answers by family.",
            partial(draw_accuracy_by_family, shares=found.by_family(SHOWN)),
        ),
    ]


def _list_notes(options: AcarOptions, found: Findings) -> list[str]:
    sizes = found.results[0]["parameters"]
    alone = [
        100 * found.mean(f"single {name}").by_seed[place]
        for place, one in enumerate(found.results)
        for name in one["members"]
    ]
    tasks = len(found.results[0]["tasks"]["family"].split())
    return [
        f"{tasks} test tasks of {len(found.families())} families a seed. Intervals are 95 %, by "
        "bootstrap over tasks within each seed; the seeds' models stay, so they do not say how "
        "other trainings would come out. Figures by seed are in the JSON file.",
        f"The probe has {sizes['probe']:,} parameters, a member {sizes['member']:,}. The probe is "
        f"sampled {options.samples} times at temperature {options.temperature:g}, members answer "
        "greedily.",
        f"Members alone are right on {min(alone):.1f} to {max(alone):.1f} % of the tasks, "
        f"{sum(alone) / len(alone):.1f} % on average.",
        "Cost is counted operations, prompts and the judge's scoring included, relative to the "
        "single model's mean of the seed. The published costs are dollars, in which two and three "
        "models cost the same.",
        "The order of members (the first is the single model, the first two are arena-2) and the "
        "calibrated policy are chosen on calibration tasks; recipe, temperature and judge were "
        "chosen on validation tasks and models of another seed. No prompt is in two splits.",
        "The oracle is right wherever the probe's majority or a member alone is, at the price of "
        "the cheapest that is right.",
        "The calibrated policy knows a task's family and lengths, which the plain rule does not; "
        "the one whose families are hidden knows agreement and lengths alone.",
        "A judge by pairs is left out: models of this size cannot compare two answers in words.",
    ]
