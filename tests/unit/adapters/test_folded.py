import pytest
import torch

from molora_fed.adapters.compatibility import applied
from molora_fed.adapters.folded import FoldedExperts
from molora_fed.errors import IncompatibleAdapterError, RoutingError
from molora_fed.models.layout import adaptable_modules, decoder_blocks
from molora_fed.testing.models import build_random_adapter

# (kind, rank) of each expert; None is the base.
MIXES = {
    "one": [("lora", 4)],
    "mixed-ranks": [("lora", 1), ("svd", 7), ("lora", 32)],
    "with-base": [None, ("lora", 3), ("lora", 5)],
    "base-between": [("lora", 3), None, ("lora", 5)],
    "dense": [("delta", 0), ("delta", 0)],
    "all-kinds": [None, ("lora", 3), ("delta", 0), ("svd", 6), ("delta", 0)],
}


def build_experts(model, mix, frozen_depth=0):
    return [
        None
        if spec is None
        else build_random_adapter(
            model, kind=spec[0], rank=spec[1], seed=seed, frozen_depth=frozen_depth
        )
        for seed, spec in enumerate(MIXES[mix])
    ]


def one_by_one(model, experts, tokens):
    """Reference: (E, B, T, V), every expert applied to the weights in turn."""
    found = []
    for expert in experts:
        with torch.no_grad(), applied(model, expert):
            found.append(model(tokens).logits)
    return torch.stack(found)


def folded_logits(model, experts, tokens):
    with torch.no_grad(), FoldedExperts(model, experts) as folded:
        return folded.split(model(folded.expand(tokens)).logits)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("frozen_depth", [0, 1])
def test_equals_applying_the_experts_one_by_one(mix, frozen_depth, model, tokens):
    experts = build_experts(model, mix, frozen_depth)
    found = folded_logits(model, experts, tokens)
    assert torch.allclose(found, one_by_one(model, experts, tokens), atol=1e-5)


@pytest.mark.parametrize("frozen_depth", [0, 1])
def test_cached_steps_equal_the_full_pass(frozen_depth, model, tokens):
    experts = build_experts(model, "all-kinds", frozen_depth)
    full = folded_logits(model, experts, tokens)
    prompt = 5
    with torch.no_grad(), FoldedExperts(model, experts) as folded:
        output = model(folded.expand(tokens[:, :prompt]), use_cache=True)
        steps = [output.logits]
        for t in range(prompt, tokens.shape[1]):
            output = model(
                folded.expand(tokens[:, t : t + 1]),
                past_key_values=output.past_key_values,
                use_cache=True,
            )
            steps.append(output.logits)
        found = folded.split(torch.cat(steps, dim=1))
    assert torch.allclose(found, full, atol=1e-5)


@pytest.mark.parametrize("frozen_depth", [0, 1])
def test_left_padding_with_a_mask(frozen_depth, model, tokens):
    experts = build_experts(model, "with-base", frozen_depth)
    padded = torch.cat([torch.zeros(2, 6, dtype=tokens.dtype), tokens], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :6] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), FoldedExperts(model, experts) as folded:
        output = model(
            folded.expand(padded),
            attention_mask=folded.expand(mask),
            position_ids=folded.expand(positions),
        )
        found = folded.split(output.logits)[:, :, 6:]
    assert torch.allclose(found, one_by_one(model, experts, tokens), atol=1e-5)


def test_permuting_experts_permutes_rows_only(model, tokens):
    experts = build_experts(model, "all-kinds")
    order = [3, 0, 4, 2, 1]
    found = folded_logits(model, [experts[e] for e in order], tokens)
    assert torch.allclose(found, folded_logits(model, experts, tokens)[order], atol=1e-5)


def test_all_base_rows_are_the_base(model, tokens, logits):
    found = folded_logits(model, [None, None], tokens)
    assert torch.allclose(found, logits(model, tokens).expand_as(found), atol=1e-6)


def test_leaves_no_trace(model, tokens, logits):
    model.requires_grad_(True).train()
    model.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = logits(model, tokens)
    experts = build_experts(model, "all-kinds", 1)
    parts = [
        t.clone() for e in experts if e for u in e.updates.values() for t in u.tensors().values()
    ]
    folded_logits(model, experts, tokens)
    with pytest.raises(KeyError), FoldedExperts(model, experts):
        raise KeyError
    assert torch.equal(logits(model, tokens), expected)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    after = [t for e in experts if e for u in e.updates.values() for t in u.tensors().values()]
    assert all(torch.equal(a, b) for a, b in zip(parts, after, strict=True))


