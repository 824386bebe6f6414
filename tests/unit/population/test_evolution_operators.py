from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from molora_evolution.breeding import (
    Crossover,
    CrossoverOptions,
    Inheritance,
    InheritanceOptions,
    SvdMutation,
    SvdMutationOptions,
)
from molora_evolution.operators import Death, DeathOptions, SlotReallocation
from molora_evolution.products import decompose_product, rebuild
from pydantic import ValidationError

from molora_fed.adapters.updates import truncate
from molora_fed.errors import PopulationError
from molora_fed.hookspecs import check_operator
from molora_fed.plugins import load_plugins
from molora_fed.population.contract import OperatorOptions
from molora_fed.population.files import fingerprint_population
from molora_fed.population.lifecycle import open_operators, run_lifecycle
from molora_fed.population.lineage import describe_change
from molora_fed.population.slots import make_fresh_updates
from molora_fed.testing import POPULATION_DOMAINS as DOMAINS
from molora_fed.testing import (
    POPULATION_SHAPES,
    build_fitness,
    build_lifecycle_state,
    build_population,
)

PLUGINS = load_plugins()


def product_of(population, slot, name):
    """The product of a slot's update of a layer in float64; zeros if it has none."""
    update = population.slots[slot].updates.get(name)
    if update is None:
        return torch.zeros(POPULATION_SHAPES[name], dtype=torch.float64)
    return update.scale * update.b.double() @ update.a.double()


def ranks_of(slot):
    return {name: update.rank for name, update in slot.updates.items()}


def inherit(alpha):
    return Inheritance(InheritanceOptions(alpha=alpha))


def mutate(values, vectors):
    return SvdMutation(SvdMutationOptions(values=values, vectors=vectors))


def die(**options):
    return Death(DeathOptions(**{"threshold": 0.05, "patience": 1, "min_age": 1, **options}))


# --- death -------------------------------------------------------------------------------------


def test_the_least_fit_dies_first_and_one_at_a_time():
    state = build_lifecycle_state((0.01, 0.02, -0.3, 0.4))
    after = die().apply(state, 0)
    assert after.freed == (2,)
    assert [slot.stale for slot in after.population.slots] == [1, 1, 1, 0]
    assert after.population.slots[2].updates is state.population.slots[2].updates
    assert "'g0-s2' in slot 2 dies: fitness -0.3000 nats" in after.events[0]
    assert die(at_most=2).apply(state, 0).freed == (0, 2)
    assert die(at_most=9).apply(state, 0).freed == (0, 1, 2)


def test_somebody_always_lives():
    state = build_lifecycle_state((-0.4, -0.3, -0.2, -0.1))
    assert die(at_most=9).apply(state, 0).freed == (0, 1, 2)
    freed = die(at_most=9).apply(replace(state, freed=(3,)), 0).freed
    assert freed == (0, 1, 3)


def test_patience_counts_generations_in_a_row():
    operator = die(patience=3)
    state = build_lifecycle_state((0.4, 0.01, 0.4, 0.4))
    stales = []
    for value in (0.01, 0.01, 0.4, 0.01, 0.01, 0.01):
        state = replace(state, fitness=build_fitness((0.4, value, 0.4, 0.4)))
        state = operator.apply(state, 0)
        stales.append((state.population.slots[1].stale, state.freed))
    assert stales == [(1, ()), (2, ()), (0, ()), (1, ()), (2, ()), (3, (1,))]


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.floats(-1, 1), min_size=4, max_size=4),
    generations=st.lists(st.integers(0, 5), min_size=4, max_size=4),
    min_age=st.integers(1, 6),
    patience=st.integers(1, 3),
    at_most=st.integers(1, 5),
    threshold=st.floats(-1, 1),
)
def test_the_protected_age_and_the_limits_hold(
    values, generations, min_age, patience, at_most, threshold
):
    state = build_lifecycle_state(values, generation=5, generations=generations)
    operator = die(min_age=min_age, patience=patience, at_most=at_most, threshold=threshold)
    after = operator.apply(state, 0)
    assert all(5 - generations[index] >= min_age for index in after.freed)
    assert all(values[index] < threshold for index in after.freed)
    assert len(after.freed) <= min(at_most, 3)
    assert patience == 1 or not after.freed
    assert [s.birth for s in after.population.slots] == [s.birth for s in state.population.slots]
    assert max((values[i] for i in after.freed), default=-2) <= min(
        (
            values[i]
            for i in range(4)
            if i not in after.freed and values[i] < threshold and 5 - generations[i] >= min_age
        ),
        default=2,
    )


