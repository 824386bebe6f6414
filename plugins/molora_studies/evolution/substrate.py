"""The substrate of the population's studies, as tasks: bases of width 96, contexts of 64 tokens.

A replicate is the whole way at one seed: base, specialists, population, router, data order and
lifecycle. Corpora and vocabulary are the same at all seeds. Nothing is computed here:
`molora_studies.evolution.substrate_actions` does the work.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from molora_fed.population.guard import DELTA_NATS, GuardMode
from molora_studies.framework.contract import StudyOptions, Task
from molora_studies.framework.substrate import (
    BaseSettings,
    SpecialistSettings,
    plan_base,
    plan_corpus,
    plan_specialist,
)

__all__ = [
    "LIFECYCLE",
    "NEW_ROUTER",
    "OLD_ROUTER",
    "EvolutionSettings",
    "Lifecycle",
    "SubstrateOptions",
    "build_lifecycle",
    "plan_evolution",
]


OLD_ROUTER, NEW_ROUTER = "softmax-embedding-mean", "parallel-sigmoid"

Lifecycle = tuple[tuple[str, Mapping[str, Any]], ...]
"""Registered operators with their options, in order."""


def build_lifecycle(alpha: float = 0.5, *, divide: bool = False) -> Lifecycle:
    """The whole lifecycle: the least fit dies in every generation, and its slot is refilled.

    The threshold is above any fitness, so that all scopes and routers have equally many deaths
    and a scope decides who dies, not how many.

    Args:
        alpha: Share of the parent's product in the newborn's.
        divide: Whether the parent keeps the rest only.
    """
    return (
        ("death", {"threshold": 100.0, "patience": 1, "min_age": 1, "at_most": 1}),
        ("slot-reallocation", {}),
        ("inheritance", {"alpha": alpha, "divide": True} if divide else {"alpha": alpha}),
        ("svd-mutation", {"values": 0.1, "vectors": 0.1}),
    )


LIFECYCLE = build_lifecycle()

# Measured at the default sizes, seconds of one core.
SECONDS_PER_STEP = 0.048  # of adaptation
SECONDS_PER_BLOCK = 0.002  # of measuring losses


class SubstrateOptions(StudyOptions):
    """Options of all studies on this substrate.

    Attributes:
        seeds: Replicates.
        domains: Domains of base, specialists and population.
        hidden: D of the base.
        layers: L of the base.
        block_size: T.
        vocabularies: V of the bases; D / V is what the paper's substrate is told by.
        base_steps: Optimiser steps of the base.
        specialist_steps: Optimiser steps of a specialist.
        slots: P; those beyond the specialists are fresh.
        rank: R of every slot.
        start_steps: Adaptation steps before the first generation.
        generations: G.
        steps: Adaptation steps of a generation.
        train_blocks: Blocks of each domain that adaptation draws from.
        calibration: Calibration blocks of each domain, shared by fitness and guard.
        guard_samples: Disjoint guard samples; the guard "fresh" takes one a generation.
        held_out: Held-out blocks of each domain.
    """

    seeds: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    domains: tuple[str, ...] = Field(default=("cpp", "python", "readme", "science"), min_length=2)
    hidden: int = 96
    layers: int = 3
    block_size: int = 64
    vocabularies: tuple[int, ...] = Field(default=(2048, 1024), min_length=1)
    base_steps: int = 1500
    specialist_steps: int = 200
    slots: int = 8
    rank: int = 8
    start_steps: int = 250
    generations: int = 5
    steps: int = 150
    train_blocks: int = 1000
    calibration: int = 160
    guard_samples: int = 1
    held_out: int = 200


class EvolutionSettings(BaseModel):
    """How a population of the substrate is evolved.

    Attributes:
        router: Registered adapter router.
        router_options: Its options.
        scope: Registered fitness scope.
        lifecycle: Operators; none leaves adaptation alone.
        guard: Which documents guard; "off" measures the bare lifecycle.
        delta: Largest upper bound of the harm that the guard keeps, nats.
        batch: Blocks per step, equally many of every domain.
        learning_rate: Peak rate of the slots' factors.
        router_learning_rate: Peak rate of the router.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    router: str = NEW_ROUTER
    router_options: Mapping[str, Any] = {}
    scope: str = "global"
    lifecycle: Lifecycle = ()
    guard: GuardMode = "off"
    # Left out where usual: keys of populations from before there was a choice do not know of it.
    delta: float = Field(default=DELTA_NATS, exclude_if=lambda delta: delta == DELTA_NATS)
    batch: int = 8
    learning_rate: float = 1e-3
    router_learning_rate: float = 1e-2


