"""Options of kinds: which layers are trained, how numbers are written, and how many bytes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molora_fed.adapters.budget import PackingCost, divide_budget
from molora_fed.adapters.contract import AdapterKind, choose_modules, open_kind
from molora_fed.adapters.files import WEIGHTS_FILE, load_adapter
from molora_fed.adapters.kinds import DeltaKind, LoraKind, SvdKind
from molora_fed.adapters.updates import decompose
from molora_fed.charter import AdapterRules
from molora_fed.errors import AdapterError
from molora_fed.models.layout import adaptable_modules
from molora_fed.plugins import get_plugins

# PEFT 0.21 asks transformers 5 for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

ATTENTION = {
    "gpt_neox": {"query_key_value", "dense"},
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "qwen3": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "gemma2": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "gpt2": {"c_attn", "c_proj"},
}


@pytest.mark.parametrize("architecture", sorted(ATTENTION))
def test_attention_is_found_in_every_architecture(architecture, tiny_model):
    chosen = choose_modules(tiny_model(architecture), 1, "attention")
    assert {name.rpartition(".")[2] for name in chosen} == ATTENTION[architecture]
    assert all("mlp" not in name for name in chosen)


def test_names_and_endings_choose_as_peft_matches(tiny_model):
    model = tiny_model("gpt_neox")
    chosen = choose_modules(model, 0, ("query_key_value",))
    assert len(chosen) == 2
    full = min(chosen)
    assert list(choose_modules(model, 0, (full,))) == [full]
    assert choose_modules(model, 0) == adaptable_modules(model, 0)


@pytest.mark.parametrize("targets", [("q_proj",), ("query_key_value", "q_proj"), ()])
def test_names_of_no_layer_are_refused(targets, tiny_model):
    with pytest.raises(AdapterError, match="expected targets among its linear layers"):
        choose_modules(tiny_model("gpt_neox"), 0, targets)


@pytest.mark.parametrize("name", ["lora", "svd", "delta"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "int4", "int2"])
def test_training_under_options_ships_what_they_say(name, precision, tiny_model, train):
    kind = open_kind(name, {"targets": "attention", "precision": precision}, get_plugins())
    trained = train(kind, tiny_model("gpt_neox"))
    assert all(".attention." in module for module in trained.adapter.updates)
    assert len(trained.adapter.updates) == 4
    assert trained.adapter.kind == name
    base = dict(trained.base.named_parameters())
    for module, parameter in trained.model.named_parameters():
        if name == "delta" and ".attention." not in module:
            assert torch.equal(parameter, base[module])


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        (LoraKind, {"precison": "int4"}, "precison"),
        (LoraKind, {"precision": "int3"}, "precision"),
        (LoraKind, {"budget_bytes": 1000}, "budget_bytes"),
        (DeltaKind, {"group": 1}, "group"),
        (SvdKind, {"budget_bytes": 0}, "budget_bytes"),
    ],
)
def test_unknown_options_are_refused_by_name(kind, options, named):
    with pytest.raises(AdapterError, match=f"kind '{kind.name}'.*{named}"):
        kind(options)


def test_a_kind_without_options_refuses_all():
    class Plain(AdapterKind):
        name = "plain"
        prepare = export = load = None

    assert Plain().options is not None
    with pytest.raises(AdapterError, match="the keys none"):
        Plain({"targets": "attention"})


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "int4", "int2"])
@pytest.mark.parametrize("share", [0.2, 0.6])
def test_svd_stays_within_its_budget(precision, share, tiny_model, train):
    base = tiny_model("gpt_neox")
    whole = train(SvdKind({"precision": precision}), base, rank=32)
    budget = int(share * whole.adapter.num_bytes) + 1000
    small = train(SvdKind({"precision": precision, "budget_bytes": budget}), base, rank=31)
    size = (small.folder / WEIGHTS_FILE).stat().st_size
    assert 0.6 * budget < size <= budget
    assert small.adapter.max_rank <= 31


def test_a_budget_of_an_untrained_difference_is_no_error(tiny_model, tmp_path):
    base, kind = tiny_model("gpt_neox"), SvdKind({"budget_bytes": 5000})
    model, _ = kind.prepare(base, AdapterRules(), 4)
    kind.export(model, base, tmp_path / "a", 4, AdapterRules())
    updates = load_adapter(tmp_path / "a").updates
    assert updates and not any(bool(update.product().any()) for update in updates.values())


def test_a_budget_for_nothing_is_refused(tiny_model, train):
    with pytest.raises(AdapterError, match="one direction of one layer, got 100 bytes"):
        train(SvdKind({"budget_bytes": 100}), tiny_model("gpt_neox"))


def test_a_budget_s_ranks_differ_by_layer_and_load_in_peft(
    tiny_model, train, tokens, logits, tmp_path
):
    from peft import PeftModel

    from molora_fed.adapters.compatibility import applied

    base = tiny_model("gpt_neox")
    trained = train(SvdKind({"budget_bytes": 9000}), base, rank=16)
    ranks = {update.rank for update in trained.adapter.updates.values()}
    assert len(ranks) > 1
    with applied(base, trained.adapter) as model:
        ours = logits(model, tokens)
    theirs = logits(PeftModel.from_pretrained(base, trained.folder), tokens)
    assert torch.allclose(ours, theirs, atol=1e-4)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 1000),
    budget=st.integers(200, 40_000),
    bits=st.sampled_from([2, 4, 8, 16, 32]),
    modules=st.integers(1, 5),
    growth=st.sampled_from([0, 4]),
)
def test_a_budget_is_used_up_and_never_passed(seed, budget, bits, modules, growth):
    generator = torch.Generator().manual_seed(seed)
    shapes = {f"m{i}": (8 + growth * i, 12) for i in range(modules)}
    values = {
        name: torch.rand(min(shape), generator=generator).sort(descending=True).values
        for name, shape in shapes.items()
    }
    cost = PackingCost(bits, 16 if bits < 16 else None)
    ranks = divide_budget(values, shapes, budget_bytes=budget, cost=cost)
    price = {name: cost.row(rows) + cost.row(columns) for name, (rows, columns) in shapes.items()}
    spent = sum(rank * price[name] + cost.header(name) for name, rank in ranks.items())
    assert spent <= budget
    kept = [float(values[name][rank - 1]) for name, rank in ranks.items()]
    for name, rank in ranks.items():
        if rank < len(values[name]):
            assert price[name] > budget - spent - 96
            if growth == 0:  # directions of equal cost: the largest ones are kept
                assert float(values[name][rank]) <= min(kept)


def test_a_spectrum_gives_its_matrix_back():
    matrix = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    spectrum = decompose(matrix)
    assert spectrum.shape == (5, 8)
    a, b = spectrum.factors(99)
    assert torch.allclose(b @ a, matrix, atol=1e-5)


def test_a_lora_of_int4_measures_what_it_ships(tiny_model, train, tokens, logits):
    from molora_fed.adapters.compatibility import applied

    trained = train(LoraKind({"precision": "int4"}), tiny_model("gpt_neox"))
    again = load_adapter(trained.folder, rules=AdapterRules())
    with applied(trained.base, again) as model:
        shipped = logits(model, tokens)
    assert not torch.equal(shipped, logits(trained.model, tokens))
    assert (shipped - logits(trained.model, tokens)).abs().mean() < 0.1
