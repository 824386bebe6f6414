"""Lifecycle operators that fill freed slots: inheritance, crossover, and mutation of newborns.

A newborn keeps its slot's layout, the rank at every layer, so that the population's size stays as
it is; a layer that only a parent changes is added at the parent's rank. Parents are survivors of
the generation before, chosen by their fitness in the slot's domain.

Source: arXiv 2605.11153, abstract; rules and options are our own definition.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from molora_evolution.products import decompose_product, rebuild
from molora_fed.adapters.updates import LinearUpdate, Spectrum
from molora_fed.errors import PopulationError
from molora_fed.population.contract import (
    Birth,
    LifecycleOperator,
    LifecycleState,
    OperatorOptions,
    Slot,
)
from molora_fed.storage.seeds import derive_seed

__all__ = [
    "Crossover",
    "CrossoverOptions",
    "Inheritance",
    "InheritanceOptions",
    "SvdMutation",
    "SvdMutationOptions",
    "rank_parents",
]


def rank_parents(state: LifecycleState, slot: int) -> list[int]:
    """Slots that may be parents of a newborn in a slot, fittest in its domain first.

    Args:
        state: What the operators before left.
        slot: The freed slot; without a domain the scope's own fitness counts.

    Raises:
        PopulationError: If nobody survives.
    """
    domain = state.population.slots[slot].domain
    known = domain is not None and domain in state.domains
    values = state.fitness.values
    if known:
        values = state.fitness.by_domain[:, state.domains.index(str(domain))]
    survivors = [
        index
        for index, one in enumerate(state.population.slots)
        if index not in state.freed and one.birth.generation < state.generation
    ]
    if not survivors:
        raise PopulationError(
            f"Cannot fill slot {slot}: expected a parent that lived before generation "
            f"{state.generation}, got none. Let fewer slots die."
        )
    return sorted(survivors, key=lambda index: (-values[index], index))


def _list_layers(state: LifecycleState, slots: Sequence[int]) -> list[tuple[str, int]]:
    """Layers that some slots change, by name, each with its rank in the first slot that does."""
    ranks: dict[str, int] = {}
    for slot in slots:
        for name, update in state.population.slots[slot].updates.items():
            ranks.setdefault(name, update.rank or 0)
    return sorted(ranks.items())


def _bear(
    state: LifecycleState,
    slot: int,
    operator: str,
    parents: Sequence[int],
    shares: Mapping[str, tuple[int, float]],
    gates: int | None,
    seed: int,
) -> LifecycleState:
    """Fill a freed slot with a newborn.

    Args:
        state: What the operators before left.
        slot: The freed slot.
        operator: Who makes it.
        parents: Slots of its parents.
        shares: By layer, the parent whose product it gets, and the product's weight.
        gates: Slot whose gate parameters it gets; None starts fresh.
        seed: Of the operator.
    """
    slots = list(state.population.slots)
    updates = {}
    for place, (name, rank) in enumerate(_list_layers(state, [slot, *parents])):
        parent, weight = shares[name]
        inherited = slots[parent].updates.get(name)
        if inherited is None:  # the parent leaves this layer alone: product 0 of the same shape
            weight = 0.0
            inherited = next(
                slots[i].updates[name] for i in (slot, *parents) if name in slots[i].updates
            )
        spectrum = decompose_product(inherited, weight)
        updates[name] = rebuild(spectrum, rank, derive_seed(seed, slot, place))
    birth = Birth(
        id=f"g{state.generation}-s{slot}",
        operator=operator,
        parents=tuple(slots[parent].birth.id for parent in parents),
        generation=state.generation,
        seed=seed,
        fitness_before=float(state.fitness.values[slot]),
    )
    slots[slot] = Slot(birth=birth, domain=slots[slot].domain, updates=updates)
    event = f"'{birth.id}' is born by {operator} of {' and '.join(map(repr, birth.parents))}"
    return replace(
        state,
        population=replace(state.population, slots=tuple(slots)),
        freed=tuple(index for index in state.freed if index != slot),
        parents={**state.parents, slot: gates},
        events=(*state.events, event),
    )


class InheritanceOptions(OperatorOptions):
    """Options of `inheritance`.

    Attributes:
        alpha: Share of the parent's product in the newborn's; the rest is a fresh adapter's, whose
            product is 0. At 0 the newborn is a fresh adapter with fresh gates.
        divide: Whether the parent gives that share away and keeps the rest, so that both together
            do what it did alone; else the newborn's share is on top of it.
    """

    alpha: float = Field(default=0.5, ge=0, le=1)
    # Left out where usual: evolutions from before there was a choice do not know of it.
    divide: bool = Field(default=False, exclude_if=lambda divide: not divide)


class Inheritance(LifecycleOperator):
    """Fills each freed slot with `alpha * parent + (1 - alpha) * fresh`, on the product."""

    Options: ClassVar[type[OperatorOptions]] = InheritanceOptions

    def apply(self, state: LifecycleState, seed: int) -> LifecycleState:
        """One newborn per freed slot, of the fittest survivor in the slot's domain.

        Raises:
            PopulationError: If nobody survives.
        """
        alpha, before = self.options.alpha, state
        for slot in state.freed:
            parent = rank_parents(before, slot)[0]
            shares = {name: (parent, alpha) for name, _ in _list_layers(state, [slot, parent])}
            gates = parent if alpha > 0 else None
            state = _bear(state, slot, "inheritance", [parent], shares, gates, seed)
            if self.options.divide:
                state = _shrink(state, parent, 1 - alpha, seed)
        return state


def _shrink(state: LifecycleState, slot: int, share: float, seed: int) -> LifecycleState:
    """The state with a slot's product times a share, a newborn that keeps its gates."""
    slots = list(state.population.slots)
    old = slots[slot]
    updates: dict[str, LinearUpdate] = {}
    for name, update in old.updates.items():
        factors: Any = update
        updates[name] = LinearUpdate(a=factors.a, b=factors.b * share, scale=factors.scale)
    birth = old.birth
    if slot not in state.parents:  # else it gave a share away before
        birth = Birth(
            id=f"g{state.generation}-s{slot}",
            operator="inheritance",
            parents=(old.birth.id,),
            generation=state.generation,
            seed=seed,
            fitness_before=float(state.fitness.values[slot]),
        )
    slots[slot] = replace(old, birth=birth, updates=updates)
    event = f"'{old.birth.id}' keeps {share:g} of its update"
    return replace(
        state,
        population=replace(state.population, slots=tuple(slots)),
        parents={**state.parents, slot: slot},
        events=(*state.events, event),
    )


