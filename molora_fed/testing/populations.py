"""Populations, fitness and losses without a model: two small layers, mixed ranks."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike

from molora_fed.adapters.updates import LinearUpdate
from molora_fed.population.contract import (
    Birth,
    Fitness,
    LifecycleState,
    LossTable,
    Population,
    Slot,
)

__all__ = [
    "POPULATION_DOMAINS",
    "POPULATION_SHAPES",
    "build_fitness",
    "build_lifecycle_state",
    "build_loss_table",
    "build_population",
    "build_update",
]

POPULATION_SHAPES: Mapping[str, tuple[int, int]] = {"block.0.up": (7, 5), "block.1.down": (5, 8)}
"""(D_out, D_in) of the made-up base's linear layers."""

POPULATION_DOMAINS = ("up", "down", "side")
_BASE = "ab" * 32


def build_update(
    shape: tuple[int, int], rank: int, seed: int, *, scale: float = 0.5
) -> LinearUpdate:
    """A low-rank update of random numbers.

    Args:
        shape: (D_out, D_in).
        rank: R.
        seed: Of the numbers.
        scale: Factor of the product.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    return LinearUpdate(
        a=torch.randn(rank, columns, generator=generator),
        b=torch.randn(rows, rank, generator=generator),
        scale=scale,
    )


def build_population(
    ranks: Sequence[int] = (3, 2, 4, 1),
    *,
    generations: Sequence[int] | None = None,
    domains: Sequence[str | None] = POPULATION_DOMAINS,
) -> Population:
    """A population of one slot a rank; the second one leaves a layer alone.

    Args:
        ranks: R of each slot, at all its layers.
        generations: In which each was born; 0 for all if None.
        domains: What the slots are for, in turn.
    """
    slots = []
    for index, rank in enumerate(ranks):
        updates = {
            name: build_update(shape, rank, 10 * index + len(name))
            for name, shape in POPULATION_SHAPES.items()
        }
        if index == 1:
            del updates["block.0.up"]
        generation = 0 if generations is None else generations[index]
        birth = Birth(f"g{generation}-s{index}", "admitted", (f"c{index}",), generation)
        slots.append(Slot(birth, domains[index % len(domains)], updates))
    return Population(_BASE, 0, tuple(slots))


def build_fitness(
    values: ArrayLike,
    *,
    by_domain: ArrayLike | None = None,
    regret: ArrayLike = (-0.2, -0.1, -0.3),
    scope: str = "made-up",
) -> Fitness:
    """A fitness of given numbers, with standard errors of 0.001 nats.

    Args:
        values: (P,) nats.
        by_domain: (P, D) nats; the values in every domain if None.
        regret: (D,) nats.
        scope: Name of the scope.
    """
    found, regrets = np.asarray(values, np.float64), np.asarray(regret, np.float64)
    spread = found[:, None] + np.zeros(len(regrets)) if by_domain is None else by_domain
    errors = np.full(len(found), 1e-3)
    return Fitness(scope, found, errors, np.asarray(spread, np.float64), regrets)


def build_lifecycle_state(
    values: ArrayLike = (0.3, 0.2, 0.1, -0.1),
    *,
    freed: Sequence[int] = (),
    generation: int = 3,
    fitness: Fitness | None = None,
    ranks: Sequence[int] = (3, 2, 4, 1),
    generations: Sequence[int] | None = None,
    domains: Sequence[str | None] = POPULATION_DOMAINS,
) -> LifecycleState:
    """What an operator is handed.

    Args:
        values: Fitness of each slot, (P,) nats; not used if a fitness is given.
        freed: Slots whose adapter died and that nobody filled yet.
        generation: Number of the generation, from 1.
        fitness: Of the population.
        ranks: R of each slot, at all its layers.
        generations: In which each slot was born; 0 for all if None.
        domains: What the slots are for, in turn; None for no domain.
    """
    population = build_population(ranks, generations=generations, domains=domains)
    measured = build_fitness(values) if fitness is None else fitness
    return LifecycleState(population, measured, POPULATION_DOMAINS, generation, freed=tuple(freed))


def build_loss_table(
    num_slots: int = 4,
    *,
    effects: Sequence[float] | None = None,
    domains: Sequence[str] = POPULATION_DOMAINS,
    clusters: int = 6,
    seed: int = 0,
) -> LossTable:
    """Losses of a population and of its counterfactuals, of random sizes.

    Args:
        num_slots: P.
        effects: What each slot is worth everywhere, (P,) nats per token; random if None.
        domains: D names.
        clusters: Document clusters of each domain, so that C is D times as many.
        seed: Of the numbers.
    """
    random = np.random.default_rng(seed)
    count = clusters * len(domains)
    counts = random.integers(20, 200, count).astype(np.float64)
    base = counts * random.uniform(2.0, 3.0, count)
    full = base - counts * random.uniform(0.1, 0.5, count)
    worth = random.normal(0.0, 0.1, (num_slots, count))
    if effects is not None:
        worth = np.asarray(effects, np.float64)[:, None] + 0.001 * worth
    return LossTable(
        domains=tuple(domains),
        domain_of=np.repeat(np.arange(len(domains)), clusters),
        counts=counts,
        base=base,
        full=full,
        without=full + counts * worth,
        passes=num_slots + 1,
    )
