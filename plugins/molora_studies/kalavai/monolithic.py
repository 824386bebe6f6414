"""Pooling the data instead of fusing: one model, at equal cost and along the way there."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from molora_studies.framework.contract import (
    Cell,
    Claim,
    Figure,
    Study,
    StudyOptions,
    Summary,
    Task,
)
from molora_studies.framework.substrate import (
    FusionSettings,
    Member,
    SpecialistSettings,
    plan_fusion,
    plan_mean,
    plan_pooled,
)
from molora_studies.kalavai.baselines import count_parameters
from molora_studies.kalavai.comparisons import Replicated, plan_differences
from molora_studies.kalavai.conditions import ROUTERS
from molora_studies.kalavai.method_table import MethodRow, list_rows, tabulate
from molora_studies.kalavai.rivals import (
    Rival,
    RivalOptions,
    claim_rivals,
    plan_cooperative,
    plan_rivals,
    wide_base,
)
from molora_studies.verdicts import judge_below

__all__ = ["MonolithicOptions", "MonolithicStudy"]


class MonolithicOptions(RivalOptions):
    """Options.

    Attributes:
        rivals: Which are trained for all steps.
        shares: Shares of all specialists' steps at which a monolithic model ends, each a training
            of its own; 1 / N is what a single contributor spends.
    """

    rivals: tuple[Rival, ...] = ("base_continued", "monolithic", "wider")
    shares: tuple[float, ...] = Field(default=(0.25, 0.5))


class MonolithicStudy(Study):
    """The fused model beside one model of the pooled text, by steps."""

    Options: ClassVar[type[StudyOptions]] = MonolithicOptions
    title: ClassVar[str] = "Monolithic training at equal cost"
    measures: ClassVar[tuple[str, ...]] = ("molora_kalavai",)

    @classmethod
    def plan(cls, options: MonolithicOptions) -> Sequence[Cell]:
        """A fusion a seed, the mean, and the differences claims rest on."""
        cells, fusions = [], []
        for seed in options.seeds:
            base, members = plan_cooperative(options, seed)
            settings = FusionSettings(
                routers=ROUTERS,
                calibration=options.calibration,
                held_out=options.held_out,
                seed=seed,
            )
            rivals = {
                **plan_rivals(options, base, members, seed),
                **_plan_shares(options, base, members, seed),
            }
            name = f"seed {seed}"
            fusions.append(
                plan_fusion(f"monolithic, {name}", base, members, settings, baselines=rivals)
            )
            cells.append(Cell(name, {"seed": seed}, fusions[-1]))
        rivals_of = [*options.chosen, *_label_shares(options)]
        pairs = [(f"fused:{label}", rival) for label in ROUTERS for rival in rivals_of]
        return [
            *cells,
            Cell("mean", {}, plan_mean("monolithic, mean", fusions)),
            Cell("differences", {}, plan_differences("monolithic, differences", fusions, pairs)),
        ]

    @classmethod
    def summarise(
        cls, options: MonolithicOptions, results: Mapping[str, Mapping[str, Any]]
    ) -> Summary:
        """Losses by steps, and the paper's comparison."""
        rows = list_rows(results["mean"])
        differences = results["differences"]["differences"]
        steps: dict[str, int] = {
            **dict.fromkeys(map(str, options.chosen), options.total_steps),
            **_label_shares(options),
            **dict.fromkeys(ROUTERS, options.total_steps),
        }
        count, seeds = len(options.domains), len(options.seeds)
        in_turn = {**steps, **dict.fromkeys(ROUTERS, options.steps)}
        return Summary(
            findings={
                "losses_nats": {row.name: dict(row.loss) for row in rows},
                "gain_percent": {row.name: row.alone for row in rows if row.alone},
                "steps": steps,
                "differences_nats": differences,
            },
            claims=_collect_claims(options, differences),
            tables=[
                tabulate(
                    f"Fused and monolithic, mean of {seeds} seeds, 95 % intervals by document "
                    "cluster",
                    rows,
                    {
                        "steps": {name: str(n) for name, n in steps.items()},
                        "steps one after the other": {n: str(s) for n, s in in_turn.items()},
                    },
                )
            ],
            figures=[
                Figure(
                    "steps",
                    "Loss of monolithic models by steps, and of the fused ones at the same total; "
                    "bars are 95 % intervals by document cluster.",
                    lambda figure: _draw(figure, rows, steps),
                )
            ],
            notes=[
                f"Equal cost: {count} specialists of {options.steps} steps, or "
                f"{options.total_steps} steps of one model, the same batch. Contributors train at "
                "the same time.",
                "The same base and held-out documents at all seeds: a seed is another training of "
                "the specialists and of the rivals, and another fit of the routers.",
                *_describe_wider(options),
            ],
        )


