"""The study `acar`: the paper's table on models of our own, its negative results, calibration."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np

from molora_studies.acar.cases import JUDGES
from molora_studies.acar.claims import list_claims
from molora_studies.acar.findings import CONFIGURATIONS, OTHERS, Findings
from molora_studies.acar.measures import Estimate
from molora_studies.acar.recipe import AcarOptions, plan_outcomes
from molora_studies.framework.contract import Cell, Figure, Study, StudyOptions, Summary, Table

__all__ = ["AcarStudy"]

PUBLISHED = {
    "single": (45.4, 17.04),
    "arena-2": (54.4, 20.64),
    "ACAR-U": (55.6, 20.34),
    "arena-3": (63.6, 20.64),
}
"""Accuracy in per cent and cost in dollars, arXiv 2602.21231."""


def list_tables(found: Findings, seeds: Sequence[int]) -> list[Table]:
    """All tables, the most important first."""
    return [
        _tabulate_configurations(found),
        _tabulate_seeds(found, seeds),
        _tabulate_families(found),
        _tabulate_sigma(found),
        _tabulate_escalation(found),
        _tabulate_judges(found),
        _tabulate_attribution(found),
    ]


def _tabulate_configurations(found: Findings) -> Table:
    rows = []
    for name in (*CONFIGURATIONS, *OTHERS):
        right, cost = found.mean(name).scale(100), found.mean(name, "cost")
        published = PUBLISHED.get(name)
        rows.append(
            (
                name,
                right.show(),
                cost.show(2),
                found.difference(name, "single").scale(100).show(sign="+"),
                "" if published is None else f"{published[0]:.1f}",
                "" if published is None else f"{published[1] / PUBLISHED['single'][1]:.2f}",
            )
        )
    return Table(
        "Accuracy and cost, means over seeds, intervals over tasks at fixed models",
        (
            "configuration",
            "right, % [95 %]",
            "relative cost",
            "less single, pp",
            "published, %",
            "published cost",
        ),
        rows,
    )


def _tabulate_seeds(found: Findings, seeds: Sequence[int]) -> Table:
    rows = []
    for place, (seed, one) in enumerate(zip(seeds, found.results, strict=True)):
        alone = [100 * found.mean(f"single {name}").by_seed[place] for name in one["members"]]
        shown = ", ".join(
            f"{name} {share:.1f}" for name, share in zip(one["members"], alone, strict=True)
        )
        figures = [f"{100 * found.mean(name).by_seed[place]:.1f}" for name in CONFIGURATIONS]
        rows.append((str(seed), *figures, shown, one["judge"]))
    return Table(
        "Accuracy of each seed, %",
        ("seed", *CONFIGURATIONS, "members alone, best first by calibration", "judge"),
        rows,
    )


def _tabulate_families(found: Findings) -> Table:
    names = (
        "probe, single_agent",
        "single",
        "arena-2",
        "ACAR-U",
        "calibrated",
        "arena-3",
        "oracle",
    )
    shares = found.by_family(names)
    rows = [(family, *(f"{own[name]:.1f}" for name in names)) for family, own in shares.items()]
    return Table("Accuracy by family, %", ("family", *names), rows)


def _tabulate_sigma(found: Findings) -> Table:
    published = {"0": "32.9", "0.5": "21.3", "1": "45.8"}
    rows = [
        (f"sigma {name}", one.scale(100).show(), published[name])
        for name, one in found.sigma_shares().items()
    ]
    wrong = found.agreement_but_wrong()
    rows += [
        ("agreed but wrong, of all tasks", wrong["of all"].scale(100).show(), ""),
        ("agreed but wrong, of tasks with sigma 0", wrong["of agreed"].scale(100).show(), ""),
        (
            "of tasks with sigma 0, three members answer more",
            wrong["lost"].scale(100).show(),
            "",
        ),
        (
            "of tasks with sigma 0, the calibrated policy answers more",
            wrong["won back"].scale(100).show(),
            "",
        ),
        ("accuracy if all other tasks were right", wrong["ceiling"].scale(100).show(), ""),
    ]
    return Table("Disagreement of the probe, % of tasks", ("", "ours [95 %]", "published"), rows)


def _tabulate_escalation(found: Findings) -> Table:
    rows = []
    calibrated = found.modes_by_family("calibrated")
    for family, own in found.modes_by_family("ACAR-U").items():
        shares = [*own, *calibrated[family]]
        rows.append((family, *(f"{share:.1f}" for share in shares)))
    return Table(
        "Escalation by family, % of tasks",
        ("family", "probe alone", "two", "three", *(f"calibrated: {n}" for n in ("0", "2", "3"))),
        rows,
    )


def _tabulate_judges(found: Findings) -> Table:
    rows = []
    for name in JUDGES:
        arena, rule = f"arena-3 by {name}", f"ACAR-U by {name}"
        rows.append(
            (
                name,
                found.mean(arena).scale(100).show(),
                found.mean(arena, "cost").show(2),
                found.mean(rule).scale(100).show(),
                found.mean(rule, "cost").show(2),
            )
        )
    return Table(
        "Judges",
        ("judge", "arena-3, %", "relative cost", "ACAR-U, %", "relative cost"),
        rows,
    )


def _tabulate_attribution(found: Findings) -> Table:
    arena = found.attribution("arena")
    rows = [
        (name, one.scale(100).show(sign="+"), arena[name].scale(100).show(sign="+"))
        if name in arena
        else (name, one.scale(100).show(sign="+"), "")
        for name, one in found.attribution("cascade").items()
    ]
    for proxy, one in found.proxies().items():
        rows.append((f"rank correlation of {proxy} with the value", "", one.show(3, "+")))
    return Table(
        "Leave-one-out value of each model, pp of accuracy",
        ("model", "in ACAR-U", "in arena-3"),
        rows,
    )


_MODES = ("probe alone", "two members", "three members")


def draw_frontier(
    figure: Any,
    points: Mapping[str, tuple[float, float]],
    lines: Mapping[str, Sequence[tuple[float, float]]],
) -> None:
    """Accuracy against cost: configurations as points, families of policies as lines.

    Args:
        figure: An empty figure.
        points: Cost relative to a single model, and accuracy in per cent.
        lines: The same of policies from the cheapest to the dearest.
    """
    axes = figure.subplots()
    for name, line in lines.items():
        cost, accuracy = zip(*sorted(line), strict=True)
        axes.plot(cost, accuracy, marker=".", linewidth=1.2, label=name)
    for place, (name, point) in enumerate(sorted(points.items(), key=lambda item: item[1])):
        axes.plot(*point, marker="o", linestyle="none", color="black", markersize=4)
        beside = (4, -11 if place % 2 else 5)  # neighbours would write over each other
        axes.annotate(name, point, xytext=beside, textcoords="offset points", fontsize=8)
    axes.set_xlabel("operations, relative to a single model")
    axes.set_ylabel("right answers, %")
    axes.legend()


def draw_escalation(figure: Any, shares: Mapping[str, Sequence[float]]) -> None:
    """How many members each family's tasks were worth, stacked.

    Args:
        figure: An empty figure.
        shares: Per cent of tasks by mode, by family.
    """
    axes = figure.subplots()
    names = list(shares)
    left = np.zeros(len(names))
    for place, mode in enumerate(_MODES):
        widths = np.array([shares[name][place] for name in names])
        axes.barh(names, widths, left=left, label=mode)
        left += widths
    axes.invert_yaxis()
    axes.set_xlabel("tasks, %")
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def draw_accuracy_by_family(figure: Any, shares: Mapping[str, Mapping[str, float]]) -> None:
    """Accuracy of configurations by family.

    Args:
        figure: An empty figure.
        shares: Per cent of right answers by configuration, by family.
    """
    axes = figure.subplots()
    names = list(shares)
    configurations = list(shares[names[0]])
    height = 0.8 / len(configurations)
    for place, configuration in enumerate(configurations):
        at = np.arange(len(names)) + (place - (len(configurations) - 1) / 2) * height
        axes.barh(at, [shares[n][configuration] for n in names], height, label=configuration)
    axes.set_yticks(np.arange(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("right answers, %")
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))


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
        f"{tasks} test tasks of {len(found.families())} families a seed. Intervals of the tables "
        "are 95 %, by bootstrap over tasks within each seed; the seeds' models stay, so they do "
        "not say how other trainings would come out. Verdicts need Student's interval over seeds, "
        "too. Figures by seed are in the JSON file.",
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
