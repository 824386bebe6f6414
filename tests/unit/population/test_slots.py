from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molora_fed.adapters.files import load_adapter
from molora_fed.adapters.save import save_adapter
from molora_fed.adapters.updates import LinearUpdate, truncate
from molora_fed.errors import MoloraError, PopulationError
from molora_fed.models.layout import adaptable_modules, weight_of
from molora_fed.population.slots import (
    check_population,
    make_fresh_updates,
    make_population,
    slot_adapter,
)
from molora_fed.testing.models import build_random_adapter

BASE = "ab" * 32


@pytest.fixture
def base(tiny_model):
    return SimpleNamespace(model=tiny_model(), weights=BASE)


def name_adapters(base, *specs):
    """(name, domain, adapter) of each kind and rank."""
    named = []
    for seed, (kind, rank) in enumerate(specs):
        adapter = build_random_adapter(base.model, kind=kind, rank=rank, seed=seed)
        named.append((f"contribution-{seed}", f"domain-{seed}", adapter))
    return named


def products(slot):
    return {name: update.product() for name, update in slot.updates.items()}


def test_one_slot_an_adapter_in_their_order(base):
    adapters = name_adapters(base, ("lora", 4), ("svd", 2))
    population = make_population(base, adapters, num_slots=2)
    assert (population.base_weights, population.frozen_depth) == (BASE, 0)
    assert [slot.birth.id for slot in population.slots] == ["g0-s0", "g0-s1"]
    for slot, (name, domain, adapter) in zip(population.slots, adapters, strict=True):
        assert (slot.birth.operator, slot.birth.parents) == ("admitted", (name,))
        assert (slot.birth.generation, slot.stale, slot.domain) == (0, 0, domain)
        for module, update in adapter.updates.items():
            assert torch.equal(slot.updates[module].product(), update.product())
            assert slot.updates[module].a.data_ptr() != update.a.data_ptr()


def test_clones_in_turn(base):
    adapters = name_adapters(base, ("lora", 4), ("svd", 2))
    slots = make_population(base, adapters, num_slots=5).slots
    assert [slot.birth.operator for slot in slots] == ["admitted"] * 2 + ["clone"] * 3
    assert [slot.birth.parents for slot in slots[2:]] == [("g0-s0",), ("g0-s1",), ("g0-s0",)]
    for clone, parent in zip(slots[2:], (slots[0], slots[1], slots[0]), strict=True):
        assert clone.domain == parent.domain
        for name, product in products(clone).items():
            assert torch.equal(product, products(parent)[name])


def test_fresh_slots_change_nothing_and_differ(base):
    adapters = name_adapters(base, ("lora", 4))
    slots = make_population(base, adapters, num_slots=3, filling="fresh", seed=5).slots
    modules = adaptable_modules(base.model, 0)
    for slot in slots[1:]:
        assert (slot.birth.operator, slot.birth.parents, slot.domain) == ("fresh", (), None)
        assert list(slot.updates) == list(modules)
        assert {update.rank for update in slot.updates.values()} == {4}
        assert all(bool((product == 0).all()) for product in products(slot).values())
        assert all(bool(update.a.any()) for update in slot.updates.values())
    first, second = (slot.updates[next(iter(modules))].a for slot in slots[1:])
    assert not torch.equal(first, second)
    again = make_population(base, adapters, num_slots=3, filling="fresh", seed=5).slots
    other = make_population(base, adapters, num_slots=3, filling="fresh", seed=6).slots
    for name in modules:
        assert torch.equal(again[2].updates[name].a, slots[2].updates[name].a)
        assert not torch.equal(other[2].updates[name].a, slots[2].updates[name].a)


def test_fresh_slots_leave_frozen_blocks_alone(base):
    population = make_population(
        base, [], num_slots=2, rank=3, filling="fresh", frozen_depth=1, seed=0
    )
    assert population.frozen_depth == 1
    assert set(population.slots[0].updates) == set(adaptable_modules(base.model, 1))


def test_a_rank_shortens_longer_slots_and_differences_by_svd(base):
    adapters = name_adapters(base, ("lora", 6), ("delta", 0), ("lora", 2))
    long, dense, short = make_population(base, adapters, num_slots=3, rank=3).slots
    assert {update.rank for update in long.updates.values()} == {3}
    assert {update.rank for update in short.updates.values()} == {2}
    for slot, (_, _, adapter) in ((long, adapters[0]), (dense, adapters[1])):
        for name, update in adapter.updates.items():
            a, b = truncate(update.product(), 3)
            assert torch.allclose(slot.updates[name].product(), b @ a, atol=1e-6)
            assert slot.updates[name].bias is None
    name, update = next(iter(adapters[2][2].updates.items()))
    assert torch.equal(short.updates[name].a, update.a)


def test_a_slot_as_an_adapter_saves_in_pefts_format(base, tmp_path):
    adapters = name_adapters(base, ("lora", 4), ("delta", 0))
    population = make_population(base, adapters, num_slots=2, rank=4)
    hashes = set()
    for index, slot in enumerate(population.slots):
        adapter = slot_adapter(population, index)
        assert (adapter.name, adapter.base_weights) == (slot.birth.id, BASE)
        save_adapter(adapter, base.model, tmp_path / str(index))
        loaded = load_adapter(tmp_path / str(index))
        for name, product in products(slot).items():
            assert torch.allclose(loaded.updates[name].product(), product, atol=1e-7)
        hashes |= {adapter.hash, slot_adapter(population, index).hash}
    assert len(hashes) == 2


