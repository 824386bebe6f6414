"""Tables of the study `acar`."""

from collections.abc import Sequence

from molora_studies.acar.cases import JUDGES
from molora_studies.acar.findings import CONFIGURATIONS, OTHERS, Findings
from molora_studies.framework.contract import Table

__all__ = ["list_tables"]

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
        "Accuracy and cost, means over seeds",
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
