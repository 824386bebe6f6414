"""Registered operators and fitness scopes keep their contracts; broken ones are caught."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from molora_evolution.breeding import Crossover, Inheritance, InheritanceOptions
from molora_evolution.operators import Death
from molora_evolution.scopes import measure_global

from molora_fed.adapters.updates import LinearUpdate
from molora_fed.errors import PluginError
from molora_fed.plugins import load_plugins
from molora_fed.population.contract import LifecycleOperator, OperatorOptions
from molora_fed.testing import (
    build_lifecycle_state,
    build_loss_table,
    check_operator_conformance,
    check_scope_conformance,
    examine_operator,
    examine_scope,
)

PLUGINS = load_plugins()


@pytest.mark.parametrize("name", PLUGINS.lifecycle_operators.names())
def test_registered_operator_conforms(name):
    check_operator_conformance(PLUGINS.lifecycle_operators.resolve(name))


def test_a_parent_that_divides_conforms():
    check_operator_conformance(Inheritance, InheritanceOptions(divide=True))


class _Filling(Inheritance):
    """Inheritance with something wrong afterwards."""

    def apply(self, state, seed):
        return self.spoil(super().apply(state, seed))

    def replace_slots(self, state, change):
        slots = tuple(change(index, slot) for index, slot in enumerate(state.population.slots))
        return replace(state, population=replace(state.population, slots=slots))


class LosesASlot(LifecycleOperator):
    def apply(self, state, seed):
        slots = state.population.slots[1:]
        return replace(state, population=replace(state.population, slots=slots))


class ChangesInPlace(LifecycleOperator):
    def apply(self, state, seed):
        for update in state.population.slots[0].updates.values():
            update.b.mul_(2)
        return state


class ChangesFitnessInPlace(LifecycleOperator):
    def apply(self, state, seed):
        state.fitness.values[:] = 0
        return state


class ForgetsFreed(Inheritance):
    """A newborn whose slot is still said to be free."""

    def apply(self, state, seed):
        return replace(super().apply(state, seed), freed=state.freed)


class NamesAtWill(_Filling):
    def spoil(self, state):
        def rename(index, slot):
            if slot.birth.generation < state.generation:
                return slot
            return replace(slot, birth=replace(slot.birth, id=f"child-{index}"))

        return self.replace_slots(state, rename)


class InventsParents(_Filling):
    def spoil(self, state):
        def adopt(index, slot):
            if slot.birth.generation < state.generation:
                return slot
            return replace(slot, birth=replace(slot.birth, parents=("g0-s9",)))

        return self.replace_slots(state, adopt)


class LeavesNan(_Filling):
    def spoil(self, state):
        def ruin(index, slot):
            if slot.birth.generation < state.generation:
                return slot
            updates = {n: replace(u, scale=float("nan")) for n, u in slot.updates.items()}
            return replace(slot, updates=updates)

        return self.replace_slots(state, ruin)


class DrawsFromChance(_Filling):
    def spoil(self, state):
        def shake(index, slot):
            if slot.birth.generation < state.generation:
                return slot
            updates = {
                n: LinearUpdate(a=u.a + torch.randn(u.a.shape), b=u.b, scale=u.scale)
                for n, u in slot.updates.items()
            }
            return replace(slot, updates=updates)

        return self.replace_slots(state, shake)


class Remembers(LifecycleOperator):
    count = 0

    def apply(self, state, seed):
        self.count += 1
        return replace(state, events=(*state.events, f"call {self.count}"))


class CrashesOnDense(Crossover):
    def apply(self, state, seed):
        for slot in state.population.slots:
            for update in slot.updates.values():
                update.b.sum()
        return super().apply(state, seed)


class NeedsAParent(Inheritance):
    """Refuses an ordinary state."""

    def apply(self, state, seed):
        return super().apply(replace(state, freed=tuple(range(state.population.num_slots))), seed)


class ManyLines(LifecycleOperator):
    def apply(self, state, seed):
        return replace(state, events=(*state.events, "one\ntwo"))


class Demanding(Death):
    class Options(OperatorOptions):
        threshold: float


@pytest.mark.parametrize(
    ("operator", "reason"),
    [
        (LosesASlot, "with four slots alive, newborns with their gates' parent, got 3 slots"),
        (ChangesInPlace, "got changed tensors of g0-s0"),
        (ChangesFitnessInPlace, "the state it was handed as it was"),
        (ForgetsFreed, r"got freed slots \[2\]"),
        (NamesAtWill, "expected the id 'g3-s2' of a newborn with slot 2 freed, got 'child-2'"),
        (InventsParents, "the parent 'g0-s9', which is not in the population"),
        (LeavesNan, "NaN or infinity"),
        (DrawsFromChance, "the same bytes from one seed"),
        (Remembers, "the same bytes when it runs again"),
        (CrashesOnDense, "dense updates', got AttributeError"),
        (NeedsAParent, "got PopulationError: Cannot fill slot 0"),
        (ManyLines, "events of one line each"),
        (Demanding, "expected options that are given or have a default, got "),
    ],
)
def test_broken_operator_is_caught(operator, reason):
    with pytest.raises(PluginError, match=reason) as caught:
        check_operator_conformance(operator)
    assert str(caught.value).startswith(f"Lifecycle operator '{operator.__name__}' breaks")


def test_one_result_a_check_and_a_broken_one_hides_no_other():
    results = examine_operator(ChangesInPlace)
    assert len(results) == len(examine_operator(Death)) > 8
    broken = {one.name for one in results if one.problem is not None}
    assert {"leaves survivors as they are", "changes nothing in place"} <= broken
    assert "gives a state" not in broken


def test_a_built_state_is_whole():
    state = build_lifecycle_state(freed=(1,))
    assert state.fitness.by_domain.shape == (state.population.num_slots, len(state.domains))
    assert state.freed == (1,)


# Scopes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLUGINS.fitness_scopes.names())
def test_registered_scope_conforms(name):
    check_scope_conformance(PLUGINS.fitness_scopes.resolve(name), name=name)


def misnamed(table):
    return replace(measure_global(table), scope="other")


def forgets_regret(table):
    return replace(measure_global(table), regret=np.zeros(1))


def spoils_the_table(table):
    fitness = measure_global(table)
    table.base[:] = 0
    return fitness


def draws_from_chance(table):
    fitness = measure_global(table)
    return replace(fitness, values=fitness.values + np.random.normal(size=len(fitness.values)))


def weighs_the_first_cluster(table):
    effects = (table.without - table.full)[:, 0] / table.counts[0]
    return replace(measure_global(table), values=effects)


def takes_the_median(table):
    effects = np.median((table.without - table.full) / table.counts, axis=1)
    return replace(measure_global(table), values=effects)


def ranks_by_place(table):
    fitness = measure_global(table)
    return replace(fitness, values=fitness.values * np.arange(1, 1 + len(fitness.values)))


def turned_around(table):
    fitness = measure_global(table)
    return replace(fitness, values=-fitness.values)


def counts_from_one(table):
    fitness = measure_global(table)
    return replace(fitness, values=fitness.values + 1)


@pytest.mark.parametrize(
    ("scope", "reason"),
    [
        (misnamed, "expected a Fitness of scope 'mine', got 'other'"),
        (forgets_regret, r"regret of shape \(1,\), not finite \(3,\)"),
        (spoils_the_table, "expected the losses as they were, got other base"),
        (draws_from_chance, "the same fitness from the same losses"),
        (weighs_the_first_cluster, "order does not change, got other values"),
        (takes_the_median, "as on private texts, got other values"),
        (ranks_by_place, "moves with its slot, got other values"),
        (turned_around, "worth more than one that harms"),
        (counts_from_one, "expected 0 nats for a slot without which nothing changes, got 1"),
        (lambda table: table.full, "expected a Fitness of four slots, got ndarray"),
        (lambda table: [][1], "IndexError"),
    ],
)
def test_broken_scope_is_caught(scope, reason):
    with pytest.raises(PluginError, match=reason):
        check_scope_conformance(scope, name="mine")


def test_a_scope_may_be_a_class_with_options():
    class Scaled:
        Options = OperatorOptions

        def __init__(self, options):
            self.options = options

        def __call__(self, table):
            return measure_global(table)

    assert all(one.problem is None for one in examine_scope(Scaled, name="global"))
    assert "got a function" in str(examine_scope(measure_global, OperatorOptions())[0].problem)


def test_a_built_table_says_what_slots_are_worth():
    table = build_loss_table(2, effects=(0.5, -0.5), domains=("one", "two"), clusters=4)
    assert table.without.shape == (2, 8)
    assert measure_global(table).values == pytest.approx([0.5, -0.5], abs=0.01)
