"""The experts' adapters as routers may read them."""

import pytest
import torch

from molora_fed.bank import Expert, ExpertAdapters
from molora_fed.bank.adapters import make_up_adapters, open_adapters
from molora_fed.fusion.boundary import find_changes
from molora_fed.testing import build_random_adapter, build_synthetic_bank, permute_experts


def first_tensor(adapter):
    return next(iter(adapter.updates.values())).a


@pytest.fixture
def published(tiny_model):
    model = tiny_model()
    return {name: build_random_adapter(model, seed=n, name=name) for n, name in enumerate("ab")}


@pytest.fixture
def reads():
    return []


@pytest.fixture
def adapters(published, reads):
    def load(name):
        reads.append(name)
        return published[name]

    experts = [Expert("base", None), *(Expert(n, lambda n=n: load(n)) for n in published)]
    return ExpertAdapters(experts)


def test_adapters_are_read_when_they_are_asked_for_and_one_is_kept(adapters, published, reads):
    assert list(adapters) == ["base", "a", "b"] and len(adapters) == 3
    assert "a" in adapters and "c" not in adapters and adapters.get("c") is None
    assert adapters["base"] is None and reads == []
    assert adapters["a"] is adapters["a"] and reads == ["a"]
    assert adapters["b"].hash == published["b"].hash
    assert adapters["a"].name == "a" and reads == ["a", "b", "a"]
    with pytest.raises(KeyError):
        adapters["c"]


def test_what_is_handed_out_is_a_copy_and_changes_are_counted(adapters, published):
    before = first_tensor(published["a"]).clone()
    assert adapters.count_changes() == {"base": 0, "a": 0, "b": 0}
    first_tensor(adapters["a"]).zero_()
    with pytest.raises(TypeError):
        adapters["a"].updates["more"] = None
    assert adapters.count_changes()["a"] == 1
    assert torch.equal(first_tensor(adapters["a"]), before)
    first_tensor(adapters["a"]).zero_()
    assert adapters["b"] is not None  # another one is read before anybody looks
    assert adapters.count_changes() == {"base": 0, "a": 2, "b": 0}
    with torch.inference_mode():
        adapters.forget()
        assert torch.equal(first_tensor(adapters["a"]), before)
    assert adapters.count_changes()["a"] == 2


def test_a_stamp_of_the_bank_tells_of_a_changed_adapter():
    bank = build_synthetic_bank()
    before = bank.stamp()
    first_tensor(bank.adapters["expert-1"])
    assert find_changes(before, bank) == []
    first_tensor(bank.adapters["expert-1"]).mul_(2)
    assert find_changes(before, bank) == ["the adapter of expert-1"]


def test_some_experts_in_another_order_have_copies_of_their_own(adapters):
    taken = adapters.take(["b", "base"])
    assert list(taken) == ["b", "base"] and taken["b"] is not adapters["b"]
    moved = permute_experts(build_synthetic_bank(), [2, 0, 1])
    assert tuple(moved.adapters) == moved.expert_names


def test_made_up_adapters_read_where_their_domain_lies_and_are_always_the_same():
    adapters, again = (make_up_adapters(("base", "x", "y"), 16) for _ in range(2))
    assert adapters["base"] is None
    for name in ("x", "y"):
        assert adapters[name].hash == again[name].hash
        assert set(adapters.entry.modules) < set(adapters[name].updates)
    assert adapters["x"].hash != adapters["y"].hash
    bank = build_synthetic_bank(hidden_size=16)
    for index, adapter in enumerate(bank.adapters.values()):
        mean = bank.prefix_hidden[torch.from_numpy(bank.domain_of) == index].mean((0, 1))
        read = torch.linalg.svd(next(iter(adapter.updates.values())).product())[2][0]
        assert abs(torch.cosine_similarity(read, mean, dim=0)) > 0.8


def test_where_the_state_enters_is_looked_for_once(tiny_model):
    model = tiny_model()
    adapters = open_adapters([Expert("base", None)], model, 1)
    assert adapters.entry is adapters.entry
    assert adapters.take(["base"]).entry is adapters.entry
    assert adapters.entry.block.endswith(".1")