def _plan_base(options: SubstrateOptions, vocabulary: int, seed: int) -> Task:
    return plan_base(
        BaseSettings(
            domains=options.domains,
            hidden=options.hidden,
            layers=options.layers,
            vocab_size=vocabulary,
            steps=options.base_steps,
            batch=8,
            seed=seed,
            block_size=options.block_size,
            threads=1,
        )
    )


def _plan_states(options: SubstrateOptions, name: str, base: Task, corpora: Sequence[Task]) -> Task:
    """The base's states over all blocks of a replicate, shared by its populations."""
    settings = {
        "train_blocks": options.train_blocks,
        "calibration": options.calibration,
        "held_out": options.held_out,
        "guard_samples": options.guard_samples,
    }
    blocks = options.train_blocks + 2 * options.calibration + options.held_out
    return Task(
        f"states {name}",
        "make-states",
        settings,
        (base, *corpora),
        seconds=2 + 0.0015 * blocks * len(corpora),
    )


def _estimate(options: SubstrateOptions) -> float:
    """Seconds of one population on one quiet core."""
    total = options.start_steps + options.generations * options.steps
    fitness = options.generations * (options.slots + 1) * 0.4 * options.calibration
    blocks = (fitness + options.held_out) * len(options.domains)
    return 8 + SECONDS_PER_STEP * total + SECONDS_PER_BLOCK * blocks


def plan_evolution(
    options: SubstrateOptions,
    settings: EvolutionSettings,
    *,
    seed: int,
    vocabulary: int,
    perturbation: float = 0.0,
    label: str = "population",
) -> Task:
    """One population evolved at one seed; the result has its held-out losses.

    A population without a lifecycle measures its fitness as often as others do, and nothing reads
    it: its scope is `global` whatever is asked for, so that cells that differ in the scope alone
    are one task.

    Args:
        options: The substrate.
        settings: How it is evolved.
        seed: Of the replicate.
        vocabulary: V of the base.
        perturbation: Relative size of noise on the base's matrices, which the specialists have
            never seen; 0 leaves the base.
        label: For people.
    """
    if not settings.lifecycle:
        settings = settings.model_copy(update={"scope": "global"})
    base = _plan_base(options, vocabulary, seed)
    # The vocabulary does not depend on the seed: blocks are made once for all bases.
    first = _plan_base(options, vocabulary, options.seeds[0])
    corpora = [plan_corpus(first, domain) for domain in options.domains]
    recipe = SpecialistSettings(
        kind="lora", rank=options.rank, steps=options.specialist_steps, batch=8, seed=seed
    )
    specialists = [plan_specialist(base, corpus, recipe) for corpus in corpora]
    name = f"V={vocabulary} seed {seed}"
    if perturbation:
        name += f" noise {perturbation:g}"
        base = Task(
            f"base {name}",
            "perturb-base",
            {"relative": perturbation, "seed": seed},
            (base,),
            seconds=3,
        )
    states = _plan_states(options, name, base, corpora)
    return Task(
        f"{label} {name}",
        "evolve-population",
        {
            "evolution": settings.model_dump(mode="json"),
            "slots": options.slots,
            "rank": options.rank,
            "start_steps": options.start_steps,
            "generations": options.generations,
            "steps": options.steps,
            "seed": seed,
            "corpora": len(corpora),
        },
        (base, states, *corpora, *specialists),
        seconds=_estimate(options),
    )