# --- slot reallocation -------------------------------------------------------------------------


def test_freed_slots_go_to_the_domains_of_largest_regret():
    fitness = build_fitness((0.1,) * 4, regret=(-0.2, 0.05, -0.1))
    state = build_lifecycle_state(fitness=fitness, freed=(0, 2, 3))
    after = SlotReallocation(OperatorOptions()).apply(state, 0)
    assert [slot.domain for slot in after.population.slots] == ["down", "down", "side", "up"]
    assert after.freed == state.freed and not after.parents
    assert after.events[0] == "slot 0 goes to 'down': loss +0.0500 nats against the base"


def test_without_freed_slots_nobody_moves():
    state = build_lifecycle_state()
    for operator in (SlotReallocation(OperatorOptions()), inherit(0.5), mutate(0.1, 0.1)):
        after = operator.apply(state, 0)
        assert after.events == () and after.parents == {}
        assert fingerprint_population(after.population) == fingerprint_population(state.population)


# --- inheritance -------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(alpha=st.floats(0.01, 1), freed=st.integers(0, 3), seed=st.integers(0, 2**32))
def test_a_child_is_a_share_of_its_parents_product_at_its_slots_rank(alpha, freed, seed):
    state = build_lifecycle_state(freed=(freed,))
    after = inherit(alpha).apply(state, seed)
    parent = 1 if freed == 0 else 0  # the fittest that lives
    child = after.population.slots[freed]
    slots = state.population.slots
    assert ranks_of(child) == {**ranks_of(slots[parent]), **ranks_of(slots[freed])}
    assert child.birth.parents == (slots[parent].birth.id,)
    assert child.birth.fitness_before == state.fitness.values[freed]
    assert after.parents == {freed: parent} and after.freed == ()
    for name, update in child.updates.items():
        wanted = alpha * product_of(state.population, parent, name)
        a, b = truncate(wanted.float(), update.rank)
        torch.testing.assert_close(update.product(), b @ a, atol=2e-5, rtol=2e-5)
        # No direction is dead: where B is 0, A is not.
        assert bool((update.a.abs().sum(dim=1) > 0).all())
    for index in range(4):
        if index != freed:
            assert after.population.slots[index] is slots[index]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_at_alpha_0_a_child_is_a_fresh_adapter_with_fresh_gates(seed):
    after = inherit(0).apply(build_lifecycle_state(freed=(2,)), seed)
    child = after.population.slots[2]
    assert after.parents == {2: None}
    for name, update in child.updates.items():
        fresh = make_fresh_updates({name: POPULATION_SHAPES[name]}, 4, 0)[name]
        assert not update.b.any() and update.scale == fresh.scale
        assert 0 < update.a.abs().max() <= 1 / POPULATION_SHAPES[name][1] ** 0.5
        assert torch.linalg.matrix_rank(update.a) == 4


