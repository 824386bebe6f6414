"""Whether a guarded lifecycle can hurt, and what the guard does about harm and help it is given."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from molora_fed.population.guard import DELTA_NATS, GuardMode
from molora_studies.evolution.effects import (
    EQUAL_BUDGET,
    read_log_perplexity,
    tabulate_effects,
    to_json,
)
from molora_studies.evolution.guard_findings import (
    BARE,
    HELP,
    WANTED,
    claim_bare,
    claim_guarded,
    claim_planted,
    describe_comparisons,
    make_bounds_figure,
    make_effects_figure,
    measure_harm,
    tabulate_decisions,
    tabulate_seeds,
)
from molora_studies.evolution.substrate import (
    SECONDS_PER_BLOCK,
    SECONDS_PER_STEP,
    EvolutionSettings,
    Lifecycle,
    SubstrateOptions,
    build_lifecycle,
    plan_evolution,
)
from molora_studies.framework.contract import Cell, Study, StudyOptions, Summary, Task
from molora_studies.statistics import Effect, adjust_by_holm, measure_effect

__all__ = ["GuardOptions", "GuardStudy"]

_NONE, _PLANTED = "no lifecycle", "planted operators"


class GuardOptions(SubstrateOptions):
    """Options.

    Attributes:
        vocabularies: The first one is used.
        guard: Which documents guard; "fresh" takes `guard_samples` of at least one a generation.
        deltas: Largest upper bounds of a generation's harm that are kept, nats. Planted operators
            face the first; with the second, the harm of five generations stays within the first.
        divide: Whether a parent keeps only what its newborn does not get.
    """

    seeds: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    vocabularies: tuple[int, ...] = Field(default=(2048,), min_length=1)
    guard: Literal["fresh", "spending"] = "spending"
    deltas: tuple[float, ...] = Field(default=(DELTA_NATS, DELTA_NATS / 5), min_length=1)
    divide: bool = False

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
    measures: ClassVar[tuple[str, ...]] = ("molora_evolution",)

    @classmethod
    def plan(cls, options: GuardOptions) -> Sequence[Cell]:
        """A cell a population and seed, and one for the planted operators of a seed."""
        return [cell for seed in options.seeds for cell in _plan_seed(options, seed)]

    @classmethod
    def summarise(cls, options: GuardOptions, results: Mapping[str, Mapping[str, Any]]) -> Summary:
        """Effects over seeds, each seed by itself, what was kept, and the planted operators."""
        names = [BARE, *(_name_guarded(delta) for delta in options.deltas)]
        effects = {name: _measure(options, results, name) for name in names}
        seeds = {name: _compare_seeds(options, results, name) for name in names}
        asked = {name: _list_comparisons(options, results, name) for name in names[1:]}
        planted = {operator: _list_planted(options, results, operator) for operator in WANTED}
        decisions = {
            name: describe_comparisons(found, helps=name == HELP)
            for name, found in {**asked, **planted}.items()
        }
        return Summary(
            findings={
                "effects": to_json(effects),
                "seeds": seeds,
                "decisions": decisions,
            },
            claims=[
                claim_bare(effects[BARE]),
                *(claim_guarded(name, effects[name], seeds[name]) for name in names[1:]),
                *(
                    claim_planted(
                        operator,
                        decisions[operator],
                        _share_right(options, results, operator),
                        options.deltas[0],
                    )
                    for operator in WANTED
                ),
            ],
            tables=[
                tabulate_effects("Effect on balanced held-out log-perplexity", effects),
                tabulate_decisions(decisions),
                *(tabulate_seeds(name, seeds[name]) for name in names),
            ],
            figures=[
                make_effects_figure(effects),
                make_bounds_figure({names[1]: asked[names[1]], **planted}, options.deltas[0]),
            ],
            notes=[EQUAL_BUDGET, *_NOTES, *([_DIVIDED] if options.divide else [])],
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
    "exact binomial intervals do not know of; so a verdict needs the interval over seeds, too.",
    "A harm within delta may be kept, and kept ones add up: the last columns of the decisions say "
    "how often harm of half of delta, and of delta, would be kept at such errors. Planted harm was "
    "several times delta; nothing was planted near it.",
)  # fmt: skip


_DIVIDED = "A parent keeps only the half of its product that its newborn does not get."


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

    kept = replace(plan(_NONE, (), "off", DELTA_NATS), action="evolve-and-keep")

    def follow(task: Task, action: str, branches: int, passes: int) -> Task:
        return replace(
            task,
            action=action,
            needs=(*task.needs, kept),
            seconds=_estimate(options, branches, passes),
        )

    rounds, lifecycle = options.generations, build_lifecycle(divide=options.divide)
    bare = follow(plan(BARE, lifecycle, "off", DELTA_NATS), "evolve-beside", rounds, 0)
    cells = [
        Cell(_name(_NONE, seed), {"what": _NONE, "seed": seed}, kept),
        Cell(_name(BARE, seed), {"what": BARE, "seed": seed}, bare),
    ]
    for delta in options.deltas:
        name = _name_guarded(delta)
        task = plan(name, lifecycle, options.guard, delta)
        # Twins are known until a lifecycle is kept: on average, say, every second one.
        guarded = follow(task, "evolve-beside", 3 * rounds // 2, 2 * rounds)
        cells.append(Cell(_name(name, seed), {"what": name, "delta": delta, "seed": seed}, guarded))
    task = plan(_PLANTED, (), options.guard, options.deltas[0])
    planted = follow(task, "plant-operators", 2 * rounds, 4 * rounds)
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


def _list_comparisons(
    options: GuardOptions, results: Mapping[str, Mapping[str, Any]], name: str
) -> list[Mapping[str, Any]]:
    return [one for seed in options.seeds for one in results[_name(name, seed)]["comparisons"]]


def _list_planted(
    options: GuardOptions, results: Mapping[str, Mapping[str, Any]], operator: str
) -> list[Mapping[str, Any]]:
    return [one for seed in options.seeds for one in _list_planted_at(results, operator, seed)]


def _list_planted_at(
    results: Mapping[str, Mapping[str, Any]], operator: str, seed: int
) -> list[Mapping[str, Any]]:
    return [
        one["comparison"]
        for one in results[_name(_PLANTED, seed)]["planted"]
        if one["operator"] == operator
    ]


def _share_right(
    options: GuardOptions, results: Mapping[str, Mapping[str, Any]], operator: str
) -> list[float]:
    """Share of right decisions on a planted operator at every seed."""
    shares = []
    for seed in options.seeds:
        found = describe_comparisons(
            _list_planted_at(results, operator, seed), helps=operator == HELP
        )
        shares.append(float(found["right"]["share"] or 0.0))
    return shares
