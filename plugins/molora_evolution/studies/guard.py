"""Whether a guarded lifecycle can hurt, and what the guard does about harm and help it is given."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator
from scipy import stats

from molora_evolution.statistics import (
    MARGIN_NATS,
    Effect,
    adjust_by_holm,
    judge,
    measure_effect,
)
from molora_evolution.studies.effects import (
    EQUAL_BUDGET,
    draw_effects,
    read_log_perplexity,
    tabulate_effects,
    to_json,
)
from molora_evolution.studies.substrate import (
    LIFECYCLE,
    SECONDS_PER_BLOCK,
    SECONDS_PER_STEP,
    EvolutionSettings,
    Lifecycle,
    SubstrateOptions,
    plan_evolution,
)
from molora_fed.population.guard import DELTA_NATS, GuardMode, compare_branches
from molora_fed.studies.contract import (
    Cell,
    Claim,
    Figure,
    Study,
    StudyOptions,
    Summary,
    Table,
    Task,
    Verdict,
)

__all__ = ["GuardOptions", "GuardStudy", "measure_harm"]

_ACTIONS = "molora_evolution.studies.guard_actions"
_LEVEL = 0.95
_NONE, _BARE, _PLANTED = "no lifecycle", "bare lifecycle", "planted operators"
_PUBLISHED_LIFECYCLE = -0.028  # arXiv 2605.11153: nats of balanced log-perplexity, n = 3
_WANTED = {"ruin": 0.95, "restore": 0.5}  # shares that are to be decided rightly


class GuardOptions(SubstrateOptions):
    """Options.

    Attributes:
        vocabularies: The first one is used.
        guard: Which documents guard; "fresh" takes `guard_samples` of at least one a generation.
        deltas: Largest upper bounds of the harm that are kept, nats; planted operators face the
            first.
    """

    seeds: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    vocabularies: tuple[int, ...] = Field(default=(2048,), min_length=1)
    guard: Literal["fresh", "spending"] = "spending"
    deltas: tuple[float, ...] = Field(default=(DELTA_NATS, 0.0), min_length=1)

    @model_validator(mode="after")
    def _has_samples(self) -> Self:
        if self.guard == "fresh" and self.guard_samples < self.generations:
            raise ValueError(
                f"guard 'fresh' needs {self.generations} guard samples, not {self.guard_samples}"
            )
        return self


class GuardStudy(Study):
    """No lifecycle, the bare one, and guarded ones at every seed; and planted operators."""

    Options: ClassVar[type[StudyOptions]] = GuardOptions
    title: ClassVar[str] = "What the guard of a lifecycle keeps"

    @classmethod
    def plan(cls, options: GuardOptions) -> Sequence[Cell]:
        """A cell a population and seed, and one for the planted operators of a seed."""
        return [cell for seed in options.seeds for cell in _plan_seed(options, seed)]

    @classmethod
    def summarise(cls, options: GuardOptions, results: Mapping[str, Mapping[str, Any]]) -> Summary:
        """Effects over seeds, each seed by itself, what was kept, and the planted operators."""
        names = [_BARE, *(_name_guarded(delta) for delta in options.deltas)]
        effects = {name: _measure(options, results, name) for name in names}
        seeds = {name: _compare_seeds(options, results, name) for name in names}
        decisions = {name: _count_kept(options, results, name) for name in names[1:]}
        planted = {operator: _read_planted(options, results, operator) for operator in _WANTED}
        return Summary(
            findings={
                "effects": to_json(effects),
                "seeds": seeds,
                "decisions": decisions,
                "planted": planted,
            },
            claims=[
                _claim_bare(effects[_BARE]),
                *(_claim_guarded(name, effects[name], seeds[name]) for name in names[1:]),
                *(_claim_planted(operator, found) for operator, found in planted.items()),
            ],
            tables=[
                tabulate_effects("Effect on balanced held-out log-perplexity", effects),
                _tabulate_decisions(decisions, planted),
                *(_tabulate_seeds(name, seeds[name]) for name in names),
            ],
            figures=[_draw_effects(effects), _draw_bounds(options, results)],
            notes=[EQUAL_BUDGET, *_NOTES],
        )


_NOTES = (
    "An effect is the loss without a lifecycle less the loss with it, nats; above 0 is better. A "
    "seed is a replicate of everything but the documents, which are the same at all seeds.",
    "New router, per-domain scope, one death in every generation. Guard documents are calibration "
    "text that neither adaptation nor fitness has seen; held-out blocks are read once, at the end.",
    "A seed's p is one-sided, of harm, by document cluster on held-out blocks (Student's t of the "
    "ratio estimate); Holm's correction is over the seeds of a table.",
    "Planted operators get a generation's whole adaptation, as their twins do, in each generation "
    "of the population without a lifecycle; their comparisons are at the level of a guard that was "
    "asked in every generation before. Those of one seed share documents and a history, which the "
    "exact binomial intervals do not know of.",
)  # fmt: skip


def _name_guarded(delta: float) -> str:
    return f"guarded lifecycle, delta {delta:g}"


def _name(what: str, seed: int) -> str:
    return f"{what} seed {seed}"


def _plan_seed(options: GuardOptions, seed: int) -> list[Cell]:
    def plan(name: str, lifecycle: Lifecycle, guard: GuardMode, delta: float) -> Task:
        settings = EvolutionSettings(
            scope="per-domain", lifecycle=lifecycle, guard=guard, delta=delta
        )
        vocabulary = options.vocabularies[0]
        return plan_evolution(options, settings, seed=seed, vocabulary=vocabulary, label=name)

    kept = replace(plan(_NONE, (), "off", DELTA_NATS), action=f"{_ACTIONS}:evolve_and_keep")

    def follow(task: Task, action: str, branches: int, passes: int) -> Task:
        return replace(
            task,
            action=f"{_ACTIONS}:{action}",
            needs=(*task.needs, kept),
            seconds=_estimate(options, branches, passes),
        )

    rounds = options.generations
    bare = follow(plan(_BARE, LIFECYCLE, "off", DELTA_NATS), "evolve_beside", rounds, 0)
    cells = [
        Cell(_name(_NONE, seed), {"what": _NONE, "seed": seed}, kept),
        Cell(_name(_BARE, seed), {"what": _BARE, "seed": seed}, bare),
    ]
    for delta in options.deltas:
        name = _name_guarded(delta)
        task = plan(name, LIFECYCLE, options.guard, delta)
        # Twins are known until a lifecycle is kept: on average, say, every second one.
        guarded = follow(task, "evolve_beside", 3 * rounds // 2, 2 * rounds)
        cells.append(Cell(_name(name, seed), {"what": name, "delta": delta, "seed": seed}, guarded))
    task = plan(_PLANTED, (), options.guard, options.deltas[0])
    planted = follow(task, "plant_operators", 2 * rounds, 4 * rounds)
    cells.append(Cell(_name(_PLANTED, seed), {"what": _PLANTED, "seed": seed}, planted))
    return cells


def _estimate(options: GuardOptions, branches: int, passes: int) -> float:
    """Seconds of a task beside the population without a lifecycle, on one quiet core.

    Args:
        options: The substrate.
        branches: Branches adapted for a generation.
        passes: Branches measured on guard blocks.
    """
    fitness = options.generations * (options.slots + 1) * 0.4 * options.calibration
    guard = passes * 0.8 * options.calibration / options.guard_samples
    blocks = (fitness + guard + options.held_out) * len(options.domains)
    return 5 + SECONDS_PER_STEP * branches * options.steps + SECONDS_PER_BLOCK * blocks


def _measure(options: GuardOptions, results: Mapping[str, Mapping[str, Any]], name: str) -> Effect:
    """Reduction of log-perplexity against no lifecycle, over seeds."""
    return measure_effect(
        [
            read_log_perplexity(results[_name(_NONE, seed)])
            - read_log_perplexity(results[_name(name, seed)])
            for seed in options.seeds
        ]
    )


def measure_harm(with_it: Mapping[str, Any], without: Mapping[str, Any]) -> dict[str, float]:
    """Harm of a lifecycle at one seed, by document cluster.

    Args:
        with_it: `clusters` of the population with the lifecycle.
        without: The same of the one without.

    Returns:
        `effect`, nats, above 0 where the lifecycle helps; its `error`; and `p`, one-sided, of no
        harm.
    """
    found = compare_branches(
        np.asarray(with_it["sums"], dtype=float),
        np.asarray(without["sums"], dtype=float),
        np.asarray(without["tokens"], dtype=float),
        np.asarray(without["domain"], dtype=np.int64),
    )
    if found.error == 0:  # bit for bit the same population
        p = float(found.difference <= 0)
    else:
        p = float(stats.t.sf(found.difference / found.error, found.degrees))
    return {"effect": -found.difference, "error": found.error, "p": p}


def _compare_seeds(
    options: GuardOptions, results: Mapping[str, Mapping[str, Any]], name: str
) -> list[dict[str, Any]]:
    rows = []
    for seed in options.seeds:
        own, none = results[_name(name, seed)], results[_name(_NONE, seed)]
        harm = measure_harm(own["clusters"], none["clusters"])
        rows.append({"seed": seed, **harm, "births": own["births"], "kept": sum(own["kept"])})
    adjusted = adjust_by_holm({str(row["seed"]): row["p"] for row in rows})
    return [{**row, "p_holm": adjusted[str(row["seed"])]} for row in rows]


def _describe_share(count: int, total: int) -> dict[str, Any]:
    """A share of decisions with its exact interval (Clopper and Pearson)."""
    if total == 0:
        return {"count": 0, "total": 0, "share": None, "low": 0.0, "high": 1.0}
    interval = stats.binomtest(count, total).proportion_ci(_LEVEL, method="exact")
    return {
        "count": count,
        "total": total,
        "share": count / total,
        "low": float(interval.low),
        "high": float(interval.high),
    }


def _describe_comparisons(comparisons: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What became of some comparisons, kept or not."""
    kept = _describe_share(sum(bool(one["kept"]) for one in comparisons), len(comparisons))
    if not comparisons:
        return {"kept": kept, "difference": None, "error": None, "idle": None}
    idle = [
        stats.t.cdf(one["delta"] / one["error"] - stats.t.ppf(one["level"], one["degrees"]),
                    one["degrees"])
        for one in comparisons
        if one["error"] > 0
    ]  # fmt: skip
    return {
        "kept": kept,
        "difference": float(np.mean([one["difference"] for one in comparisons])),
        "error": float(np.mean([one["error"] for one in comparisons])),
        "idle": float(np.mean(idle)) if idle else 1.0,
    }