@settings(max_examples=20, deadline=None)
@given(alpha=st.floats(0, 1), seed=st.integers(0, 2**32))
def test_a_parent_that_divides_keeps_what_its_child_does_not_get(alpha, seed):
    state = build_lifecycle_state(freed=(2,))
    whole = inherit(alpha).apply(state, seed)
    after = Inheritance(InheritanceOptions(alpha=alpha, divide=True)).apply(state, seed)
    child = after.population.slots[2]
    (name,) = child.birth.parents
    (parent,) = (i for i, s in enumerate(state.population.slots) if s.birth.id == name)
    birth = after.population.slots[parent].birth
    assert (birth.id, birth.parents, birth.operator) == (f"g3-s{parent}", (name,), "inheritance")
    assert after.parents == {**whole.parents, parent: parent}
    for module in state.population.slots[parent].updates:
        kept = product_of(after.population, parent, module)
        before = product_of(state.population, parent, module)
        assert torch.allclose(kept, (1 - alpha) * before, atol=1e-6)
        given_away = product_of(whole.population, 2, module)
        assert torch.equal(product_of(after.population, 2, module), given_away)


def test_options_that_are_not_chosen_leave_old_evolutions_as_they_were():
    assert InheritanceOptions().model_dump(mode="json") == {"alpha": 0.5}
    assert InheritanceOptions(divide=True).model_dump(mode="json")["divide"] is True


def test_at_alpha_1_a_child_of_enough_rank_is_its_parent_on_the_product():
    after = inherit(1).apply(build_lifecycle_state(freed=(2,)), 0)
    for name in POPULATION_SHAPES:
        torch.testing.assert_close(
            product_of(after.population, 2, name),
            product_of(after.population, 0, name),
            atol=1e-5,
            rtol=1e-5,
        )


def test_the_parent_is_the_fittest_in_the_slots_domain():
    by_domain = [[0.1, 0.0, 0.0], [0.0, 0.0, 0.3], [0.0, 0.1, 0.0], [0.2, 0.0, 0.1]]
    fitness = build_fitness((0.9, 0.1, 0.1, 0.1), by_domain=by_domain)
    # Slot 0 is for "up", slot 2 for "side".
    for freed, parent in ((0, 3), (2, 1)):
        after = inherit(0.5).apply(build_lifecycle_state(fitness=fitness, freed=(freed,)), 0)
        assert after.parents == {freed: parent}
    state = build_lifecycle_state(fitness=fitness, freed=(2,), domains=(None,))
    assert inherit(0.5).apply(state, 0).parents == {2: 0}


def test_neither_the_dying_nor_newborns_are_parents():
    state = build_lifecycle_state((0.5, 0.4, 0.3, 0.2), freed=(0, 1), generations=(0, 0, 3, 0))
    after = inherit(0.5).apply(state, 0)
    assert after.parents == {0: 3, 1: 3}
    state = build_lifecycle_state(freed=(0, 1, 2), generations=(0, 0, 0, 3))
    with pytest.raises(PopulationError, match=r"a parent that lived before generation 3, got none"):
        inherit(0.5).apply(state, 0)


# --- crossover ---------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), share=st.floats(0, 1))
def test_each_layer_of_a_crossed_child_is_one_parents(seed, share):
    state = build_lifecycle_state(freed=(2,))  # rank 4: enough for both
    after = Crossover(CrossoverOptions(share=share)).apply(state, seed)
    child = after.population.slots[2]
    assert child.birth.parents == ("g0-s0", "g0-s1") and after.parents == {2: 0}
    assert ranks_of(child) == dict.fromkeys(POPULATION_SHAPES, 4)
    for name in POPULATION_SHAPES:
        found = product_of(after.population, 2, name)
        distances = [
            float((found - product_of(state.population, parent, name)).norm()) for parent in (0, 1)
        ]
        assert min(distances) < 1e-5
        if share in (0, 1):
            assert distances[int(share == 0)] < 1e-5


def test_both_parents_have_a_chance():
    sources = set()
    for seed in range(20):
        after = Crossover(CrossoverOptions()).apply(build_lifecycle_state(freed=(2,)), seed)
        found = product_of(after.population, 2, "block.1.down")
        sources.add(bool((found - product_of(after.population, 0, "block.1.down")).norm() < 1e-5))
    assert sources == {True, False}