class CrossoverOptions(OperatorOptions):
    """Options of `crossover`.

    Attributes:
        share: Chance of a layer to come from the fitter parent.
    """

    share: float = Field(default=0.5, ge=0, le=1)


class Crossover(LifecycleOperator):
    """Fills each freed slot with layers of the two fittest survivors in its domain."""

    Options: ClassVar[type[OperatorOptions]] = CrossoverOptions

    def apply(self, state: LifecycleState, seed: int) -> LifecycleState:
        """One newborn per freed slot: each layer's product is one parent's, gates the fitter's.

        Raises:
            PopulationError: If fewer than two survive.
        """
        for slot in state.freed:
            parents = rank_parents(state, slot)[:2]
            if len(parents) < 2:
                raise PopulationError(
                    f"Cannot cross over into slot {slot}: expected two parents that lived before "
                    f"generation {state.generation}, got one. Let fewer slots die, or use "
                    "'inheritance'."
                )
            random = np.random.default_rng([seed, slot])
            shares = {
                name: (parents[int(random.random() >= self.options.share)], 1.0)
                for name, _ in _list_layers(state, [slot, *parents])
            }
            state = _bear(state, slot, "crossover", parents, shares, parents[0], seed)
        return state


class SvdMutationOptions(OperatorOptions):
    """Options of `svd-mutation`.

    Attributes:
        values: Relative size of the change of a singular value: standard deviation of its log.
        vectors: Relative size of the change of a singular vector: expected norm of what is added
            to it before all are made orthonormal again.
    """

    values: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    vectors: float = Field(default=0.1, ge=0, allow_inf_nan=False)


class SvdMutation(LifecycleOperator):
    """Perturbs the singular values and vectors of this generation's newborns.

    A parent that gave a share of its product away keeps its gates, and is left alone.
    """

    Options: ClassVar[type[OperatorOptions]] = SvdMutationOptions

    def apply(self, state: LifecycleState, seed: int) -> LifecycleState:
        """Mutate every newborn, layer by layer; its id stays, its operator gets this one's name."""
        slots = list(state.population.slots)
        events = list(state.events)
        for index, slot in enumerate(slots):
            if slot.birth.generation != state.generation or state.parents.get(index) == index:
                continue  # who keeps its own gates gave a share away, and is no child
            updates = {
                name: self._mutate(update, derive_seed(seed, index, place))
                for place, (name, update) in enumerate(sorted(slot.updates.items()))
            }
            birth = replace(slot.birth, operator=f"{slot.birth.operator}+svd-mutation")
            slots[index] = replace(slot, birth=birth, updates=updates)
            events.append(f"'{birth.id}' mutates")
        population = replace(state.population, slots=tuple(slots))
        return replace(state, population=population, events=tuple(events))

    def _mutate(self, update: LinearUpdate, seed: int) -> LinearUpdate:
        """The update with perturbed singular values and vectors, at its rank."""
        options, generator = self.options, torch.Generator().manual_seed(seed)
        spectrum = decompose_product(update)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        factors = torch.exp(options.values * draw(len(spectrum.values)))
        u = _turn(spectrum.u, options.vectors * draw(*spectrum.u.shape))
        v = _turn(spectrum.vh.T, options.vectors * draw(*spectrum.vh.T.shape))
        values, order = (spectrum.values * factors).sort(descending=True)
        return rebuild(Spectrum(u[:, order], values, v.T[order]), update.rank or 0, seed)


def _turn(vectors: Tensor, noise: Tensor) -> Tensor:
    """Orthonormal columns near others, (D, R); noise of one unit per column for entries of 1."""
    turned, core = torch.linalg.qr(vectors + noise / len(vectors) ** 0.5)
    signs = torch.sign(torch.diagonal(core))  # QR leaves the columns' signs open
    return turned * torch.where(signs == 0, torch.ones_like(signs), signs)
