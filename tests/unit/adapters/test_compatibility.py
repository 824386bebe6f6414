from dataclasses import replace

import pytest
import torch

from molora_fed.adapters.compatibility import (
    check_adapter_fits,
    find_misfits,
    find_non_finite,
    matches_target,
)
from molora_fed.adapters.updates import LinearUpdate
from molora_fed.charter import AdapterRules
from molora_fed.errors import IncompatibleAdapterError
from molora_fed.testing.models import build_random_adapter


@pytest.mark.parametrize("kind", ["lora", "delta"])
def test_a_good_adapter_fits(kind, model):
    adapter = build_random_adapter(model, kind=kind)
    assert find_misfits(adapter, model, rules=AdapterRules()) == []
    assert find_non_finite(adapter) == []
    check_adapter_fits(adapter, model, rules=AdapterRules())


def test_a_block_below_the_charter_s_frozen_depth(model):
    adapter = build_random_adapter(model, frozen_depth=0, name="legal-07")
    with pytest.raises(IncompatibleAdapterError, match="block 0 below the frozen depth 1"):
        check_adapter_fits(adapter, model, rules=AdapterRules(frozen_depth=1))
    lying = replace(adapter, frozen_depth=1)
    with pytest.raises(IncompatibleAdapterError, match="block 0 below the frozen depth 1"):
        check_adapter_fits(lying, model)


def test_a_frozen_depth_beyond_the_model(model):
    adapter = replace(build_random_adapter(model), frozen_depth=7)
    assert find_misfits(adapter, model) == [
        "frozen depth: expected below the base's 2 blocks, got 7"
    ]


def test_all_offenders_are_collected(tiny_model):
    model = tiny_model("gpt2")
    adapter = build_random_adapter(model, kind="delta", name="legal-07")
    names = list(adapter.updates)
    updates = dict(adapter.updates)
    updates["lm_head"] = updates[names[0]]
    updates[names[1]] = LinearUpdate(dense=torch.zeros(2, 2))
    updates[names[2]] = replace(updates[names[2]], bias=torch.zeros(3))
    updates[names[3]] = replace(updates[names[3]], dense=updates[names[3]].dense.int())
    broken = updates[names[4]].dense.clone()
    broken[0, 0] = torch.nan
    updates[names[4]] = replace(updates[names[4]], dense=broken)
    with pytest.raises(IncompatibleAdapterError) as caught:
        check_adapter_fits(replace(adapter, updates=updates), model)
    line = str(caught.value)
    assert "\n" not in line and "'legal-07'" in line and "GPT2LMHeadModel" in line
    for name in ("lm_head", *names[1:4], f"{names[4]}.dense"):
        assert f"{name}" in line


def test_many_offenders_are_counted(tiny_model):
    adapter = build_random_adapter(tiny_model("llama"))
    with pytest.raises(IncompatibleAdapterError, match="and 9 more"):
        check_adapter_fits(adapter, tiny_model("gpt_neox"))


def test_rank_kind_and_emptiness(tiny_model):
    model = tiny_model()
    adapter = build_random_adapter(model, rank=5)
    assert find_misfits(adapter, model, rules=AdapterRules(max_rank=4, kinds=("svd",))) == [
        "kind: expected one of svd, got lora",
        "rank: expected at most 4, got 5",
    ]
    empty = replace(adapter, updates={}, targets=None)
    assert find_misfits(empty, model) == ["updates: expected at least one, got none"]


def test_a_bias_change_where_there_is_no_bias(tiny_model):
    model = tiny_model("llama")
    adapter = build_random_adapter(model, kind="delta")
    name = next(iter(adapter.updates))
    update = replace(adapter.updates[name], bias=torch.zeros(32))
    found = find_misfits(replace(adapter, updates={**adapter.updates, name: update}), model)
    assert found == [f"{name}.bias: expected no bias, got (32,)"]


def test_targets_match_whole_name_parts():
    assert matches_target("h.0.mlp.fc", ("fc",))
    assert matches_target("h.0.mlp.fc", ("mlp.fc",))
    assert matches_target("h.0.mlp.fc", ("h.0.mlp.fc",))
    assert not matches_target("h.0.mlp.cfc", ("fc",))
    assert not matches_target("h.0.mlp.fc", ("mlp",))
