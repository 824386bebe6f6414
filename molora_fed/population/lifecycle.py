"""A generation's lifecycle: fitness by a registered scope, then registered operators in order.

Operators come from plugins, so what each leaves is checked: no slot is lost, survivors keep their
ids, and every slot can be used.
"""

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any
from zlib import crc32

import numpy as np

from molora_fed.errors import PopulationError
from molora_fed.guard import guarded, refuse
from molora_fed.options import Choice, open_choice
from molora_fed.plugins import Entry, Plugins
from molora_fed.population.contract import (
    AdapterRouter,
    Fitness,
    LifecycleOperator,
    LifecycleState,
    LossTable,
    Population,
)
from molora_fed.population.slots import check_slots
from molora_fed.storage.seeds import derive_seed
from molora_fed.storage.settings import open_options

__all__ = ["Step", "compute_fitness", "open_operators", "reset_newborns", "run_lifecycle"]


@dataclass(frozen=True)
class Step:
    """One operator of a lifecycle.

    Attributes:
        name: Its registered name.
        operator: The operator with its options.
        entry: Who registered it; None of one that was made by hand.
    """

    name: str
    operator: LifecycleOperator
    entry: Entry | None = None


def compute_fitness(scope: Choice, table: LossTable, plugins: Plugins) -> Fitness:
    """Fitness of every slot by a registered scope.

    Args:
        scope: The scope; the fitness is called by its label, if it has one.
        table: Losses per cluster.
        plugins: Where its name is looked up.

    Raises:
        UnknownNameError: If no plugin registers it.
        CharterError: If its options are wrong.
        PopulationError: If the losses cannot be used, or the scope returns other shapes than it
            should, or numbers that are not finite.
        PluginError: If the scope fails, or returns no fitness of its name.
    """
    name, entry = scope.name, plugins.fitness_scopes.entry(scope.name)
    measure = open_choice(plugins.fitness_scopes, scope, key="population.scope")
    with guarded(entry, "fitness"):
        fitness = measure(copy.deepcopy(table))
    if not isinstance(fitness, Fitness) or fitness.scope != name:
        got = fitness.scope if isinstance(fitness, Fitness) else type(fitness).__name__
        raise refuse(entry, "fitness", expected=f"a Fitness of scope '{name}'", got=repr(got))
    slots, domains = len(table.without), len(table.domains)
    wanted = {
        "values": (slots,),
        "errors": (slots,),
        "by_domain": (slots, domains),
        "regret": (domains,),
    }
    faults = []
    for name, shape in wanted.items():
        found = np.asarray(getattr(fitness, name))
        if found.shape != shape or not np.isfinite(found).all():
            faults.append(f"{name} of shape {found.shape}, not finite {shape}")
    if faults:
        raise PopulationError(
            f"Cannot use fitness scope '{scope.key}': expected a finite fitness of {slots} slots and "
            f"{domains} domains, got {'; '.join(faults)}. Correct the scope."
        )
    return replace(fitness, scope=scope.key)


def open_operators(
    chosen: Sequence[tuple[str, Mapping[str, Any]]], plugins: Plugins
) -> tuple[Step, ...]:
    """Operators by name with their options, in the order in which they run.

    Args:
        chosen: Registered name and options of each.
        plugins: Where names are looked up.

    Raises:
        UnknownNameError: If no plugin registers a name.
        PopulationError: If options are wrong; all that are wrong with one operator are named.
    """
    steps = []
    for name, options in chosen:
        operator, settings = open_options(
            plugins.lifecycle_operators,
            name,
            options,
            error=PopulationError,
            fix="Correct the operator's options.",
        )
        entry = plugins.lifecycle_operators.entry(name)
        with guarded(entry, "construction"):
            steps.append(Step(name, operator(settings), entry))
    return tuple(steps)


def run_lifecycle(
    steps: Sequence[Step],
    population: Population,
    fitness: Fitness,
    domains: Sequence[str],
    *,
    generation: int,
    seed: int,
) -> LifecycleState:
    """Run a generation's operators in order.

    Args:
        steps: The operators.
        population: The slots; they stay as they are.
        fitness: Theirs.
        domains: Domain names, as in the fitness.
        generation: Number of this generation, from 1.
        seed: Not negative; operator k draws from a seed that follows from it and k.

    Returns:
        The state after the last. A slot that is still freed keeps its adapter and its domain.

    Raises:
        PopulationError: If an operator cannot work, or leaves what breaks the contract.
    """
    if fitness.by_domain.shape != (population.num_slots, len(domains)):
        raise PopulationError(
            f"Cannot run a lifecycle: expected a fitness of {population.num_slots} slots and "
            f"{len(domains)} domains, got {fitness.by_domain.shape}. Measure this population."
        )
    state = LifecycleState(population, fitness, tuple(domains), generation)
    tensors = _sum_up(population)
    for place, step in enumerate(steps):
        derived = derive_seed(seed, place)
        with nullcontext() if step.entry is None else guarded(step.entry, "the lifecycle"):
            following = step.operator.apply(state, derived)
        if not isinstance(following, LifecycleState):
            raise PopulationError(
                f"Cannot use lifecycle operator '{step.name}': expected a LifecycleState, got "
                f"{type(following).__name__}. Correct the operator."
            )
        _check_step(step.name, state, following, population)
        _check_survivors(step.name, tensors, population, following.population)
        state = following
    return _restore_unfilled(state, population)