def _label_shares(options: MonolithicOptions) -> dict[str, int]:
    """Steps of the shorter monolithic models by name."""
    found = sorted({max(1, round(share * options.total_steps)) for share in options.shares})
    return {f"monolithic-{steps}": steps for steps in found}


def _plan_shares(
    options: MonolithicOptions, base: Task, members: Sequence[Member], seed: int
) -> dict[str, Task]:
    corpora = [member.corpus for member in members]
    return {
        label: plan_pooled(base, corpora, SpecialistSettings(steps=steps, seed=seed))
        for label, steps in _label_shares(options).items()
    }


def _describe_wider(options: MonolithicOptions) -> list[str]:
    if "wider" not in options.chosen:
        return []
    narrow, wide = options.base, wide_base(options)
    own, total = count_parameters(narrow), count_parameters(wide)
    return [
        f"`wider` has D = {wide.hidden} where the base has {narrow.hidden}: {total:,} parameters, "
        f"{total / own:.1f} times the base's, as many as base and specialists together. It was "
        "trained on the base's tokens, then on as many pooled ones as the monolithic model; each "
        f"of its steps costs about {total / own:.1f} times as much. Its recipe is the narrow "
        "base's and was not tuned, so no verdict rests on it."
    ]


_MONOLITHIC = (
    "`monolithic` trains the linear layers alone, with the specialists' kind, rate and batch; by "
    "the sign of all intervals of the paired difference in loss"
)
_CONTINUED = (
    "`base_continued` trains all parameters, embedding, head and norms too, at the specialists' "
    "rate, which was not tuned for it: tuning could only help the winner; by the sign of all "
    "intervals of the paired difference in loss"
)


def _collect_claims(
    options: MonolithicOptions, differences: Mapping[str, Mapping[str, Any]]
) -> list[Claim]:
    found: dict[tuple[str, str], Replicated] = {
        (label, rival): Replicated.of_difference(differences[f"fused:{label} - {rival}"])
        for label in ROUTERS
        for rival in options.chosen
        if f"fused:{label} - {rival}" in differences
    }
    wanted = (
        ("linear", "monolithic",
         "The linear fusion beats monolithic training of the linear layers at equal cost",
         "+7.72 % beside +7.28 %", _MONOLITHIC),
        ("evidence", "monolithic",
         "Our fusion beats monolithic training of the linear layers at equal cost",
         "+7.72 % beside +7.28 %", _MONOLITHIC),
        ("evidence", "base_continued",
         "Our fusion beats continuing all parameters of the base at equal cost",
         "not published", _CONTINUED),
    )  # fmt: skip
    claims = [
        Claim(
            text,
            published,
            f"{label} - {rival}: {found[label, rival].show('nats', 4)}",
            judge_below(found[label, rival].spans),
            found[label, rival].unit,
            reason,
        )
        for label, rival, text, published, reason in wanted
        if (label, rival) in found
    ]
    return claims + claim_rivals({key: found[key] for key in found if key[0] == "evidence"})


def _draw(figure: Any, rows: Sequence[MethodRow], steps: Mapping[str, int]) -> None:
    axes = figure.subplots()
    found = {row.name: row for row in rows if row.name in steps}
    curve = sorted((n for n in found if n.startswith("monolithic")), key=lambda name: steps[name])
    groups = {"monolithic": curve, **{n: [n] for n in found if not n.startswith("monolithic")}}
    for label, names in groups.items():
        losses = [found[name].loss for name in names]
        axes.errorbar(
            [steps[name] for name in names],
            [loss["point"] for loss in losses],
            yerr=[
                [loss["point"] - loss["low"] for loss in losses],
                [loss["high"] - loss["point"] for loss in losses],
            ],
            marker="o",
            capsize=3,
            label=label,
        )
    axes.set_xlabel("optimiser steps in all")
    axes.set_ylabel("equal-weight loss, nats per token")
    axes.legend()
