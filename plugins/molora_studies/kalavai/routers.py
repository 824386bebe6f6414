"""Every router and every baseline on the same held-out text, held against the paper's claims."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from molora_studies.framework.contract import (
    Cell,
    Claim,
    Figure,
    Study,
    StudyOptions,
    Summary,
    Table,
)
from molora_studies.framework.substrate import FusionSettings, plan_fusion, plan_mean
from molora_studies.kalavai.comparisons import Replicated, plan_differences
from molora_studies.kalavai.merge_tuning import claim_merges, plan_tuned_merges, tabulate_merges
from molora_studies.kalavai.method_table import (
    MethodRow,
    draw_gains,
    list_rows,
    read_gain_interval,
    tabulate,
)
from molora_studies.kalavai.rivals import (
    UNTUNED,
    RivalOptions,
    claim_rivals,
    plan_cooperative,
    plan_rivals,
)
from molora_studies.verdicts import join_verdicts, judge_above, judge_below, judge_within

__all__ = ["RoutersOptions", "RoutersStudy"]

EQUAL_NATS = 0.01
"""Losses closer than this count as equal: a third of a percent of the losses measured here."""

_STATISTICS_NATS = 0.03

LINEAR_BASE: Mapping[str, Mapping[str, Any]] = {
    "linear-base": {"router": "linear", "input": "base_hidden"},
    "linear-base-long": {"router": "linear", "input": "base_hidden", "steps": 2000, "restarts": 2},
    "linear-base-fast": {"router": "linear", "input": "base_hidden", "learning_rate": 0.01},
}
"""Causal linear routers that read what `statistics` reads; the best of them is its measure."""


def list_pairs(
    form: str, routers: Mapping[str, Any], rivals: Sequence[str]
) -> list[tuple[str, str]]:
    """Methods whose differences claims rest on.

    Args:
        form: "ours" or "as published".
        routers: Labels of the routers fused.
        rivals: Models trained beside.
    """
    wanted = {
        "ours": [
            *(("fused:statistics", f"fused:{label}") for label in LINEAR_BASE),
            ("fused:evidence", "fused:linear"),
            ("fused:evidence-hidden", "fused:evidence"),
            *(("fused:evidence", rival) for rival in rivals),
            *(("fused:linear", rival) for rival in rivals),
        ],
        "as published": [
            ("fused:mlp", "fused:linear"),
            ("fused:hard", "fused:linear"),
            ("fused:linear", "fused:linear-noncausal"),
        ],
    }
    known = {f"fused:{label}" for label in routers} | set(rivals)
    return [pair for pair in wanted[form] if set(pair) <= known]


class _Reader:
    """Figures of both forms at every seed."""

    def __init__(self, results: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]) -> None:
        self._results = results
        self._seeds = seeds

    def _evaluations(self, form: str) -> list[Mapping[str, Any]]:
        return [self._results[f"{form} seed {seed}"]["evaluation"] for seed in self._seeds]

    def gain(self, form: str, method: str) -> Replicated | None:
        """Gain on the best specialist in percent, the paper's reference."""
        found = self._evaluations(form)
        if any(method not in each["equal_weight"] for each in found):
            return None
        return Replicated.of_seeds(
            [read_gain_interval(each, method, "best_specialist") for each in found]
        )

    def gap(self, form: str, label: str) -> Replicated | None:
        """Loss above the domain oracle, nats."""
        gaps = [each["oracle_gap_nats"].get(label) for each in self._evaluations(form)]
        return None if None in gaps else Replicated.of_seeds(gaps)

    def difference(self, form: str, one: str, other: str) -> Replicated | None:
        """Loss of one method minus another's, nats."""
        found = self._results[f"{form}, differences"]["differences"].get(f"{one} - {other}")
        return None if found is None else Replicated.of_difference(found)


def collect_claims(
    options: Any,
    results: Mapping[str, Mapping[str, Any]],
) -> list[Claim]:
    """All claims whose methods were measured.

    Args:
        options: The study's options.
        results: Results by cell.
    """
    reader = _Reader(results, options.seeds)
    return [
        *_claim_signs(reader),
        *_claim_equal_routers(reader),
        *_claim_oracle(reader),
        *_claim_statistics(reader),
        *_claim_ours(reader),
    ]


def _claim_signs(reader: _Reader) -> list[Claim]:
    """Who gains and who loses against the best specialist."""
    wanted = (
        ("as published", "fused:uniform", "Equal gates lose", "-1.19 %", False),
        ("as published", "fused:linear-noncausal", "A linear router gains", "+7.70 %", True),
        ("ours", "weight_average", "Averaging weights loses", "-3.4 %", False),
        ("ours", "fused:dispatch", "Dispatch to one specialist loses", "-21.1 % (README)", False),
    )
    claims = []
    for form, method, text, published, positive in wanted:
        gain = reader.gain(form, method)
        if gain is not None:
            judge = judge_above if positive else judge_below
            claims.append(
                Claim(
                    f"{text} against the best specialist",
                    published,
                    gain.show("%"),
                    judge(gain.spans),
                    gain.unit,
                    "by the sign of all intervals; specialists here forget other domains, which "
                    "makes the best specialist easy to beat",
                )
            )
    return claims


