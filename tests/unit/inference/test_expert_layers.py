"""What a pass of all experts costs, and what it refuses."""

import pytest
import torch
from fused_helpers import build_fused, random_tokens
from molora_kalavai.uniform import UniformRouter

from molora_fed.adapters.compatibility import applied
from molora_fed.errors import IncompatibleAdapterError, RoutingError
from molora_fed.inference import shared_inputs
from molora_fed.inference.fused_build import build_causal_lm
from molora_fed.models.base import load_base
from molora_fed.models.layout import adaptable_modules, block_index, decoder_blocks
from molora_fed.routing.fused import FusedExpert, FusedModel
from molora_fed.testing.models import build_random_adapter


@pytest.fixture(scope="module")
def neox(tiny_checkpoint):
    return load_base(tiny_checkpoint())


def build_uniform(base, adapters, frozen_depth=0):
    """All experts alike at every position."""
    experts = tuple(FusedExpert(f"e{place}", adapter) for place, adapter in enumerate(adapters))
    router = UniformRouter(len(experts), UniformRouter.Options())
    return build_causal_lm(
        FusedModel(base, experts, router, "uniform", "probability", frozen_depth)
    )


def count_rows(lm, tokens):
    """Rows that each linear layer in the blocks was given, by name."""
    found = {}
    handles = [
        layer.register_forward_hook(
            lambda _m, args, _o, name=name: found.setdefault(name, []).append(args[0].shape[0])
        )
        for name, layer in lm.expert_layers.items()
    ]
    lm(tokens, use_cache=True)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("frozen_depth", [0, 1])
def test_blocks_nobody_changes_run_once_for_all_and_others_once_for_all_rows(neox, frozen_depth):
    adapters = [
        build_random_adapter(neox.model, seed=seed, frozen_depth=frozen_depth) for seed in range(3)
    ]
    lm = build_uniform(neox, adapters, frozen_depth)
    lm(random_tokens(2, 5))  # lays the layers out
    found = count_rows(lm, random_tokens(2, 7))
    prefix, _ = decoder_blocks(neox.model)
    in_blocks = adaptable_modules(neox.model, 0)
    assert found.keys() >= in_blocks.keys()
    for name in in_blocks:
        assert found[name] == [2 if block_index(name, prefix) < frozen_depth else 6]


def test_the_weights_are_read_once_for_layers_that_are_given_the_same(neox, monkeypatch):
    lm = build_uniform(neox, [None, *(build_random_adapter(neox.model, seed=s) for s in (0, 1))])
    tokens = random_tokens(1, 4)
    cache = lm(tokens, use_cache=True).past_key_values
    groups = {id(layer.group) for layer in lm.expert_layers.values()}
    calls = []
    original = shared_inputs.multiply
    monkeypatch.setattr(shared_inputs, "multiply", lambda *args: calls.append(1) or original(*args))
    lm(tokens[:, :1], past_key_values=cache)
    if None not in {layer.group for layer in lm.expert_layers.values()}:
        assert len(calls) == len(groups)  # one product a group, all experts' factors A within


def test_packed_and_unpacked_say_the_same(neox, monkeypatch):
    fused, tokens = build_fused(neox), random_tokens(2, 9)
    packed = build_causal_lm(fused)(tokens).logits
    unpacked = build_causal_lm(fused)
    monkeypatch.setattr(type(unpacked), "packed_bytes", 0)
    torch.testing.assert_close(unpacked(tokens).logits, packed, atol=1e-4, rtol=1e-4)
    assert all(layer.group is None for layer in unpacked.expert_layers.values())


@pytest.mark.parametrize("changed", ["_SMALL", "_MUCH"])
@pytest.mark.parametrize("length", [1, 90])
def test_whoever_multiplies_says_the_same(neox, monkeypatch, changed, length):
    fused, tokens = build_fused(neox), random_tokens(2, length)
    found = build_causal_lm(fused)(tokens).logits
    monkeypatch.setattr(shared_inputs, changed, 0)  # all packed; oneDNN for whatever is not
    torch.testing.assert_close(build_causal_lm(fused)(tokens).logits, found, atol=1e-4, rtol=1e-4)


def test_weights_that_are_loaded_later_are_used(neox):
    lm, tokens = build_causal_lm(build_fused(neox)), random_tokens(1, 6)
    before = lm(tokens).logits
    state = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    lm.load_state_dict({n: t * 2 if n.endswith(".b") else t for n, t in state.items()})
    assert not torch.allclose(lm(tokens).logits, before, atol=1e-3)
    lm.load_state_dict(state)
    assert torch.equal(lm(tokens).logits, before)


def test_half_precision_factors_keep_their_scale(neox):
    expert = build_random_adapter(neox.model, rank=3)
    for update in expert.updates.values():
        object.__setattr__(update, "a", update.a.bfloat16())
        object.__setattr__(update, "b", update.b.bfloat16())
    lm, tokens = build_uniform(neox, [expert, None]), random_tokens(1, 6)
    found = lm(tokens, gates=torch.tensor([[1.0, 0.0]])).logits
    with applied(neox.model, expert), torch.no_grad():
        expected = neox.model(tokens).logits.log_softmax(-1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_an_expert_of_another_base_is_refused(neox, tiny_model):
    fused = build_fused(neox)
    theirs = build_random_adapter(tiny_model("llama"), name="theirs")
    experts = (*fused.experts[:2], FusedExpert("theirs", theirs))
    with pytest.raises(IncompatibleAdapterError, match="'theirs'"):
        build_causal_lm(FusedModel(neox, experts, fused.router, "e", "probability", 0))


def test_a_layer_that_sees_only_some_tokens_is_refused(neox):
    lm = build_causal_lm(build_fused(neox))
    lm(random_tokens(1, 4))
    name = next(iter(adaptable_modules(neox.model, 1)))
    lm.expert_layers[name].register_forward_pre_hook(lambda _m, args: (args[0][:, :-1],))
    with pytest.raises(RoutingError, match="sends only some tokens"):
        lm(random_tokens(1, 90))


def test_an_expert_that_decodes_alone_for_long_is_merged_and_says_the_same(neox, monkeypatch):
    adapters = [None, *(build_random_adapter(neox.model, seed=seed) for seed in (0, 1))]
    lm, tokens = build_uniform(neox, adapters), random_tokens(1, 12)

    def read(expert, merge_after):
        monkeypatch.setattr(type(lm), "merge_after", merge_after)
        gates = torch.eye(3)[expert][None]
        cache, steps = None, []
        for at in range(tokens.shape[1]):
            output = lm(tokens[:, at : at + 1], past_key_values=cache, use_cache=True, gates=gates)
            cache = output.past_key_values
            steps.append(output.logits)
        return torch.cat(steps, dim=1)

    for expert in (1, 2, 1):
        expected = read(expert, None)
        torch.testing.assert_close(read(expert, 4), expected, atol=1e-4, rtol=1e-4)
        groups = [layer.group for layer in lm.expert_layers.values() if layer.group is not None]
        merged = [group for group in groups if group._merged is not None]
        assert {group._merged[0] for group in merged} <= {tuple(torch.eye(3)[expert].tolist())}
        assert torch.equal(read(expert, 4), read(expert, 4))  # whatever was read before
        assert not groups or merged