@settings(max_examples=20, deadline=None)
@given(
    rank=st.integers(1, 12),
    shape=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    seed=st.integers(0, 2**32 - 1),
)
def test_fresh_updates_are_decided_by_their_seed(rank, shape, seed):
    shapes = {"first": shape, "second": shape}
    updates, again = (make_fresh_updates(shapes, rank, seed) for _ in range(2))
    for name, update in updates.items():
        assert update.shape == shape
        assert update.rank == rank
        assert float(update.a.abs().max()) <= shape[1] ** -0.5
        assert torch.equal(update.a, again[name].a)
        assert not bool(update.product().any())


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (0, {"num_slots": 0}, "at least 1 slots"),
        (0, {"num_slots": 2, "rank": 4}, "expected adapters, or fresh filling and a rank"),
        (0, {"num_slots": 2, "filling": "fresh"}, "expected adapters, or fresh filling and a rank"),
        (2, {"num_slots": 1}, "at least 2 slots for 2 adapters, got 1"),
        (1, {"num_slots": 1, "rank": 0}, "rank of at least 1, got 0"),
        (1, {"num_slots": 2, "filling": "copy"}, "expected filling 'clone' or 'fresh'"),
    ],
)
def test_refuses_what_makes_no_population(count, options, message, base):
    adapters = name_adapters(base, *[("lora", 2)] * count)
    with pytest.raises(PopulationError, match=message):
        make_population(base, adapters, **options)


def test_refuses_a_difference_without_a_rank(base):
    with pytest.raises(PopulationError, match="'contribution-0': expected a rank"):
        make_population(base, name_adapters(base, ("delta", 0)), num_slots=1)


def test_refuses_fresh_updates_of_rank_0():
    with pytest.raises(PopulationError, match="rank of at least 1, got 0"):
        make_fresh_updates({"layer": (4, 4)}, 0, seed=0)


def test_refuses_adapters_of_another_base(base):
    adapter = build_random_adapter(base.model)
    adapters = [("own", None, adapter), ("other", None, replace(adapter, base_weights="cd" * 32))]
    with pytest.raises(PopulationError, match=r"base abababababab, got 'other' on cdcdcdcdcdcd"):
        make_population(base, adapters, num_slots=2)


def test_refuses_an_adapter_of_another_shape(base, tiny_model):
    other = build_random_adapter(tiny_model("llama"))
    with pytest.raises(PopulationError, match="expected a linear layer in blocks"):
        make_population(base, [("llama", None, other)], num_slots=1)


def break_update(base, change):
    """A population whose second slot's first update is changed."""
    population = make_population(base, name_adapters(base, ("lora", 2), ("lora", 2)), num_slots=2)
    slot = population.slots[1]
    name = next(iter(slot.updates))
    updates = {**slot.updates, name: change(slot.updates[name])}
    return replace(population, slots=(population.slots[0], replace(slot, updates=updates)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda u: replace(u, a=u.a * torch.nan), "NaN or infinity"),
        (lambda u: replace(u, b=u.b * torch.inf), "NaN or infinity"),
        (lambda u: replace(u, scale=float("nan")), "NaN or infinity"),
        (lambda u: replace(u, a=u.a[:0], b=u.b[:, :0]), "rank 0"),
        (lambda u: LinearUpdate(dense=u.product()), "a dense difference"),
        (lambda u: replace(u, bias=torch.zeros(len(u.b))), "a change of the bias"),
        (lambda u: replace(u, a=u.a[:, 1:]), "expected a change of shape"),
    ],
)
def test_refuses_a_slot_that_cannot_run(change, message, base):
    population = break_update(base, change)
    with pytest.raises(PopulationError, match=f"slot 'g0-s1': .*{message}") as caught:
        check_population(population, base.model)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, MoloraError)
    assert caught.value.exit_code == 40


def test_refuses_an_empty_population_twins_and_slots_without_updates(base):
    population = make_population(base, name_adapters(base, ("lora", 2)), num_slots=1)
    with pytest.raises(PopulationError, match="got no slot"):
        check_population(replace(population, slots=()), base.model)
    with pytest.raises(PopulationError, match="two slots of id 'g0-s0'"):
        check_population(replace(population, slots=population.slots * 2), base.model)
    bare = replace(population.slots[0], updates={})
    with pytest.raises(PopulationError, match="slot 'g0-s0': no update"):
        check_population(replace(population, slots=(bare,)), base.model)


def test_refuses_a_slot_below_the_frozen_depth(base):
    population = make_population(base, name_adapters(base, ("lora", 2)), num_slots=1)
    with pytest.raises(PopulationError, match="below the frozen depth 1"):
        check_population(replace(population, frozen_depth=1), base.model)


@pytest.mark.parametrize("architecture", ["gpt2"], indirect=True)
def test_shapes_are_those_of_linear_orientation(model):
    population = make_population(
        SimpleNamespace(model=model, weights=BASE), [], num_slots=1, rank=2, filling="fresh"
    )
    modules = adaptable_modules(model, 0)
    for name, update in population.slots[0].updates.items():
        assert update.shape == tuple(weight_of(modules[name]).shape)