def _claim_equal_routers(reader: _Reader) -> list[Claim]:
    parts = {
        label: reader.difference("as published", f"fused:{label}", "fused:linear")
        for label in ("mlp", "hard")
    }
    found = {label: difference for label, difference in parts.items() if difference is not None}
    if not found:
        return []
    return [
        Claim(
            "MLP and hard routing are as good as the linear router",
            "+7.72 % and +7.72 % beside +7.70 %",
            "; ".join(f"{label} - linear: {d.show('nats', 4)}" for label, d in found.items()),
            join_verdicts([judge_within(d.spans, EQUAL_NATS) for d in found.values()]),
            next(iter(found.values())).unit,
            f"equal if all intervals lie within {EQUAL_NATS} nats, all three causal",
        )
    ]


def _claim_oracle(reader: _Reader) -> list[Claim]:
    wanted = (
        ("as published", "linear-noncausal", "The published router reaches the domain oracle",
         "3e-6 nats above"),
        ("ours", "dispatch", "Dispatch to one specialist reaches the domain oracle",
         "equal in a later table"),
    )  # fmt: skip
    claims = []
    for form, label, text, published in wanted:
        gap = reader.gap(form, label)
        if gap is not None:
            better = judge_below(gap.spans) == "holds"
            claims.append(
                Claim(
                    text,
                    published,
                    gap.show("nats", 4),
                    "holds" if better else judge_within(gap.spans, EQUAL_NATS),
                    gap.unit,
                    "better than the oracle" if better else f"equal within {EQUAL_NATS} nats",
                )
            )
    noncausal = reader.difference("as published", "fused:linear", "fused:linear-noncausal")
    if noncausal is not None:
        claims.append(
            Claim(
                "Seeing the whole sequence makes the published router's loss too good",
                "not said: the published gate pools over future tokens",
                f"causal - published: {noncausal.show('nats', 4)}",
                judge_above(noncausal.spans),
                noncausal.unit,
                "holds if the causal form's loss is higher by all intervals",
            )
        )
    return claims


def _claim_statistics(reader: _Reader) -> list[Claim]:
    """Ours: the closed form beside the best linear router on the same states."""
    pairs = {
        label: found
        for label in LINEAR_BASE
        if (found := reader.difference("ours", "fused:statistics", f"fused:{label}")) is not None
    }
    if not pairs:
        return []
    label = max(pairs, key=lambda name: pairs[name].point)
    found = pairs[label]
    return [
        Claim(
            f"`statistics` is within {_STATISTICS_NATS} nats of the best causal linear router on "
            "base_hidden",
            "ours; the prototype was 0.01 to 0.035 nats behind",
            f"statistics - {label}: {found.show('nats', 4)}",
            judge_below(found.spans, _STATISTICS_NATS),
            found.unit,
            f"the best of {len(pairs)} linear routers by held-out loss, which favours it",
        ),
    ]


def _claim_ours(reader: _Reader) -> list[Claim]:
    claims = claim_rivals(
        {
            (label, rival): found
            for label in ("linear", "evidence")
            for rival in UNTUNED
            if (found := reader.difference("ours", f"fused:{label}", rival)) is not None
        }
    )
    hidden = reader.difference("ours", "fused:evidence-hidden", "fused:evidence")
    if hidden is not None:
        claims.append(
            Claim(
                "Hidden states help evidence",
                "ours",
                f"evidence-hidden - evidence: {hidden.show('nats', 4)}",
                judge_below(hidden.spans),
                hidden.unit,
                "by the sign of all intervals of the paired difference in loss",
            )
        )
    return claims


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
        merges: Merges measured beside, with densities and scale as registered; those of TIES and
            DARE are chosen on calibration text, too, in as many tries as there are evidence
            routers.
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
                if form == "ours":
                    tuned = _name_tuned(seed)
                    cells.append(Cell(tuned, {"seed": seed}, plan_tuned_merges(tuned, fusions[-1])))
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
        tuned = [results[_name_tuned(seed)] for seed in options.seeds]
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
                "tuned_merges": [each["merges"] for each in tuned],
            },
            claims=collect_claims(options, results) + claim_merges(tuned),
            tables=[
                main,
                tabulate_merges(tuned),
                _tabulate_published(published, len(options.seeds)),
            ],
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
    "The same base and held-out documents at all seeds: a seed is another training of the "
    "specialists and another fit of the routers.",
    "Rivals but `joint` take as many steps and tokens as all specialists together; `wider` has as "
    "many parameters as base and specialists and so costs more compute per step; `joint` goes on "
    "from the specialists and sees all domains' text in one place.",
    "Not tuned, so without a verdict: `wider` and `joint` (one recipe each, where routers had "
    "several), and the rows of TIES and DARE as registered (density and scale fixed beforehand, "
    "docs/merges.md). Claims are about these with density and scale chosen on calibration text.",
    "All three tuned merges chose the end of what was tried that is nearest to the average of "
    "weights, and come out where it does.",
    "Best weights of what is trained are chosen on validation text; held-out text is read once.",
    "Where routers are fitted on the same states, the first of them pays for pooling these; times "
    "are wall times beside other tasks, judging under the guard included. `bench/fit_routers.py` "
    "measures fits alone.",
)


def _name_tuned(seed: int) -> str:
    return f"tuned merges seed {seed}"


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
