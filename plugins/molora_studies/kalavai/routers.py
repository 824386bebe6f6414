"""Every router and every baseline on the same held-out text."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from molora_studies.framework.contract import Cell, Figure, Study, StudyOptions, Summary, Table
from molora_studies.framework.substrate import FusionSettings, plan_fusion, plan_mean
from molora_studies.kalavai.comparisons import plan_differences
from molora_studies.kalavai.method_table import MethodRow, draw_gains, list_rows, tabulate
from molora_studies.kalavai.rivals import RivalOptions, plan_cooperative, plan_rivals
from molora_studies.kalavai.router_claims import LINEAR_BASE, collect_claims, list_pairs

__all__ = ["RoutersOptions", "RoutersStudy"]

_LOST_NATS = 0.05
_PUBLISHED = {
    "uniform": "-1.19 %",
    "linear": "",
    "linear-noncausal": "+7.70 %",
    "mlp": "+7.72 %",
    "hard": "+7.72 %",
    "weight_average": "-3.4 %",
}  # arXiv 2603.22755, Pythia-410M, gain on the best specialist


class RoutersOptions(RivalOptions):
    """Options.

    Attributes:
        routers: Options by label, fused as this project does: probability mixture, the base as
            an expert, the collapse guard.
        published: Options by label, fused as published: logit mixture, no base, no guard.
        merges: Merges measured beside.
    """

    routers: Mapping[str, Mapping[str, Any]] = {
        "evidence": {},
        "evidence-one-decay": {"router": "evidence", "decays": [1.0]},
        "evidence-zero": {},
        "evidence-share": {},
        "evidence-hidden": {},
        "evidence-top-2": {"router": "evidence", "top_k": 2},
        "statistics": {},
        "linear": {},
        "linear-curriculum": {"router": "linear", "curriculum": 0.2},
        **LINEAR_BASE,
        "linear-noncausal": {},
        "mlp": {},
        "mlp-base": {"router": "mlp", "input": "base_hidden"},
        "hard": {},
        "dispatch": {},
        "uniform": {},
    }
    published: Mapping[str, Mapping[str, Any]] = {
        "uniform": {},
        "linear": {},
        "linear-noncausal": {},
        "mlp": {},
        "hard": {},
        "evidence": {},
    }
    merges: tuple[str, ...] = ("average", "ties", "dare", "dare-ties")


class RoutersStudy(Study):
    """Two fusions a seed of the same specialists, ours and the paper's form; means over seeds."""

    Options: ClassVar[type[StudyOptions]] = RoutersOptions
    title: ClassVar[str] = "Routers and baselines"
    measures: ClassVar[tuple[str, ...]] = ("molora_kalavai",)

    @classmethod
    def plan(cls, options: RoutersOptions) -> Sequence[Cell]:
        """Cells: a fusion of each form a seed, their means, and the differences claims rest on."""
        forms: dict[str, tuple[Mapping[str, Any], dict[str, Any]]] = {
            "ours": (options.routers, {"merges": options.merges}),
            "as published": (
                options.published,
                {"mixture": "logit", "base_expert": False, "guarded": False},
            ),
        }
        cells = []
        for form, (routers, further) in forms.items():
            fusions = []
            for seed in options.seeds:
                base, members = plan_cooperative(options, seed)
                settings = FusionSettings(
                    routers=routers,
                    calibration=options.calibration,
                    held_out=options.held_out,
                    seed=seed,
                    **further,
                )
                rivals = plan_rivals(options, base, members, seed) if form == "ours" else {}
                name = f"{form} seed {seed}"
                fusions.append(plan_fusion(name, base, members, settings, baselines=rivals))
                cells.append(Cell(name, {"form": form, "seed": seed}, fusions[-1]))
            pairs = list_pairs(form, routers, options.chosen)
            cells += [
                Cell(f"{form}, mean", {"form": form}, plan_mean(f"{form}, mean", fusions)),
                Cell(
                    f"{form}, differences",
                    {"form": form},
                    plan_differences(f"{form}, differences", fusions, pairs),
                ),
            ]
        return cells

    @classmethod
    def summarise(
        cls, options: RoutersOptions, results: Mapping[str, Mapping[str, Any]]
    ) -> Summary:
        """The table of all methods, and the paper's claims on routers and merges."""
        ours = [results[f"ours seed {seed}"] for seed in options.seeds]
        rows = list_rows(results["ours, mean"])
        published = list_rows(results["as published, mean"])
        lost = {label: _count_lost(ours, label, has_base=True) for label in options.routers}
        seconds = {
            label: [float(result["routers"][label]["seconds"]["fit"]) for result in ours]
            for label in options.routers
        }
        domains = len(options.domains) * len(options.seeds)
        main = tabulate(
            f"Every router and baseline, mean of {len(options.seeds)} seeds, "
            "95 % intervals by document cluster",
            rows,
            {
                "domains lost": {label: f"{count} of {domains}" for label, count in lost.items()},
                "fit": {label: _show_seconds(found) for label, found in seconds.items()},
            },
        )
        return Summary(
            findings={
                "losses_nats": {row.name: dict(row.loss) for row in rows},
                "gain_percent": {row.name: row.alone for row in rows if row.alone},
                "domains_lost": lost,
                "as_published": {
                    row.name: {"loss_nats": dict(row.loss), "gain_percent": row.specialist}
                    for row in published
                },
                "differences_nats": {
                    form: results[f"{form}, differences"]["differences"]
                    for form in ("ours", "as published")
                },
                "seconds": {"fit": seconds},
            },
            claims=collect_claims(options, results),
            tables=[main, _tabulate_published(published, len(options.seeds))],
            figures=[
                Figure(
                    "gains",
                    "Gain of every method on the best anyone has alone; bars are 95 % intervals by "
                    "document cluster.",
                    lambda figure: draw_gains(figure, rows),
                )
            ],
            notes=_NOTES,
        )


_NOTES = (
    f"A domain is lost if the fused loss is more than {_LOST_NATS} nats above its best expert's.",
    "Rivals but `joint` take as many steps and tokens as all specialists together; `wider` has as "
    "many parameters as base and specialists and so costs more compute per step; `joint` goes on "
    "from the specialists and sees all domains' text in one place.",
    "Densities of TIES and DARE are fixed beforehand (docs/merges.md); best weights of what is "
    "trained are chosen on validation text; held-out text is read once.",
    "Where routers are fitted on the same states, the first of them pays for pooling these; times "
    "are wall times beside other tasks, judging under the guard included. `bench/fit_routers.py` "
    "measures fits alone.",
)


def _count_lost(results: Sequence[Mapping[str, Any]], label: str, *, has_base: bool) -> int:
    """Domains over all seeds whose fused loss is far above their best expert's."""
    count = 0
    for result in results:
        losses = result["held_out"]
        for domain in losses["domains"]:
            experts = [each[domain] for each in losses["specialists"].values()]
            best = min([*experts, losses["base"][domain]] if has_base else experts)
            count += losses["fused"][label][domain] - best > _LOST_NATS
    return count


def _show_seconds(found: Sequence[float]) -> str:
    """An order of magnitude: pages stay the same when a study is run again."""
    limits = (1, 10, 60)
    return next((f"< {limit} s" for limit in limits if max(found) < limit), f">= {limits[-1]} s")


def _tabulate_published(rows: Sequence[MethodRow], seeds: int) -> Table:
    shown = [row for row in rows if row.kind != "trained"]
    title = f"As published: logit mixture, no base expert, no guard; mean of {seeds} seeds"
    return tabulate(title, shown, {"published, on the best specialist": _PUBLISHED})
