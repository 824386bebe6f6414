"""Operators whose worth is known: they are planted to see what the guard does about them.

They are of the study `guard` alone and not registered: nobody would want to evolve with them.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from molora_evolution.products import decompose_product

from molora_fed.adapters.updates import LinearUpdate
from molora_fed.population.contract import (
    Birth,
    LifecycleOperator,
    LifecycleState,
    OperatorOptions,
    Population,
)
from molora_fed.population.slots import make_fresh_updates

__all__ = ["Restore", "Ruin", "wipe_slot"]


def _bear(
    state: LifecycleState, slot: int, operator: str, updates: Mapping[str, LinearUpdate], seed: int
) -> LifecycleState:
    """The state with a newborn in a slot that keeps its gates."""
    old = state.population.slots[slot]
    birth = Birth(
        id=f"g{state.generation}-s{slot}",
        operator=operator,
        parents=(old.birth.id,),
        generation=state.generation,
        seed=seed,
        fitness_before=float(state.fitness.values[slot]),
    )
    slots = list(state.population.slots)
    slots[slot] = replace(old, birth=birth, updates=updates)
    return replace(
        state,
        population=replace(state.population, slots=tuple(slots)),
        parents={**state.parents, slot: slot},
        events=(*state.events, f"'{birth.id}' is planted by {operator}"),
    )


def _scramble(update: LinearUpdate, generator: torch.Generator) -> LinearUpdate:
    """Noise of the same spectrum: singular values stay, singular vectors are drawn."""
    spectrum = decompose_product(update)
    factors: Any = update

    def draw(size: int) -> torch.Tensor:
        shape = (size, len(spectrum.values))
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(drawn)[0]

    rows, columns = spectrum.shape
    roots = (spectrum.values / factors.scale).sqrt()
    left, right = draw(rows), draw(columns)
    a, b = torch.zeros_like(factors.a), torch.zeros_like(factors.b)
    a[: len(roots)] = (roots[:, None] * right.T).float()
    b[:, : len(roots)] = (left * roots).float()
    return LinearUpdate(a=a, b=b, scale=factors.scale)


class Ruin(LifecycleOperator):
    """Harms: the fittest slot's adapter becomes noise of the same spectrum, its gates stay."""

    def apply(self, state: LifecycleState, seed: int) -> LifecycleState:
        """One newborn, in the slot whose loss would cost most."""
        slot = int(np.argmax(state.fitness.values))
        generator = torch.Generator().manual_seed(seed)
        updates = {
            name: _scramble(update, generator)
            for name, update in sorted(state.population.slots[slot].updates.items())
        }
        return _bear(state, slot, "ruin", updates, seed)


class Restore(LifecycleOperator):
    """Helps: a slot that was wiped gets its adapter back.

    Args:
        slot: The slot.
        updates: The adapter's.
    """

    def __init__(self, slot: int, updates: Mapping[str, LinearUpdate]) -> None:
        super().__init__(OperatorOptions())
        self.slot = slot
        self.updates = updates

    def apply(self, state: LifecycleState, seed: int) -> LifecycleState:
        """One newborn, the adapter that was there."""
        return _bear(state, self.slot, "restore", self.updates, seed)


def wipe_slot(population: Population, slot: int, seed: int) -> Population:
    """A population with a fresh adapter in place of a slot's.

    Args:
        population: The slots; they stay as they are.
        slot: Which of them.
        seed: Of the fresh numbers.
    """
    old = population.slots[slot]
    updates = {
        name: make_fresh_updates({name: update.shape}, update.rank or 0, seed + place)[name]
        for place, (name, update) in enumerate(sorted(old.updates.items()))
    }
    slots = list(population.slots)
    slots[slot] = replace(old, updates=updates)
    return replace(population, slots=tuple(slots))
