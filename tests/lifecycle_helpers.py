"""Populations and fitness without a model: two small layers, mixed ranks."""

import numpy as np
import torch

from molora_fed.adapters.updates import LinearUpdate
from molora_fed.population.contract import Birth, Fitness, LifecycleState, Population, Slot

SHAPES = {"block.0.up": (7, 5), "block.1.down": (5, 8)}
DOMAINS = ("up", "down", "side")
BASE = "ab" * 32


def build_update(shape, rank, seed, scale=0.5):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    return LinearUpdate(
        a=torch.randn(rank, columns, generator=generator),
        b=torch.randn(rows, rank, generator=generator),
        scale=scale,
    )


def build_population(ranks=(3, 2, 4, 1), *, generations=None, domains=DOMAINS):
    slots = []
    for index, rank in enumerate(ranks):
        updates = {n: build_update(s, rank, 10 * index + len(n)) for n, s in SHAPES.items()}
        if index == 1:
            del updates["block.0.up"]  # a slot that leaves one layer alone
        generation = 0 if generations is None else generations[index]
        birth = Birth(f"g{generation}-s{index}", "admitted", (f"c{index}",), generation)
        slots.append(Slot(birth, domains[index % len(domains)], updates))
    return Population(BASE, 0, tuple(slots))


def build_fitness(values, by_domain=None, regret=(-0.2, -0.1, -0.3)):
    values = np.asarray(values, dtype=np.float64)
    if by_domain is None:
        by_domain = values[:, None] + np.zeros(len(regret))
    by_domain = np.asarray(by_domain, dtype=np.float64)
    return Fitness("global", values, np.full(len(values), 1e-3), by_domain, np.asarray(regret))


def build_state(values=(0.3, 0.2, 0.1, -0.1), *, freed=(), generation=3, fitness=None, **options):
    population = build_population(**options)
    fitness = fitness or build_fitness(values)
    return LifecycleState(population, fitness, DOMAINS, generation, freed=tuple(freed))


def product_of(population, slot, name):
    """The product of a slot's update of a layer in float64; zeros if it has none."""
    update = population.slots[slot].updates.get(name)
    if update is None:
        return torch.zeros(SHAPES[name], dtype=torch.float64)
    return update.scale * update.b.double() @ update.a.double()


def ranks_of(slot):
    return {name: update.rank for name, update in slot.updates.items()}