def _count_kept(
    options: GuardOptions, results: Mapping[str, Mapping[str, Any]], name: str
) -> dict[str, Any]:
    return _describe_comparisons(
        [one for seed in options.seeds for one in results[_name(name, seed)]["comparisons"]]
    )


def _list_planted(
    options: GuardOptions, results: Mapping[str, Mapping[str, Any]], operator: str
) -> list[Mapping[str, Any]]:
    return [
        one["comparison"]
        for seed in options.seeds
        for one in results[_name(_PLANTED, seed)]["planted"]
        if one["operator"] == operator
    ]


def _read_planted(
    options: GuardOptions, results: Mapping[str, Mapping[str, Any]], operator: str
) -> dict[str, Any]:
    comparisons = _list_planted(options, results, operator)
    found = _describe_comparisons(comparisons)
    right = sum(one["kept"] == (operator == "restore") for one in comparisons)
    return {**found, "right": _describe_share(right, len(comparisons))}


def _show_share(found: Mapping[str, Any]) -> str:
    if found["share"] is None:
        return "none asked"
    return (
        f"{found['count']} of {found['total']}, {100 * found['share']:.0f} % "
        f"[{100 * found['low']:.0f}, {100 * found['high']:.0f}]"
    )


def _claim_bare(effect: Effect) -> Claim:
    return Claim(
        "The bare lifecycle harms",
        "-0.028 nats, t = -4.46, p = 0.047, n = 3",
        f"{effect.show()} nats, p = {effect.p:.2g}, n = {effect.count}; detectable "
        f"{effect.detectable:.4f}",
        judge(effect, _PUBLISHED_LIFECYCLE),
        "holds if significant with the published size in the interval, differs if significant "
        "with another size; does not hold if the other way or shown to lie within 0.005 nats",
    )


