import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel

from molora_fed.adapters.compatibility import applied
from molora_fed.adapters.files import ADAPTER_FILES, check_adapter_fits
from molora_fed.adapters.kinds import DeltaKind, LoraKind, SvdKind
from molora_fed.adapters.updates import truncate
from molora_fed.charter import AdapterRules
from molora_fed.errors import AdapterError
from molora_fed.models.layout import adaptable_modules, weight_of
from molora_fed.plugins import load_plugins

# PEFT 0.21 asks transformers 5 for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def flags(model):
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def test_preparing_gives_the_base_and_leaves_it_alone(kind, model, tokens, logits):
    model.train()
    before, before_flags = logits(model, tokens), flags(model)
    prepared, parameters = kind.prepare(model, AdapterRules(), 4, seed=1)
    assert torch.equal(logits(prepared, tokens), before)
    assert parameters and all(parameter.requires_grad for parameter in parameters)
    assert {id(p) for p in parameters} == {id(p) for p in prepared.parameters() if p.requires_grad}
    assert flags(model) == before_flags
    assert model.training


def test_training_changes_neither_base_nor_what_is_frozen(kind, model, train, tokens, logits):
    base = copy.deepcopy(model)
    trained = train(kind, model, frozen_depth=1)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, base.get_parameter(name)), name
    # What cannot change is not copied: it is the base's own memory.
    memory = {parameter.data_ptr() for parameter in trained.model.parameters()}
    free = tuple(f"{name}." for name in adaptable_modules(model, 1))
    frozen = [p for name, p in model.named_parameters() if not name.startswith(free)]
    assert frozen and all(parameter.data_ptr() in memory for parameter in frozen)
    assert not torch.equal(logits(trained.model, tokens), logits(base, tokens))


def test_frozen_depth_keeps_the_rest_bit_identical(kind, model, train):
    before = {name: p.clone() for name, p in model.named_parameters()}
    trained = train(kind, model, frozen_depth=1)
    free = tuple(f"{name}." for name in adaptable_modules(model, 1))
    changed = set()
    with applied(model, trained.adapter):
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all(name.startswith(free) for name in changed)
    assert {n.rpartition(".")[0] + "." for n in changed} == set(free)
    has_bias = any(name.endswith(".bias") for name in changed)
    expects_bias = kind.name == "delta" and any(f"{n[:-1]}.bias" in before for n in free)
    assert has_bias == expects_bias


@pytest.mark.parametrize("low_rank", [LoraKind, SvdKind])
@pytest.mark.parametrize("frozen_depth", [0, 1])
def test_plain_peft_gives_the_same_logits(
    low_rank, frozen_depth, model, train, tokens, logits, tiny_model, architecture
):
    trained = train(low_rank(), model, frozen_depth=frozen_depth)
    with applied(model, trained.adapter):
        ours = logits(model, tokens)
    peft_model = PeftModel.from_pretrained(tiny_model(architecture), trained.folder).eval()
    assert torch.allclose(logits(peft_model, tokens), ours, atol=1e-5)
    assert not torch.allclose(logits(model, tokens), ours, atol=1e-2)


@pytest.mark.parametrize("exact", [LoraKind, DeltaKind])
def test_applied_adapter_equals_the_trained_model(exact, model, train, tokens, logits):
    trained = train(exact(), model)
    expected = logits(trained.model, tokens)  # outside: a LoRA model shares the base's weights
    with applied(model, trained.adapter):
        assert torch.allclose(logits(model, tokens), expected, atol=1e-5)


def test_svd_of_full_rank_equals_the_trained_model(model, train, tokens, logits):
    trained = train(SvdKind(), model, rank=48)
    with applied(model, trained.adapter):
        assert torch.allclose(logits(model, tokens), logits(trained.model, tokens), atol=1e-4)


def test_svd_ships_the_best_approximation_of_the_trained_difference(model, train):
    trained = train(SvdKind(), model, rank=3)
    for name, module in adaptable_modules(model, 0).items():
        own = weight_of(trained.model.get_submodule(name)).detach()
        difference = (own - weight_of(module)).double()
        left = torch.linalg.svdvals(difference)[3:].square().sum().sqrt()
        error = (difference - trained.adapter.updates[name].product().double()).norm()
        assert trained.adapter.updates[name].rank == 3
        assert torch.isclose(error, left, rtol=1e-4), name


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 8), columns=st.integers(1, 8), rank=st.integers(1, 10),
    seed=st.integers(0, 10_000),
)  # fmt: skip
def test_truncation_beats_every_other_product_of_that_rank(rows, columns, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    difference = torch.randn(rows, columns, generator=generator)
    a, b = truncate(difference, rank)
    kept = min(rank, rows, columns)
    assert a.shape == (kept, columns) and b.shape == (rows, kept)
    error = (difference - b @ a).norm()
    # Any B @ A of that rank: B random, A the best for it by least squares.
    other = torch.randn(rows, kept, generator=generator)
    best = other @ torch.linalg.lstsq(other, difference).solution
    assert error <= (difference - best).norm() + 1e-4


def test_equal_training_gives_equal_bytes(kind, tiny_model, train, tmp_path):
    first = train(kind, tiny_model("llama"))
    contents = {n: (first.folder / n).read_bytes() for n in ADAPTER_FILES}
    again = train(kind, tiny_model("llama"))
    assert {n: (again.folder / n).read_bytes() for n in ADAPTER_FILES} == contents
    assert again.adapter.hash == first.adapter.hash


def test_lora_seed_decides_its_first_factors(tiny_model):
    model = tiny_model()
    state = torch.get_rng_state()
    one, same, other = (LoraKind().prepare(model, AdapterRules(), 2, seed=s)[1] for s in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["lora", "svd"])
@pytest.mark.parametrize("rank", [0, 9])
def test_refuses_a_rank_that_admission_would_refuse(name, rank, tiny_model):
    kind = load_plugins().adapter_kinds.resolve(name)()
    with pytest.raises(AdapterError, match=f"rank from 1 to 8, got {rank}"):
        kind.prepare(tiny_model(), AdapterRules(max_rank=8), rank)


def test_meta_is_written_and_read(kind, tiny_model, tmp_path):
    base = tiny_model("qwen3")
    rules = AdapterRules(frozen_depth=1)
    prepared, _ = kind.prepare(base, rules, 2)
    kind.export(prepared, base, tmp_path / "a", 2, rules, base_weights="ab" * 32)
    adapter = kind.load(tmp_path / "a", rules, name="me")
    assert (adapter.name, adapter.kind, adapter.frozen_depth) == ("me", kind.name, 1)
    assert adapter.base_weights == "ab" * 32
    assert adapter.num_bytes == (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
    check_adapter_fits(adapter, base, rules=rules, finite=False)
    with pytest.raises(AdapterError, match="changes 0 of 7 modules"):  # not trained yet
        check_adapter_fits(adapter, base, rules=rules)


def test_shapes_that_limit_the_rank_still_load_in_peft(tiny_model, train, tokens, logits):
    # gpt_neox: all layers have min(D_in, D_out) = 32; rank 40 is cut to 32 in every module.
    trained = train(SvdKind(), tiny_model(), rank=40)
    assert trained.adapter.max_rank == 32
    peft_model = PeftModel.from_pretrained(tiny_model(), trained.folder).eval()
    with applied(trained.base, trained.adapter):
        assert torch.allclose(logits(peft_model, tokens), logits(trained.base, tokens), atol=1e-5)