def test_crossover_needs_two_parents():
    with pytest.raises(PopulationError, match=r"two parents .* got one\. Let fewer slots die"):
        Crossover(CrossoverOptions()).apply(build_lifecycle_state(freed=(0, 1, 2)), 0)


# --- mutation ----------------------------------------------------------------------------------


def make_newborn(alpha=1.0):
    return inherit(alpha).apply(build_lifecycle_state(freed=(2,)), 0)


def test_only_newborns_mutate():
    state = make_newborn()
    after = mutate(0.1, 0.1).apply(state, 1)
    assert [
        a is b for a, b in zip(after.population.slots, state.population.slots, strict=True)
    ] == [
        True,
        True,
        False,
        True,
    ]
    child, before = after.population.slots[2], state.population.slots[2]
    assert child.birth == replace(before.birth, operator="inheritance+svd-mutation")
    assert ranks_of(child) == ranks_of(before) and after.parents == state.parents


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.sampled_from([0.0, 1e-3, 0.05, 0.5]))
def test_singular_values_change_by_their_relative_size_alone(seed, size):
    state = make_newborn()
    after = mutate(size, 0).apply(state, seed)
    for name in POPULATION_SHAPES:
        old = product_of(state.population, 2, name)
        new = product_of(after.population, 2, name)
        u, values, vh = torch.linalg.svd(old)
        rank = int((values > 1e-6).sum())
        inside = u[:, :rank].T @ new @ vh[:rank].T  # diagonal: the vectors are the same
        changes = torch.log(torch.diagonal(inside) / values[:rank])
        assert float(changes.abs().max()) <= 6 * size + 1e-5
        rest = inside - torch.diag(torch.diagonal(inside))
        assert float(rest.norm()) < 1e-4 * float(old.norm())
        assert float(new.norm()) == pytest.approx(float(inside.norm()), rel=1e-4)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.sampled_from([0.0, 1e-3, 0.05]))
def test_vectors_turn_and_singular_values_stay(seed, size):
    state = make_newborn()
    after = mutate(0, size).apply(state, seed)
    for name in POPULATION_SHAPES:
        old = product_of(state.population, 2, name)
        new = product_of(after.population, 2, name)
        torch.testing.assert_close(
            torch.linalg.svdvals(new), torch.linalg.svdvals(old), atol=1e-4, rtol=1e-4
        )
        moved = float((new - old).norm() / old.norm())
        assert moved <= 6 * size + 1e-5
        assert size == 0 or moved > 0.1 * size


def test_a_fresh_newborn_stays_without_effect():
    after = mutate(0.5, 0.5).apply(make_newborn(alpha=0.0), 0)
    assert not any(u.b.any() for u in after.population.slots[2].updates.values())
    assert all(u.a.any() for u in after.population.slots[2].updates.values())


@pytest.mark.parametrize("rank", [1, 3, 5, 9])
def test_factors_of_any_rank_have_their_best_product(rank):
    update = build_population((9,)).slots[0].updates["block.0.up"]
    spectrum = decompose_product(update)
    assert len(spectrum.values) == 5 and torch.equal(
        spectrum.values, spectrum.values.sort(descending=True).values
    )
    again = rebuild(spectrum, rank, 0)
    a, b = truncate(update.product(), rank)
    assert again.rank == rank
    torch.testing.assert_close(again.product(), b @ a, atol=1e-4, rtol=1e-4)


# --- all of them, in order ---------------------------------------------------------------------

WHOLE = [
    ("death", {"threshold": 0.15, "patience": 1, "min_age": 1, "at_most": 2}),
    ("slot-reallocation", {}),
    ("inheritance", {"alpha": 0.5}),
    ("svd-mutation", {}),
]


