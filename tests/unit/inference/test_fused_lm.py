"""`FusedForCausalLM` read in one pass says what its experts, run one by one, say; saved, too."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from adaptation_helpers import build_population, build_router
from fused_helpers import (
    ALL_COLUMNS,
    ProbeRouter,
    build_fused,
    random_tokens,
    reference_forward,
)
from molora_kalavai.evidence import EvidenceRouter
from molora_kalavai.uniform import UniformRouter

from molora_fed.adapters.compatibility import applied
from molora_fed.bank import Expert, build_held_out_bank
from molora_fed.bank.views import GateView
from molora_fed.corpus.blocks import Blocks
from molora_fed.errors import BaseCheckpointError, RoutingError, ShapeError
from molora_fed.inference.fused_build import build_causal_lm
from molora_fed.inference.fused_lm import FusedForCausalLM
from molora_fed.inference.mixing import mix_distributions
from molora_fed.inference.opening import PlainModel
from molora_fed.models.base import load_base
from molora_fed.models.forward import run_blocks
from molora_fed.models.runtime import Placement
from molora_fed.models.states import Capture
from molora_fed.population.bundle import EvolvedModel
from molora_fed.population.mixture import Mixture
from molora_fed.routing.top_k import limit_experts
from molora_fed.testing import ARCHITECTURES, build_random_adapter
from molora_fed.types import Split

END = 256


@pytest.fixture(scope="module", params=ARCHITECTURES)
def base(request, tiny_checkpoint):
    return load_base(tiny_checkpoint(request.param))


@pytest.fixture(scope="module")
def neox(tiny_checkpoint):
    return load_base(tiny_checkpoint())


def two_documents():
    """Tokens (2, 24) and where documents start; the second text has two."""
    tokens = random_tokens(2, 24)
    tokens[1, 8] = END
    starts = torch.zeros(2, 24, dtype=torch.bool)
    starts[:, 0] = True
    starts[1, 9] = True
    return tokens, starts


def check_equal(fused):
    tokens, starts = two_documents()
    expected, gates = reference_forward(fused, tokens, starts)
    output = build_causal_lm(fused)(input_ids=tokens)
    assert gates.std() > 0.01  # gates that do not move would prove nothing
    torch.testing.assert_close(output.gates, gates, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.logits, expected, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(output.logits.exp().sum(-1), torch.ones(2, 24), atol=1e-5, rtol=0)


@pytest.mark.parametrize("mixture", ["probability", "logit"])
@pytest.mark.parametrize("kinds", [("lora", None, "delta"), ("svd", "lora")])
def test_a_fused_model_is_its_experts_run_one_by_one(base, mixture, kinds):
    check_equal(build_fused(base, columns=ALL_COLUMNS, mixture=mixture, kinds=kinds))


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("kinds", [("lora", None), ("lora", "lora", "delta")])
@pytest.mark.parametrize("column", ALL_COLUMNS)
def test_every_reading_alone(neox, column, kinds, depth):
    check_equal(build_fused(neox, columns=(column,), kinds=kinds, depth=depth))


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("mixture", ["probability", "logit"])
def test_only_the_best_experts_of_a_token(neox, mixture, top_k):
    fused = build_fused(neox, columns=("base_hidden", "evidence"), mixture=mixture)
    kept = limit_experts(ProbeRouter, top_k)
    router = kept(3, fused.router.options, fused.router.state_tensors())
    check_equal(replace(fused, router=router))


def test_experts_that_change_other_layers_each(neox):
    fused = build_fused(neox, columns=ALL_COLUMNS, kinds=("lora", "delta", "lora"), depth=0)

    def keep(expert, chosen):
        updates = {n: u for n, u in expert.adapter.updates.items() if chosen(n)}
        return replace(expert, adapter=replace(expert.adapter, updates=updates, targets=None))

    experts = (
        keep(fused.experts[0], lambda name: "layers.1" in name),
        keep(fused.experts[1], lambda name: "attention" in name),
        keep(fused.experts[2], lambda name: "mlp" in name),
    )
    check_equal(replace(fused, experts=experts))


@pytest.mark.parametrize("mixture", ["probability", "logit"])
def test_losses_are_the_banks(neox, mixture, tmp_path):
    kinds = (None, "lora", "delta")  # a bank has the base first
    fused = build_fused(neox, columns=ALL_COLUMNS, mixture=mixture, kinds=kinds)
    random = np.random.default_rng(1)
    documents = np.sort(random.integers(0, 3, (5, 20), dtype=np.int32), axis=1)
    tokens = random.integers(0, 256, (5, 20), dtype=np.int32)
    blocks = Blocks("one", Split.HELD_OUT, tokens, documents, documents.copy())
    bank = build_held_out_bank(
        tmp_path,
        neox,
        [Expert(expert.name, expert.adapter) for expert in fused.experts],
        [blocks],
        readings=frozenset(ALL_COLUMNS),
        mixture=mixture,
        frozen_depth=1,
    )
    rows = slice(0, 5)
    gates = fused.router.gates(bank.view(rows))
    output = build_causal_lm(fused)(
        input_ids=torch.from_numpy(tokens).long(),
        document_starts=torch.from_numpy(blocks.document_starts),
    )
    nll = -output.logits[:, :-1].gather(-1, bank.tokens[:, 1:, None].long()).squeeze(-1)
    torch.testing.assert_close(output.gates, gates, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(nll, bank.nll(gates, rows), atol=1e-5, rtol=1e-5)


def build_evolved(base):
    router = build_router()
    with torch.no_grad():  # gates that differ by token and slot
        router.weight.copy_(torch.randn(router.weight.shape, generator=torch.manual_seed(3)))
    return EvolvedModel(base, build_population(base), router.eval(), "parallel-sigmoid")


def test_an_evolved_model_is_its_population_mixed_in_the_layers(base):
    evolved = build_evolved(base)
    tokens, starts = two_documents()
    (step,) = run_blocks(base.model, tokens, capture=Capture(hidden=True))
    gates = evolved.router(GateView(document_starts=starts, base_hidden=step.hidden.clone()))
    with Mixture(base.model, evolved.population).mixed(gates), torch.no_grad():
        expected = base.model(tokens).logits.log_softmax(-1)
    output = build_causal_lm(evolved)(input_ids=tokens)
    assert gates.std() > 0.05
    torch.testing.assert_close(output.gates, gates, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(output.logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [None, "lora", "delta"])
def test_a_plain_model_is_itself(base, kind):
    adapter = None if kind is None else build_random_adapter(base.model, kind=kind)
    tokens, _ = two_documents()
    with applied(base.model, adapter), torch.no_grad():
        expected = base.model(tokens).logits.log_softmax(-1)
    lm = build_causal_lm(PlainModel(base, adapter))
    torch.testing.assert_close(lm(input_ids=tokens).logits, expected, atol=1e-5, rtol=1e-5)
    assert lm.expert_names == ("base" if adapter is None else adapter.name,)


def test_sixteen_bits(tiny_checkpoint):
    """As near to float32 as the merged specialist in 16 bits is; log-probabilities are float32."""
    full = load_base(tiny_checkpoint())
    half = load_base(tiny_checkpoint(), Placement(dtype=torch.bfloat16))
    tokens, starts = two_documents()
    kinds = ("lora", None, "delta")
    exact, _ = reference_forward(
        build_fused(full, columns=("evidence",), kinds=kinds), tokens, starts
    )
    rounded, _ = reference_forward(
        build_fused(half, columns=("evidence",), kinds=kinds), tokens, starts
    )
    output = build_causal_lm(build_fused(half, columns=("evidence",), kinds=kinds))(
        input_ids=tokens
    )
    assert output.logits.dtype == torch.float32
    error = (output.logits - exact).abs().mean()
    assert error < 1.5 * (rounded - exact).abs().mean()


def test_one_expert_of_gate_one_is_that_expert(base):
    fused = build_fused(base, columns=("evidence",))
    lm = build_causal_lm(fused)
    tokens, _ = two_documents()
    for index, expert in enumerate(fused.experts):
        gates = torch.eye(3)[[index, index]]
        with applied(base.model, expert.adapter), torch.no_grad():
            expected = base.model(tokens).logits.log_softmax(-1)
        output = lm(input_ids=tokens, gates=gates)
        torch.testing.assert_close(output.logits, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(output.gates, gates[:, None].expand(-1, 24, -1))


def test_rows_without_fixed_gates_are_the_routers(neox):
    lm = build_causal_lm(build_fused(neox, columns=ALL_COLUMNS))
    tokens, _ = two_documents()
    gates = torch.tensor([[0.2, 0.5, 0.3], [torch.nan] * 3])
    output, free = lm(input_ids=tokens, gates=gates), lm(input_ids=tokens)
    torch.testing.assert_close(output.logits[1], free.logits[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(output.gates[0], gates[:1].expand(24, -1))
    assert not torch.allclose(output.logits[0], free.logits[0], atol=1e-3)


@pytest.mark.parametrize("mixture", ["probability", "logit"])
def test_the_future_never_changes_the_past(base, mixture):
    lm = build_causal_lm(build_fused(base, columns=ALL_COLUMNS, mixture=mixture))
    tokens = random_tokens(2, 20)
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 101) % 256
    before, after = lm(input_ids=tokens), lm(input_ids=changed)
    torch.testing.assert_close(before.logits[:, :12], after.logits[:, :12], atol=1e-5, rtol=0)
    torch.testing.assert_close(before.gates[:, :12], after.gates[:, :12], atol=1e-5, rtol=0)
    assert not torch.allclose(before.logits[:, 12:], after.logits[:, 12:], atol=1e-3)


def test_the_order_of_experts_does_not_matter(neox):
    fused = build_fused(neox)
    order = [2, 0, 1]
    router = ProbeRouter(3, fused.router.options, {"projection": fused.router.projection[:, order]})
    shuffled = replace(fused, experts=tuple(fused.experts[i] for i in order), router=router)
    tokens = random_tokens(2, 10)
    before = build_causal_lm(fused)(input_ids=tokens)
    after = build_causal_lm(shuffled)(input_ids=tokens)
    torch.testing.assert_close(before.logits, after.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(before.gates[..., order], after.gates, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("keep", [1, 5, torch.tensor([0, 7, 23])])
def test_some_positions_only(neox, keep):
    lm = build_causal_lm(build_fused(neox, columns=ALL_COLUMNS))
    tokens, _ = two_documents()
    full, some = lm(input_ids=tokens), lm(input_ids=tokens, logits_to_keep=keep)
    at = slice(-keep, None) if isinstance(keep, int) else keep
    torch.testing.assert_close(some.logits, full.logits[:, at], atol=1e-5, rtol=0)
    torch.testing.assert_close(some.gates, full.gates[:, at], atol=1e-5, rtol=0)


def test_the_loss_is_the_mean_of_the_labels(neox):
    lm = build_causal_lm(build_fused(neox))
    tokens, _ = two_documents()
    labels = tokens.clone()
    labels[0, :10] = -100
    output = lm(input_ids=tokens, labels=labels)
    nll = -output.logits[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(output.loss, nll[labels[:, 1:] != -100].mean())


def test_the_base_is_left_as_it_was_and_not_copied(neox):
    model = neox.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    lm = build_causal_lm(build_fused(neox, columns=ALL_COLUMNS))
    lm(input_ids=random_tokens(1, 8))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    theirs = {tensor.data_ptr() for tensor in lm.parameters()}
    assert {tensor.data_ptr() for tensor in model.parameters()} <= theirs


def test_what_cannot_be_read_is_refused(neox):
    lm = build_causal_lm(build_fused(neox))
    with pytest.raises(ShapeError, match=r"expected token ids of shape \(B, T\)"):
        lm(input_ids=torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ShapeError, match="expected gates of shape"):
        mix_distributions(torch.zeros(3, 1, 2, 4), torch.ones(1, 2, 2), "probability")


# -- saved and loaded -----------------------------------------------------------------------


KINDS = ("fused", "top-k", "evolved", "plain")


def build_saved(base, kind):
    """A model whose router is registered, as a folder names it."""
    if kind == "evolved":
        return EvolvedModel(base, build_population(base), build_router().eval(), "parallel-sigmoid")
    if kind == "plain":
        return PlainModel(base, build_random_adapter(base.model, kind="delta"))
    fused = build_fused(base)
    router = UniformRouter(3, UniformRouter.Options())
    if kind == "top-k":
        router = limit_experts(UniformRouter, 2)(3, UniformRouter.Options())
    return replace(fused, router=router, router_name="uniform")


@pytest.mark.parametrize(
    ("architecture", "kind", "with_base"),
    [
        *(("gpt_neox", kind, True) for kind in KINDS),
        *(("gpt_neox", kind, False) for kind in KINDS if kind != "plain"),
        *((other, "fused", other != "llama") for other in ARCHITECTURES[1:]),
        ("gpt2", "fused", False),
        ("gpt2", "plain", True),
    ],
)
def test_saved_and_loaded_it_says_the_same(
    tiny_checkpoint, architecture, kind, with_base, tmp_path
):
    base = load_base(tiny_checkpoint(architecture))
    lm = build_causal_lm(build_saved(base, kind))
    tokens, _ = two_documents()
    before = lm(input_ids=tokens)
    lm.save_pretrained(tmp_path / "one", with_base=with_base)
    loaded = FusedForCausalLM.from_pretrained(tmp_path / "one")
    after = loaded(input_ids=tokens)
    assert torch.equal(after.logits, before.logits)
    assert torch.equal(after.gates, before.gates)
    assert loaded.expert_names == lm.expert_names
    assert loaded.fingerprint == lm.fingerprint
    loaded.save_pretrained(tmp_path / "two", with_base=True)
    again = FusedForCausalLM.from_pretrained(tmp_path / "two")
    assert torch.equal(again(input_ids=tokens).logits, before.logits)


def test_saved_without_the_base_it_is_small_and_names_it(neox, tiny_checkpoint, tmp_path):
    lm = build_causal_lm(build_saved(neox, "fused"))
    tokens, _ = two_documents()
    lm.save_pretrained(tmp_path / "small", with_base=False)
    lm.save_pretrained(tmp_path / "whole")
    small, whole = (
        (tmp_path / name / "model.safetensors").stat().st_size for name in ("small", "whole")
    )
    assert small < whole
    other = load_base(tiny_checkpoint("gpt_neox", 1))
    with pytest.raises(BaseCheckpointError):
        FusedForCausalLM.from_pretrained(tmp_path / "small", base_folder=other.folder)
    moved = tmp_path / "elsewhere" / "deep" / "model"
    moved.parent.mkdir(parents=True)
    (tmp_path / "small").rename(moved)
    with pytest.raises(BaseCheckpointError):
        FusedForCausalLM.from_pretrained(moved)
    loaded = FusedForCausalLM.from_pretrained(moved, base_folder=neox.folder)
    assert torch.equal(loaded(input_ids=tokens).logits, lm(input_ids=tokens).logits)
    loaded = FusedForCausalLM.from_pretrained(tmp_path / "whole")
    with pytest.raises(RoutingError, match="expected experts beside it"):
        build_causal_lm(build_saved(neox, "plain")).save_pretrained(tmp_path, with_base=False)
    with pytest.raises(RoutingError, match="expected to know the base's folder"):
        loaded.save_pretrained(tmp_path / "third", with_base=False)


@pytest.mark.parametrize("with_base", [True, False])
def test_loaded_in_another_dtype(neox, with_base, tmp_path):
    lm = build_causal_lm(build_saved(neox, "fused"))
    tokens, _ = two_documents()
    lm.save_pretrained(tmp_path / "model", with_base=with_base)
    half = FusedForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert {p.dtype for n, p in half.named_parameters() if n.startswith("model.")} == {half.dtype}
    error = (half(input_ids=tokens).logits - lm(input_ids=tokens).logits).abs()
    assert 0 < error.mean() < 0.1
    assert half.fingerprint != lm.fingerprint


@pytest.mark.parametrize("with_base", [True, False])
def test_a_router_keeps_its_numbers_whatever_the_layers_are_in(neox, with_base, tmp_path):
    fused = build_fused(neox)
    weights, prior = torch.tensor([0.3, 1.1, 0.9]), torch.tensor([0.1, 0.2, 0.7]).log()
    router = EvidenceRouter(3, EvidenceRouter.Options(), {"weights": weights, "prior": prior})
    lm = build_causal_lm(replace(fused, router=router, router_name="evidence"))
    lm.save_pretrained(tmp_path, with_base=with_base)
    half = FusedForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    moved = FusedForCausalLM.from_pretrained(tmp_path).to(torch.bfloat16)
    for found in (half, moved):
        assert torch.equal(found.router.weights, weights)
        assert torch.equal(found.router.prior, prior)
    tokens, _ = two_documents()
    torch.testing.assert_close(half(input_ids=tokens).logits, moved(input_ids=tokens).logits)