def test_blocks_no_expert_changes_run_once_for_all(model, tokens):
    experts = build_experts(model, "mixed-ranks", 1)
    rows = []
    _, blocks = decoder_blocks(model)
    for name in (next(iter(adaptable_modules(model, 0))), next(iter(adaptable_modules(model, 1)))):
        module = model.get_submodule(name)
        module.register_forward_hook(lambda _m, args, _o: rows.append(args[0].shape[0]))
    folded = FoldedExperts(model, experts)
    assert folded.shared_depth == 1 < len(blocks)
    with torch.no_grad(), folded:
        model(folded.expand(tokens))
    assert rows == [2, 6]


def test_base_product_is_computed_once_for_all_rows(model, tokens):
    experts = build_experts(model, "mixed-ranks")
    calls = []
    for module in adaptable_modules(model, 0).values():
        module.register_forward_hook(lambda m, args, _o: calls.append((m, args[0].shape[0])))
    with torch.no_grad(), FoldedExperts(model, experts) as folded:
        model(folded.expand(tokens))
    assert len(calls) == len(adaptable_modules(model, 0))
    assert {rows for _, rows in calls} == {6}


def test_gradients_reach_the_hidden_state_as_when_applied(tiny_model, tokens):
    model = tiny_model("llama")
    experts = build_experts(model, "mixed-ranks", 1)
    embedded = model.get_input_embeddings()(tokens)
    one = embedded.clone().requires_grad_()
    for expert in experts:
        with applied(model, expert):
            model(inputs_embeds=one).logits.square().sum().backward()
    other = embedded.clone().requires_grad_()
    with FoldedExperts(model, experts) as folded:
        model(inputs_embeds=folded.expand(other)).logits.square().sum().backward()
    assert torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-2)


def test_half_precision_factors_keep_their_scale(tiny_model, tokens):
    model = tiny_model()
    expert = build_random_adapter(model, rank=3)
    for update in expert.updates.values():
        object.__setattr__(update, "a", update.a.bfloat16())
        object.__setattr__(update, "b", update.b.bfloat16())
    found = folded_logits(model, [expert, None], tokens)
    assert torch.allclose(found, one_by_one(model, [expert, None], tokens), atol=1e-5)


def test_refuses_no_experts(tiny_model):
    with pytest.raises(RoutingError, match="at least one adapter"):
        FoldedExperts(tiny_model(), [])


def test_refuses_an_expert_of_another_base(tiny_model):
    theirs = build_random_adapter(tiny_model("llama"), name="theirs")
    with pytest.raises(IncompatibleAdapterError, match="'theirs'"):
        FoldedExperts(tiny_model(), [None, theirs])


def test_refuses_rows_that_are_not_folded(tiny_model, tokens):
    model = tiny_model()
    experts = build_experts(model, "mixed-ranks")
    with FoldedExperts(model, experts), pytest.raises(RoutingError, match="multiple of 3 rows"):
        model(tokens)


def test_refuses_different_tokens_where_blocks_are_shared(tiny_model, tokens):
    model = tiny_model()
    with (
        FoldedExperts(model, build_experts(model, "dense", 1)),
        pytest.raises(RoutingError, match="read the same tokens"),
    ):
        model(tokens)


def test_refuses_a_second_use_at_once(tiny_model):
    model = tiny_model()
    folded = FoldedExperts(model, [None])
    with folded, pytest.raises(RoutingError, match="in use"), folded:
        pass
    with folded:  # free again
        pass


def test_refuses_a_layer_that_sees_only_some_tokens(tiny_model, tokens):
    model = tiny_model()
    name, module = next(iter(adaptable_modules(model, 0).items()))
    del name
    module.register_forward_pre_hook(lambda _m, args: (args[0][:, :-1],))
    with (
        FoldedExperts(model, build_experts(model, "dense")) as folded,
        pytest.raises(RoutingError, match="sends only some tokens"),
    ):
        model(folded.expand(tokens))