def _claim_guarded(name: str, effect: Effect, seeds: Sequence[Mapping[str, Any]]) -> Claim:
    worse = [str(row["seed"]) for row in seeds if row["p_holm"] < 1 - _LEVEL]
    verdict: Verdict = "not decided"
    if worse or effect.high < -MARGIN_NATS:
        verdict = "does not hold"
    elif effect.low >= -MARGIN_NATS:
        verdict = "holds"
    return Claim(
        f"It does not with a guard ({name})",
        "none: the paper has no guard",
        f"{effect.show()} nats, n = {effect.count}; seeds significantly worse (Holm): "
        f"{', '.join(worse) or 'none'}",
        verdict,
        f"holds if the interval's lower end is at least -{MARGIN_NATS} nats and no seed is "
        "significantly worse; does not hold if a seed is, or the whole interval is below",
    )


def _claim_planted(operator: str, found: Mapping[str, Any]) -> Claim:
    right, wanted = found["right"], _WANTED[operator]
    what = "refuses harm" if operator == "ruin" else "keeps help"
    share = right["share"]
    return Claim(
        f"The guard {what} that is planted, at least {100 * wanted:.0f} % of the time",
        "none: the paper has no guard",
        f"{_show_share(right)}; mean difference {found['difference']:+.4f} nats",
        "holds" if share is not None and share >= wanted else "does not hold",
        "holds if the share of right decisions is at least that",
    )


