from dataclasses import replace

import pytest
import torch
from adaptation_helpers import build_router

from molora_fed.errors import PopulationError, UnknownNameError
from molora_fed.plugins import load_plugins
from molora_fed.population.contract import Birth, LifecycleOperator, OperatorOptions, Slot
from molora_fed.population.lifecycle import Step, open_operators, reset_newborns, run_lifecycle
from molora_fed.testing import POPULATION_DOMAINS as DOMAINS
from molora_fed.testing import build_fitness, build_population, build_update

PLUGINS = load_plugins()
VALUES = (0.3, 0.2, 0.1, -0.1)


def run(*operators, population=None, seed=0, generation=3):
    steps = [Step(f"step-{number}", operator) for number, operator in enumerate(operators)]
    return run_lifecycle(
        steps,
        population or build_population(),
        build_fitness(VALUES),
        DOMAINS,
        generation=generation,
        seed=seed,
    )


def operator_of(change):
    """An operator that does what a function does to the state."""

    class Operator(LifecycleOperator):
        def apply(self, state, seed):
            return change(state, seed)

    return Operator(OperatorOptions())


def put_newborn(state, slot=1, *, parents=("g0-s0",), gates=0, generation=3, id="g3-new", **more):
    """The state with a newborn in a slot."""
    slots = list(state.population.slots)
    updates = more.pop("updates", {"block.0.up": build_update((7, 5), 2, 9)})
    slots[slot] = Slot(Birth(id, "test", parents, generation), "up", updates)
    population = replace(state.population, slots=tuple(slots))
    more = {"parents": {**state.parents, slot: gates}, **more}
    return replace(state, population=population, **more)


def test_operators_run_in_order_each_with_a_seed_of_its_own():
    seen = []

    def note(state, seed):
        seen.append((seed, state.events))
        return replace(state, events=(*state.events, f"{len(seen)}"))

    state = run(operator_of(note), operator_of(note), seed=7)
    assert state.events == ("1", "2") and state.generation == 3 and state.domains == DOMAINS
    assert [events for _, events in seen] == [(), ("1",)]
    assert seen[0][0] != seen[1][0]
    first = list(seen)
    seen.clear()
    run(operator_of(note), operator_of(note), seed=7)
    assert seen == first


def test_without_operators_the_population_stays():
    population = build_population()
    state = run(population=population)
    assert state.population is population and state.freed == ()


def test_a_slot_that_nobody_fills_keeps_its_adapter_and_domain():
    steps = [
        ("death", {"patience": 1, "min_age": 1, "threshold": 0.0}),
        ("slot-reallocation", {}),
    ]
    population = build_population()
    state = run_lifecycle(
        open_operators(steps, PLUGINS),
        population,
        build_fitness(VALUES),
        DOMAINS,
        generation=1,
        seed=0,
    )
    assert state.freed == (3,) and "slot 3 goes to 'down'" in state.events[1]
    old, found = population.slots[3], state.population.slots[3]
    assert (found.birth, found.domain, found.stale) == (old.birth, old.domain, 1)
    assert found.updates is old.updates


def test_a_newborn_of_a_strangers_operator_is_taken():
    state = run(operator_of(lambda state, seed: put_newborn(state)))
    assert state.population.slots[1].birth.id == "g3-new" and state.parents == {1: 0}


WRONG = {
    "3 slots": lambda s: replace(s, population=replace(s.population, slots=s.population.slots[:3])),
    "another base": lambda s: replace(s, population=replace(s.population, base_weights="cd" * 32)),
    "a newborn of generation 2 in slot 1": lambda s: put_newborn(s, generation=2),
    "the parent 'g9-s9', which is not in the population": lambda s: put_newborn(
        s, parents=("g9-s9",)
    ),
    "gate parents of slots [], not [1]": lambda s: (
        put_newborn(s, parents=(), gates=0) and replace(put_newborn(s), parents={})
    ),
    "gate parents [7]": lambda s: put_newborn(s, gates=7),
    "freed slots [9]": lambda s: replace(s, freed=(9,)),
    "freed slots [1]": lambda s: put_newborn(s, freed=(1,)),
    "another generation": lambda s: replace(s, generation=4),
    "other domains": lambda s: replace(s, domains=("up",)),
    "NaN or infinity": lambda s: put_newborn(
        s, updates={"block.0.up": replace(build_update((7, 5), 2, 9), scale=float("nan"))}
    ),
    "two slots of id 'g0-s0'": lambda s: put_newborn(s, id="g0-s0"),
}


@pytest.mark.parametrize("named", WRONG)
def test_an_operator_that_breaks_the_contract_is_named(named):
    with pytest.raises(PopulationError) as caught:
        run(operator_of(lambda s, seed: s), operator_of(lambda s, seed: WRONG[named](s)))
    assert "operator 'step-1'" in str(caught.value) and named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_gate_parent_may_not_be_another_newborn():
    def two(state, seed):
        return put_newborn(put_newborn(state), 2, gates=1, id="g3-other")

    with pytest.raises(PopulationError, match=r"gate parents \[1\]"):
        run(operator_of(two))


def test_a_newborn_that_keeps_its_own_gates_may_hand_them_on():
    def two(state, seed):
        return put_newborn(put_newborn(state, gates=1), 2, gates=1, id="g3-other")

    assert run(operator_of(two)).parents == {1: 1, 2: 1}


def test_fitness_of_another_population_is_refused():
    with pytest.raises(PopulationError, match=r"a fitness of 4 slots and 3 domains, got \(2, 3\)"):
        run_lifecycle(
            (), build_population(), build_fitness((0.1, 0.2)), DOMAINS, generation=1, seed=0
        )


def test_operators_open_by_name_with_their_options():
    steps = open_operators([("death", {"patience": 4}), ("svd-mutation", {})], PLUGINS)
    assert [step.name for step in steps] == ["death", "svd-mutation"]
    assert steps[0].operator.options.patience == 4
    with pytest.raises(UnknownNameError, match="Did you mean 'death'"):
        open_operators([("deth", {})], PLUGINS)
    with pytest.raises(PopulationError) as caught:
        open_operators([("inheritance", {"alpha": 2, "beta": 1})], PLUGINS)
    assert "operator 'inheritance'" in str(caught.value)
    assert "alpha" in str(caught.value) and "beta" in str(caught.value)


def test_newborns_get_their_parents_gates_or_fresh_ones():
    router = build_router(num_slots=4)
    before = {name: value.clone() for name, value in router.state_dict().items()}

    def two(state, seed):
        return put_newborn(put_newborn(state, gates=0), 2, gates=None, id="g3-other")

    state = run(operator_of(two))
    changed = reset_newborns(router, state, seed=5)
    assert all(torch.equal(v, before[n]) for n, v in router.state_dict().items())
    assert torch.equal(changed.weight[1], router.weight[0])
    assert torch.equal(changed.weight[[0, 3]], router.weight[[0, 3]])
    assert not torch.equal(changed.weight[2], router.weight[2])
    again, other = (reset_newborns(router, state, seed=seed) for seed in (5, 6))
    assert torch.equal(changed.weight, again.weight)
    assert not torch.equal(changed.weight[2], other.weight[2])
