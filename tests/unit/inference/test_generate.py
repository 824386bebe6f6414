import pytest
import torch
from fused_helpers import (
    NoncausalRouter,
    build_fused,
    random_tokens,
)

from molora_fed.errors import ConfigError, RoutingError
from molora_fed.inference.fused_build import build_causal_lm
from molora_fed.inference.generate import Sampling, decode_tokens, generate
from molora_fed.models.base import load_base
from molora_fed.routing.fused import FusedModel
from molora_fed.testing import ARCHITECTURES

ALL_COLUMNS = ("base_hidden", "prefix_hidden", "mean_hidden", "experts_hidden", "evidence")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def base(request, tiny_checkpoint):
    return load_base(tiny_checkpoint(request.param))


@pytest.fixture(scope="module")
def neox(tiny_checkpoint):
    return load_base(tiny_checkpoint())


@pytest.mark.parametrize("mixture", ["probability", "logit"])
def test_decoding_equals_the_full_form(base, mixture):
    fused = build_fused(base, columns=ALL_COLUMNS, mixture=mixture)
    prompt = random_tokens(2, 13)
    sampling = Sampling(max_new_tokens=12)
    tokens, gates = decode_tokens(build_causal_lm(fused), prompt, sampling)
    text = torch.cat([prompt, tokens], dim=1)
    full = build_causal_lm(fused)(text[:, :-1])
    chosen = full.logits[:, 12:]
    picked = chosen.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    # The token taken is the likeliest, up to what rounding can swap between near ties.
    assert (chosen.max(-1).values - picked).abs().max() < 1e-4
    torch.testing.assert_close(gates, full.gates[:, 12:], atol=1e-4, rtol=1e-4)


def test_evidence_of_the_prompt_alone_holds_the_gates(neox):
    fused = build_fused(neox)
    prompt = random_tokens(2, 9)
    held = Sampling(max_new_tokens=6, evidence_from="prompt")
    _, gates = decode_tokens(build_causal_lm(fused), prompt, held)
    torch.testing.assert_close(gates, gates[:, :1].expand_as(gates), atol=0, rtol=0)
    torch.testing.assert_close(
        gates[:, 0], build_causal_lm(fused)(prompt).gates[:, -1], atol=1e-4, rtol=0
    )
    _, moving = decode_tokens(build_causal_lm(fused), prompt, Sampling(max_new_tokens=6))
    assert not torch.allclose(moving, gates, atol=1e-3)


def test_a_router_without_evidence_steps_on_whatever_evidence_from_says(neox):
    engine = build_causal_lm(build_fused(neox, columns=("mean_hidden",)))
    prompt = random_tokens(1, 9)
    results = [
        decode_tokens(engine, prompt, Sampling(max_new_tokens=6, evidence_from=source))[1]
        for source in ("prompt", "all")
    ]
    assert torch.equal(*results)


def test_sampling_is_seeded_and_does_not_depend_on_neighbours(neox):
    engine = build_causal_lm(build_fused(neox))
    options = {"max_new_tokens": 10, "temperature": 1.0}
    alone = generate(engine, "one", Sampling(seed=3, **options))[0]
    again = generate(engine, ["one", "two", "three"], Sampling(seed=3, **options))
    assert again[0].tokens == alone.tokens
    assert generate(engine, "one", Sampling(seed=4, **options))[0].tokens != alone.tokens
    assert [g.prompt for g in again] == ["one", "two", "three"]
    shuffled = generate(engine, ["one", "three!", "two"], Sampling(seed=3, **options))
    assert shuffled[0].tokens == alone.tokens


def test_prompts_of_different_lengths_give_what_each_gives_alone(neox):
    engine = build_causal_lm(build_fused(neox))
    texts = ["a longer prompt", "short", ""]
    together = generate(engine, texts, Sampling(max_new_tokens=8))
    for text, result in zip(texts, together, strict=True):
        assert generate(engine, text, Sampling(max_new_tokens=8))[0] == result
        assert sum(result.gates.values()) == pytest.approx(1.0, abs=1e-4)


def test_top_k_of_one_and_a_tiny_top_p_are_greedy(neox):
    engine = build_causal_lm(build_fused(neox))
    greedy = generate(engine, "abc", Sampling(max_new_tokens=8))[0].tokens
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}):
        sampled = generate(
            engine, "abc", Sampling(max_new_tokens=8, temperature=1.0, seed=1, **narrow)
        )
        assert sampled[0].tokens == greedy


def test_top_k_keeps_only_the_likeliest(neox):
    fused = build_fused(neox)
    prompt = random_tokens(1, 6).expand(40, -1)
    options = Sampling(max_new_tokens=1, temperature=2.0, top_k=3, seed=5)
    tokens, _ = decode_tokens(build_causal_lm(fused), prompt, options)
    best = build_causal_lm(fused)(prompt[:1]).logits[0, -1].topk(3).indices.tolist()
    assert set(tokens.flatten().tolist()) <= set(best)
    assert len(set(tokens.flatten().tolist())) > 1


def test_sampled_tokens_follow_the_mixture(neox):
    fused = build_fused(neox)
    prompt = random_tokens(1, 6).expand(2000, -1)
    tokens, _ = decode_tokens(
        build_causal_lm(fused), prompt, Sampling(max_new_tokens=1, temperature=1.0, seed=8)
    )
    expected = build_causal_lm(fused)(prompt[:1]).logits[0, -1].exp()
    found = torch.bincount(tokens.flatten(), minlength=len(expected)) / 2000
    assert (found - expected).abs().sum() < 0.4  # total variation; 257 cells, 2,000 draws


def test_a_text_ends_with_the_end_of_text_token(neox):
    fused = build_fused(neox)
    prompt = random_tokens(1, 5)
    first, _ = decode_tokens(build_causal_lm(fused), prompt, Sampling(max_new_tokens=4))
    neox.tokenizer.eos_token_id, end = int(first[0, 1]), neox.tokenizer.eos_token_id
    try:
        tokens, gates = decode_tokens(build_causal_lm(fused), prompt, Sampling(max_new_tokens=4))
        stop = first[0].tolist().index(int(first[0, 1])) + 1
        assert tokens.shape[1] == stop == gates.shape[1]
    finally:
        neox.tokenizer.eos_token_id = end


def test_a_router_that_reads_the_future_cannot_generate(neox):
    fused = build_fused(neox)
    router = NoncausalRouter(3, fused.router.options, fused.router.state_tensors())
    noncausal = FusedModel(neox, fused.experts, router, "peeking", "probability", 1)
    with pytest.raises(RoutingError, match="router 'peeking': expected a causal router"):
        generate(build_causal_lm(noncausal), "text")


def test_too_many_positions_are_refused(neox):
    with pytest.raises(ConfigError, match="at most 128 tokens with the new ones, got 134"):
        generate(build_causal_lm(build_fused(neox)), "four", Sampling(max_new_tokens=130))


@pytest.mark.parametrize(
    ("option", "rule"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens >= 1"),
        ({"temperature": -1.0}, "temperature >= 0"),
        ({"temperature": float("nan")}, "temperature >= 0"),
        ({"top_k": -1}, "top_k >= 0"),
        ({"top_p": 0.0}, r"top_p in \(0, 1\]"),
        ({"evidence_from": "dreams"}, "evidence_from 'prompt' or 'all'"),
    ],
)
def test_options_out_of_range_are_named(option, rule):
    with pytest.raises(ConfigError, match=rule):
        Sampling(**option)