def _tabulate_decisions(
    decisions: Mapping[str, Mapping[str, Any]], planted: Mapping[str, Mapping[str, Any]]
) -> Table:
    def show(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return Table(
        "What the guard decided",
        (
            "lifecycle",
            "kept [95 %]",
            "mean difference, nats",
            "mean standard error",
            "kept were there no difference, %",
        ),
        [
            (
                name,
                _show_share(found["kept"]),
                show(found["difference"], "+.5f"),
                show(found["error"], ".5f"),
                show(None if found["idle"] is None else 100 * found["idle"], ".0f"),
            )
            for name, found in {
                **decisions,
                **{f"planted: {operator}": found for operator, found in planted.items()},
            }.items()
        ],
    )


def _tabulate_seeds(name: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    return Table(
        f"Seeds by themselves: {name}",
        ("seed", "effect, nats", "standard error", "p of harm", "p (Holm)", "newborns", "kept"),
        [
            (
                str(row["seed"]),
                f"{row['effect']:+.5f}",
                f"{row['error']:.5f}",
                f"{row['p']:.3g}",
                f"{row['p_holm']:.3g}",
                str(row["births"]),
                str(row["kept"]),
            )
            for row in rows
        ],
    )


def _draw_effects(effects: Mapping[str, Effect]) -> Figure:
    return Figure(
        "effects",
        "Effect of the lifecycle on balanced held-out log-perplexity, bare and guarded; bars are "
        "95 % intervals over seeds, the band is the margin.",
        partial(
            draw_effects,
            effects={"against no lifecycle": effects},
            published={_BARE: _PUBLISHED_LIFECYCLE},
            margin=MARGIN_NATS,
        ),
    )


def _draw_bounds(options: GuardOptions, results: Mapping[str, Mapping[str, Any]]) -> Figure:
    name = _name_guarded(options.deltas[0])
    families = {
        "lifecycle": [
            one for seed in options.seeds for one in results[_name(name, seed)]["comparisons"]
        ],
        **{f"planted: {operator}": _list_planted(options, results, operator)
           for operator in _WANTED},
    }  # fmt: skip

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for place, family in enumerate(families.values()):
            heights = place + np.linspace(-0.3, 0.3, len(family))
            differences = [one["difference"] for one in family]
            reach = [one["bound"] - one["difference"] for one in family]
            axes.errorbar(
                differences,
                heights,
                xerr=[np.zeros(len(family)), reach],
                fmt="o",
                markersize=3,
                linewidth=1,
            )
        axes.axvline(options.deltas[0], linestyle="--", linewidth=1)
        axes.set_xscale("symlog", linthresh=0.002)
        axes.set_yticks(range(len(families)), list(families))
        axes.invert_yaxis()
        axes.set_xlabel("loss of the lifecycle branch less its twin's, nats")

    return Figure(
        "bounds",
        "Comparisons of the guard: difference on guard documents and, by the bar, its upper bound; "
        f"kept where the bound is left of the dashed line at {options.deltas[0]:g} nats.",
        draw,
    )