@settings(max_examples=25, deadline=None)
@given(
    values=st.lists(st.floats(-1, 1), min_size=4, max_size=4),
    seed=st.integers(0, 2**32),
    filler=st.sampled_from([("inheritance", {"alpha": 0.25}), ("crossover", {})]),
    order=st.permutations(range(4)),
)
def test_any_lifecycle_is_deterministic_and_loses_no_slot(values, seed, filler, order):
    names = [WHOLE[0], WHOLE[1], filler, WHOLE[3]]
    steps = open_operators([names[place] for place in order], PLUGINS)
    population, fitness = build_population(), build_fitness(values)
    before = fingerprint_population(population)
    first, second = (
        run_lifecycle(steps, population, fitness, DOMAINS, generation=3, seed=seed)
        for _ in range(2)
    )
    assert fingerprint_population(population) == before
    assert fingerprint_population(first.population) == fingerprint_population(second.population)
    assert (first.events, first.parents, first.freed) == (
        second.events,
        second.parents,
        second.freed,
    )
    assert first.population.num_slots == 4
    newborn = [i for i, s in enumerate(first.population.slots) if s.birth.generation == 3]
    assert sorted(first.parents) == newborn
    for index, slot in enumerate(first.population.slots):
        if index not in newborn:
            assert slot.updates is population.slots[index].updates


def test_a_lifecycle_takes_parents_that_divide_and_leaves_their_products_alone():
    """Two children share one parent: it keeps a quarter, whatever mutates after it."""
    death = {"threshold": 0.05, "patience": 1, "min_age": 1, "at_most": 2}
    chosen = [("death", death), ("inheritance", {"divide": True}), ("svd-mutation", {})]
    population = build_population(domains=("up",))
    fitness = build_fitness((0.3, 0.2, -0.1, -0.1))
    steps = open_operators(chosen, PLUGINS)
    after = run_lifecycle(steps, population, fitness, DOMAINS, generation=3, seed=1)
    assert after.parents == {0: 0, 2: 0, 3: 0}
    births = [slot.birth for slot in after.population.slots]
    assert [one.id for one in births] == ["g3-s0", "g0-s1", "g3-s2", "g3-s3"]
    assert births[0].parents == ("g0-s0",) and births[0].operator == "inheritance"
    assert births[2].operator == "inheritance+svd-mutation"
    for name in POPULATION_SHAPES:
        kept = product_of(after.population, 0, name)
        torch.testing.assert_close(kept, 0.25 * product_of(population, 0, name))
    change = describe_change(population, after, kept=True)
    assert [one.slot for one in change.births] == [0, 2, 3]
    assert change.deaths == ("g0-s0", "g0-s2", "g0-s3")


def test_another_seed_gives_another_child():
    found = {
        fingerprint_population(
            run_lifecycle(
                open_operators(WHOLE, PLUGINS),
                build_population(),
                build_fitness((0.3, 0.2, 0.3, -0.1)),
                DOMAINS,
                generation=1,
                seed=seed,
            ).population
        )
        for seed in range(3)
    }
    assert len(found) == 3


@pytest.mark.parametrize("name", PLUGINS.lifecycle_operators.names())
def test_registered_operators_keep_the_contract(name):
    operator = PLUGINS.lifecycle_operators.resolve(name)
    assert check_operator(operator) is None
    with pytest.raises(ValidationError):
        operator.Options.model_validate({"unknown": 1})


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (InheritanceOptions, {"alpha": 1.1}),
        (InheritanceOptions, {"alpha": -0.1}),
        (DeathOptions, {"patience": 0}),
        (DeathOptions, {"threshold": float("nan")}),
        (DeathOptions, {"min_age": 0}),
        (CrossoverOptions, {"share": 2}),
        (SvdMutationOptions, {"values": -1}),
        (SvdMutationOptions, {"vectors": float("inf")}),
    ],
)
def test_options_out_of_range_are_refused(options, wrong):
    with pytest.raises(ValidationError):
        options(**wrong)