def _sum_up(population: Population) -> dict[str, int]:
    """A checksum of each slot's tensors, by the id of its adapter."""
    sums = {}
    for slot in population.slots:
        total = 0
        for name, update in sorted(slot.updates.items()):
            total = crc32(f"{name} {update.scale}".encode(), total)
            for key, tensor in update.tensors().items():
                total = crc32(key.encode(), total)
                total = crc32(tensor.detach().cpu().contiguous().numpy(), total)
        sums[slot.birth.id] = total
    return sums


def _check_survivors(
    name: str, tensors: Mapping[str, int], old: Population, new: Population
) -> None:
    """Refuse an operator that changes an adapter without declaring it newborn.

    A newborn of this generation may be changed by the operators after its own. Twin and lifecycle
    share the others' tensors: a change in place would pass by the guard.
    """
    now = [_sum_up(old), _sum_up(new)]
    changed = sorted({i for sums in now for i in sums if i in tensors and sums[i] != tensors[i]})
    if changed:
        raise PopulationError(
            f"Cannot use lifecycle operator '{name}': expected adapters that stay as they are or "
            f"are replaced by newborns, got changed tensors of {', '.join(changed)}. Correct the "
            "operator: change copies and give them a Birth."
        )


def _restore_unfilled(state: LifecycleState, start: Population) -> LifecycleState:
    """Slots that nobody filled are for the domain they were for: their adapters live on."""
    if not state.freed:
        return state
    slots = list(state.population.slots)
    for slot in state.freed:
        slots[slot] = replace(slots[slot], domain=start.slots[slot].domain)
    return replace(state, population=replace(state.population, slots=tuple(slots)))


def _check_step(
    name: str, before: LifecycleState, after: LifecycleState, start: Population
) -> None:
    """Refuse what an operator must not leave, naming the operator."""
    old, new = before.population, after.population
    faults = []
    if new.num_slots != old.num_slots:
        faults.append(f"{new.num_slots} slots")
    elif (new.base_weights, new.frozen_depth) != (old.base_weights, old.frozen_depth):
        faults.append("slots of another base or frozen depth")
    else:
        places = range(new.num_slots)
        newborn = {i for i in places if new.slots[i].birth.id != start.slots[i].birth.id}
        faults += [
            f"a newborn of generation {new.slots[i].birth.generation} in slot {i}"
            for i in sorted(newborn)
            if new.slots[i].birth.generation != after.generation
        ]
        known = {slot.birth.id for slot in (*start.slots, *new.slots)}
        unknown = {p for i in newborn for p in new.slots[i].birth.parents} - known
        faults += [
            f"the parent '{parent}', which is not in the population" for parent in sorted(unknown)
        ]
        if any(i not in places for i in after.freed) or newborn & set(after.freed):
            faults.append(f"freed slots {list(after.freed)}")
        if set(after.parents) != newborn:
            faults.append(f"gate parents of slots {sorted(after.parents)}, not {sorted(newborn)}")
        strangers = [
            parent
            for slot, parent in after.parents.items()
            if parent is not None and (parent not in places or parent in newborn - {slot})
        ]
        if strangers:
            faults.append(f"gate parents {strangers}")
    if (after.generation, after.domains) != (before.generation, before.domains):
        faults.append("another generation or other domains")
    if not faults:
        try:
            check_slots(new)
        except PopulationError as error:
            faults.append(str(error))
    if faults:
        raise PopulationError(
            f"Cannot use lifecycle operator '{name}': expected {old.num_slots} usable slots, each "
            f"newborn of generation {before.generation} with its gates' parent, got "
            f"{'; '.join(faults)}. Correct the operator."
        )


def reset_newborns(router: AdapterRouter, state: LifecycleState, seed: int) -> AdapterRouter:
    """The router with newborns' gate parameters; it stays as it is itself.

    Args:
        router: Router of the population before the lifecycle.
        state: What the lifecycle left.
        seed: Of fresh gate parameters, not negative.
    """
    changed = copy.deepcopy(router)
    for slot, parent in sorted(state.parents.items()):
        derived = derive_seed(seed, slot)
        changed.reset_slot(slot, parent, derived)
    return changed
