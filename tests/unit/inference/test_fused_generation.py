"""`generate` of transformers on a fused model: greedy, batches, sampling, beams, streams."""

from contextlib import nullcontext
from itertools import product
from threading import Thread

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
from transformers import DynamicCache, GPTNeoXConfig, GPTNeoXForCausalLM, TextIteratorStreamer

from molora_fed.adapters.compatibility import applied
from molora_fed.adapters.updates import average_adapters
from molora_fed.errors import RoutingError
from molora_fed.inference.expert_layers import plan_layers, share_weights
from molora_fed.inference.fused_build import build_causal_lm
from molora_fed.inference.fused_cache import FusedCache
from molora_fed.inference.fused_config import FusedConfig
from molora_fed.inference.fused_lm import FusedForCausalLM
from molora_fed.models.base import load_base
from molora_fed.population.bundle import EvolvedModel
from molora_fed.testing import build_random_adapter

END = 256
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def neox(tiny_checkpoint):
    return load_base(tiny_checkpoint())


@pytest.fixture(scope="module")
def fused(neox):
    return build_fused(neox, columns=ALL_COLUMNS)


@pytest.fixture(scope="module")
def lm(fused):
    return build_causal_lm(fused)


def greedy(lm, tokens, **settings):
    """New tokens (B, n), the end-of-text token among the others."""
    settings = {"max_new_tokens": 8, "eos_token_id": None, "pad_token_id": END, **settings}
    mask = settings.pop("attention_mask", torch.ones_like(tokens))
    return lm.generate(tokens, attention_mask=mask, do_sample=False, **settings)


@pytest.mark.parametrize("architecture", ["gpt_neox", "llama", "gpt2"])
@pytest.mark.parametrize("mixture", ["probability", "logit"])
def test_greedy_text_is_the_likeliest_token_of_the_full_form(
    tiny_checkpoint, architecture, mixture
):
    base = load_base(tiny_checkpoint(architecture))
    fused = build_fused(base, columns=ALL_COLUMNS, mixture=mixture)
    tokens = random_tokens(2, 6)
    found = greedy(build_causal_lm(fused), tokens)
    for _ in range(8):
        starts = base.find_document_starts(tokens)
        log_probs, _ = reference_forward(fused, tokens, starts)
        tokens = torch.cat([tokens, log_probs[:, -1:].argmax(-1)], dim=1)
    assert found.tolist() == tokens.tolist()


# What `molora generate` wrote when it had a loop of its own.
WRITTEN = {
    "gpt_neox": [32, 152, 180, 204, 237, 208, 46, 89, 226, 215, 222, 32],
    "llama": [174, 171, 28, 115, 115, 174, 205, 174, 97, 94, 115, 183],
    "gpt2": [147, 147, 201, 225, 26, 110, 110, 147, 147, 95, 128, 128],
}


@pytest.mark.parametrize("architecture", WRITTEN)
def test_greedy_text_is_what_it_always_was(tiny_checkpoint, architecture):
    base = load_base(tiny_checkpoint(architecture))
    lm = build_causal_lm(build_fused(base, columns=("base_hidden", "evidence")))
    tokens = torch.tensor([base.tokenizer.encode("def main(")])
    found = lm.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12)
    assert found[0, tokens.shape[1] :].tolist() == WRITTEN[architecture]


@pytest.mark.parametrize("kind", ["fused", "evolved"])
def test_prompts_of_any_length_in_a_batch_are_written_on_as_alone(neox, fused, kind):
    evolved = EvolvedModel(neox, build_population(neox), build_router().eval(), "sigmoid")
    lm = build_causal_lm(fused if kind == "fused" else evolved)
    prompts = [random_tokens(1, length, seed=length) for length in (3, 9, 5)]
    tokens = torch.full((3, 9), END)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, 9 - prompt.shape[1] :] = prompt
        mask[row, 9 - prompt.shape[1] :] = 1
    found = greedy(lm, tokens, attention_mask=mask)[:, 9:]
    alone = [greedy(lm, prompt)[0, prompt.shape[1] :] for prompt in prompts]
    assert found.tolist() == torch.stack(alone).tolist()


def test_without_a_cache_it_writes_the_same(lm):
    tokens = random_tokens(2, 6)
    assert greedy(lm, tokens, use_cache=False).tolist() == greedy(lm, tokens).tolist()


def test_it_goes_on_from_a_cache(lm):
    tokens = random_tokens(2, 6)
    whole = greedy(lm, tokens)
    cache = lm.make_cache()
    half = greedy(lm, tokens, max_new_tokens=4, past_key_values=cache)
    assert greedy(lm, half, max_new_tokens=4, past_key_values=cache).tolist() == whole.tolist()
    # What follows alone, with the mask of the whole, would let any prefix pass.
    cache = lm.make_cache()
    lm(input_ids=tokens[:, :4], past_key_values=cache)
    with pytest.raises(RoutingError, match="expected texts that begin with the 4 tokens"):
        greedy(lm, tokens[:, 4:], attention_mask=torch.ones_like(tokens), past_key_values=cache)


def test_documents_of_a_prompt_may_be_told(lm):
    tokens = random_tokens(2, 9)
    starts = torch.zeros(2, 9, dtype=torch.bool)
    starts[:, [0, 4]] = True
    told = lm(input_ids=tokens, document_starts=starts)
    assert not torch.equal(lm(input_ids=tokens).gates, told.gates)
    first = told.logits[:, -1].argmax(-1)
    for settings in ({}, {"prefill_chunk_size": 4}):
        found = greedy(lm, tokens, document_starts=starts, **settings)
        assert found[:, 9].tolist() == first.tolist()
        texts = found[:, :-1]
        whole = torch.nn.functional.pad(starts, (0, texts.shape[1] - 9))
        expected = lm(input_ids=texts, document_starts=whole).logits[:, 8:].argmax(-1)
        assert found[:, 9:].tolist() == expected.tolist()


def test_a_text_in_pieces_is_read_as_a_whole(lm):
    tokens = random_tokens(2, 11)
    assert greedy(lm, tokens, prefill_chunk_size=4).tolist() == greedy(lm, tokens).tolist()


def test_scores_are_the_log_probabilities(lm):
    tokens = random_tokens(2, 6)
    output = greedy(lm, tokens, output_scores=True, return_dict_in_generate=True)
    full = lm(input_ids=output.sequences).logits[:, 5:-1]
    torch.testing.assert_close(torch.stack(output.scores, 1), full, **CLOSE)


def test_sampling_follows_the_seed_and_the_distribution(lm):
    tokens = random_tokens(1, 6)

    def draw(seed, **settings):
        torch.manual_seed(seed)
        settings = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": END, **settings}
        mask = torch.ones_like(tokens)
        return lm.generate(tokens, attention_mask=mask, do_sample=True, **settings)[:, 6:]

    assert torch.equal(draw(1, top_k=0), draw(1, top_k=0))
    assert not torch.equal(draw(1, top_k=0), draw(2, top_k=0))
    assert torch.equal(draw(3, top_k=1), greedy(lm, tokens, max_new_tokens=6)[:, 6:])
    drawn = draw(4, top_k=0, max_new_tokens=1, num_return_sequences=3000).flatten()
    expected = lm(input_ids=tokens).logits[0, -1].exp()
    found = torch.bincount(drawn, minlength=257) / 3000
    # The expected distance of 3000 draws is at most sqrt(V / n) / 2.
    assert 0.5 * (found - expected).abs().sum() < 0.5 * (257 / 3000) ** 0.5


def test_a_stream_says_what_generate_returns(lm, neox):
    tokens = random_tokens(1, 6)
    streamer = TextIteratorStreamer(neox.tokenizer, skip_prompt=True, timeout=60)
    settings = {"streamer": streamer, "do_sample": False, "max_new_tokens": 8}
    settings |= {"attention_mask": torch.ones_like(tokens), "pad_token_id": END}
    thread = Thread(target=lm.generate, args=(tokens,), kwargs=settings)
    thread.start()
    text = "".join(streamer)
    thread.join()
    settings.pop("streamer")
    assert text == neox.tokenizer.decode(lm.generate(tokens, **settings)[0, 6:])


# -- beams ----------------------------------------------------------------------------------

SMALL = 5


def build_small(mixture):
    """A fused model of two experts and a vocabulary of five."""
    config = GPTNeoXConfig(
        vocab_size=SMALL,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = GPTNeoXForCausalLM(config).eval()
    adapters = [build_random_adapter(model, seed=seed, strength=1.0) for seed in (1, 2)]
    plans = plan_layers(adapters)
    layers = {n: {"ranks": list(p.ranks), "biases": p.has_biases} for n, p in plans.items()}
    described = FusedConfig(
        base_config=config.to_dict(),
        experts=[{"name": "one"}, {"name": "two"}],
        layers=layers,
        router={"name": "probe", "options": {}},
        mixture=mixture,
        document_end=0,
    )
    router = ProbeRouter.build(2, 16, ("evidence", "mean_hidden"))
    lm = FusedForCausalLM(described, model=share_weights(model), router=router)
    lm.fill([adapter.updates for adapter in adapters])
    return lm


@pytest.mark.parametrize("mixture", ["probability", "logit"])
@pytest.mark.parametrize("length", [2, 3])
def test_beams_enough_find_the_likeliest_text_of_all(mixture, length):
    lm = build_small(mixture)
    prompt = torch.tensor([[3, 1, 4, 2]])
    every = torch.tensor(list(product(range(SMALL), repeat=length)))
    texts = torch.cat([prompt.expand(len(every), -1), every], dim=1)
    log_probs = lm(input_ids=texts).logits[:, 3:-1]
    totals = log_probs.gather(-1, every[..., None]).sum((1, 2))
    best, order = totals.sort(descending=True)
    output = lm.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=length,
        num_beams=SMALL**length,
        num_return_sequences=5,
        length_penalty=0.0,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    assert output.sequences[:, 4:].tolist() == every[order[:5]].tolist()
    torch.testing.assert_close(output.sequences_scores, best[:5], **CLOSE)
    # One beam follows the likeliest token, which need not lead to the likeliest text.
    assert (
        totals[order[0]]
        >= totals[(every == greedy(lm, prompt, max_new_tokens=length)[:, 4:]).all(1)]
    )


# -- gates that stay, experts that stop ------------------------------------------------------


def read_on(lm, tokens, prompt, **settings):
    """Scores of generating on, and the whole text."""
    output = greedy(
        lm, tokens[:, :prompt], output_scores=True, return_dict_in_generate=True, **settings
    )
    return torch.stack(output.scores, 1), output.sequences


def test_evidence_of_the_prompt_alone(lm):
    scores, texts = read_on(lm, random_tokens(2, 6), 6, evidence_from="prompt")
    gates = lm(input_ids=texts[:, :6]).gates[:, -1]
    fixed = lm(input_ids=texts, gates=gates).logits[:, 5:-1]
    torch.testing.assert_close(scores, fixed, **CLOSE)
    assert not torch.allclose(fixed, lm(input_ids=texts).logits[:, 5:-1], atol=1e-3)


def test_a_router_that_reads_no_evidence_goes_on_all_the_same(neox):
    lm = build_causal_lm(build_fused(neox, columns=("base_hidden",)))
    scores, texts = read_on(lm, random_tokens(2, 6), 6, evidence_from="prompt")
    torch.testing.assert_close(scores, lm(input_ids=texts).logits[:, 5:-1], **CLOSE)


def test_all_experts_of_a_text_are_the_model(lm):
    tokens = random_tokens(2, 6)
    for count in (3, 7):
        assert greedy(lm, tokens, experts_per_text=count).tolist() == greedy(lm, tokens).tolist()


@pytest.mark.parametrize("sizes", [(9,), (1, 8), (4, 1, 1, 3)])
def test_the_evidence_of_a_cache_is_what_experts_knew_of_the_last_document(fused, lm, neox, sizes):
    tokens = random_tokens(3, 9, seed=4)
    tokens[1, 0], tokens[2, 5] = END, END  # documents begin after these
    cache, read = lm.make_cache(), 0
    for size in sizes:
        piece = tokens[:, read : read + size]
        lm(input_ids=piece, past_key_values=cache)
        read += size
    for expert, one in enumerate(fused.experts):
        place = nullcontext() if one.adapter is None else applied(neox.model, one.adapter)
        with place, torch.no_grad():
            logprob = neox.model(tokens).logits.log_softmax(-1)
        said = logprob[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
        whole = torch.stack([said[0].sum(), said[1, 1:].sum(), said[2, 6:].sum()])
        torch.testing.assert_close(cache.evidence[:, expert], whole, **CLOSE)


def test_one_expert_of_a_text_is_the_specialist_that_knew_its_prompt_best(fused, lm, neox):
    tokens = random_tokens(3, 6, seed=4)
    scores, texts = read_on(lm, tokens, 6, experts_per_text=1)
    cache = lm.make_cache()
    before = lm(input_ids=tokens, past_key_values=cache)
    torch.testing.assert_close(scores[:, 0], before.logits[:, -1], **CLOSE)
    for row, best in enumerate(cache.evidence.argmax(-1).tolist()):
        with applied(neox.model, fused.experts[best].adapter), torch.no_grad():
            alone = neox.model(texts[row : row + 1]).logits.log_softmax(-1)
        torch.testing.assert_close(scores[row, 1:], alone[0, 6:-1], **CLOSE)


@pytest.mark.parametrize("beams", [1, 3])
def test_two_experts_of_a_text_keep_their_share(neox, beams):
    lm = build_causal_lm(build_fused(neox, columns=("mean_hidden",)))
    lm.router.projection.data *= 0.1  # gates that all count
    tokens = random_tokens(3, 6, seed=4)
    found = greedy(lm, tokens, experts_per_text=2, num_beams=beams)
    if beams > 1:
        assert found.shape == (3, 14)
        return
    scores, texts = read_on(lm, tokens, 6, experts_per_text=2)
    assert texts.tolist() == found.tolist()
    gates = lm(input_ids=tokens).gates[:, -1]
    assert gates.min() > 0.02
    kept = gates * (gates >= gates.sort(-1, descending=True).values[:, 1:2])
    fixed = lm(input_ids=texts, gates=kept / kept.sum(-1, keepdim=True)).logits
    torch.testing.assert_close(scores[:, 1:], fixed[:, 6:-1], **CLOSE)


def read_merged(fused, prompt, rest, gates):
    """What one text's merged experts say after a prompt, on the mean of their keys and values."""
    model, caches = fused.base.model, []
    for expert in fused.experts:
        place = nullcontext() if expert.adapter is None else applied(model, expert.adapter)
        with place, torch.no_grad():
            caches.append(model(prompt, use_cache=True).past_key_values)
    cache = DynamicCache()
    for index, layers in enumerate(zip(*(one.layers for one in caches), strict=True)):
        mean = (
            sum(gate * getattr(layer, name) for gate, layer in zip(gates, layers, strict=True))
            for name in ("keys", "values")
        )
        cache.update(*mean, index)
    nothing = build_random_adapter(model, strength=0.0)
    adapters = [one.adapter or nothing for one in fused.experts]
    with applied(model, average_adapters(adapters, gates.tolist())), torch.no_grad():
        return model(rest, past_key_values=cache).logits.log_softmax(-1)


@pytest.mark.parametrize("architecture", ["gpt_neox", "llama", "gpt2"])
@pytest.mark.parametrize("merge_after", [None, 3])
def test_merged_experts_are_one_model_by_the_gates_of_the_prompts_end(
    tiny_checkpoint, architecture, merge_after, monkeypatch
):
    fused = build_fused(load_base(tiny_checkpoint(architecture)), columns=("mean_hidden",))
    lm = build_causal_lm(fused)
    lm.router.projection.data *= 0.1  # gates that all count
    monkeypatch.setattr(type(lm), "merge_after", merge_after)
    for prompts in (random_tokens(1, 6, seed=4), random_tokens(3, 6, seed=5)):
        scores, texts = read_on(lm, prompts, 6, experts_per_text="merged")
        gates = lm(input_ids=prompts).gates[:, -1].double()
        assert gates.min() > 0.02
        for row, text in enumerate(texts):
            share = gates[row] / gates[row].sum()
            expected = read_merged(fused, text[None, :6], text[None, 6:-1], share)
            torch.testing.assert_close(scores[row, 1:], expected[0], atol=1e-3, rtol=1e-3)
    groups = [layer.group for layer in lm.expert_layers.values() if layer.group is not None]
    assert any(group._merged for group in groups) == bool(groups and merge_after)


def test_one_expert_merged_is_that_expert(fused, lm, neox):
    tokens = random_tokens(2, 6, seed=4)
    for expert, one in enumerate(fused.experts):
        gates = torch.eye(3)[expert].expand(2, -1)
        scores, texts = read_on(lm, tokens, 6, gates=gates, experts_per_text="merged")
        place = nullcontext() if one.adapter is None else applied(neox.model, one.adapter)
        with place, torch.no_grad():
            alone = neox.model(texts).logits.log_softmax(-1)
        torch.testing.assert_close(scores, alone[:, 5:-1], **CLOSE)


def test_what_was_decided_first_stays(lm):
    tokens = random_tokens(2, 6, seed=4)
    for first, then in (("merge", "narrow"), ("narrow", "merge")):
        cache = lm.make_cache()
        lm(tokens, past_key_values=cache)
        for name in (first, then):
            getattr(cache, name)(*([1] if name == "narrow" else []))
        assert (cache.merged is None) == (first == "narrow")
        assert (cache.kept is None) == (first == "merge")


def test_merged_experts_follow_their_texts_through_beams(lm):
    tokens = random_tokens(3, 6, seed=4)
    settings = {"experts_per_text": "merged", "num_beams": 3}
    found = greedy(lm, tokens, **settings)
    alone = [greedy(lm, tokens[row : row + 1], **settings) for row in range(3)]
    assert found.tolist() == torch.cat(alone).tolist()


@pytest.mark.parametrize("columns", [("base_hidden",), ("prefix_hidden",)])
def test_where_the_bases_states_decide_merged_experts_read_the_prompt_too(neox, columns):
    fused = build_fused(neox, columns=columns)
    lm, tokens = build_causal_lm(fused), random_tokens(1, 6)
    gates = lm(tokens).gates[:, -1]
    nothing = build_random_adapter(neox.model, strength=0.0)
    adapters = [one.adapter or nothing for one in fused.experts]
    share = gates[0].double() / gates[0].double().sum()
    scores, texts = read_on(lm, tokens, 6, experts_per_text="merged")
    with applied(neox.model, average_adapters(adapters, share.tolist())), torch.no_grad():
        expected = neox.model(texts).logits.log_softmax(-1)
    torch.testing.assert_close(scores, expected[:, 5:-1], atol=1e-3, rtol=1e-3)


def test_gates_that_are_given_choose_their_own_experts(lm):
    tokens = random_tokens(2, 6, seed=4)
    given = torch.tensor([[float("nan")] * 3, [0.2, 0.3, 0.5]])
    cache = lm.make_cache()
    lm(input_ids=tokens, past_key_values=cache, gates=given)
    best = cache.evidence.argmax(-1)
    cache.narrow(1)
    assert cache.kept.flatten().tolist() == [best[0], 2]


def test_experts_that_the_router_gave_nothing_share_alike():
    cache = FusedCache("owner", GPTNeoXConfig(num_hidden_layers=1))
    gates = torch.tensor([[1.0, 0.0, 0.0]])
    cache.choose(gates, 2, torch.tensor([[-9.0, -1.0, -2.0]]))
    assert cache.kept.tolist() == [[1, 2]] and cache.held.tolist() == [[0.0, 0.5, 0.5]]


@pytest.mark.parametrize("columns", [("base_hidden",), ("prefix_hidden",)])
def test_where_the_bases_states_decide_only_the_chosen_experts_run(neox, columns):
    lm, tokens = build_causal_lm(build_fused(neox, columns=columns)), random_tokens(3, 9)
    gates = lm(tokens).gates[:, -1]
    best = gates.argmax(-1)
    rows = []
    name = next(reversed([n for n in lm.expert_layers if n.startswith("gpt_neox.layers")]))
    handle = lm.expert_layers[name].register_forward_pre_hook(
        lambda _m, args: rows.append(args[0].shape[0])
    )
    found = greedy(lm, tokens, experts_per_text=1)
    handle.remove()
    assert set(rows) == {3}  # the base over the prompts, then one expert a text
    alone = [greedy(lm, tokens[b : b + 1], gates=torch.eye(3)[best[b]][None]) for b in range(3)]
    assert found.tolist() == torch.cat(alone).tolist()
    two = lm.generate(
        tokens, max_new_tokens=3, do_sample=False, experts_per_text=2, pad_token_id=0,
        return_dict_in_generate=True,
    )  # fmt: skip
    held = two.past_key_values.held
    kept = gates.topk(2).values / gates.topk(2).values.sum(-1, keepdim=True)
    torch.testing.assert_close(held.topk(2).values, kept, atol=1e-5, rtol=1e-4)
    assert (held > 0).sum(-1).tolist() == [2, 2, 2]


def test_each_text_has_gates_of_its_own(fused, lm, neox):
    """One batch: a specialist, a mixture, and one that the router decides."""
    tokens = random_tokens(3, 6)
    gates = torch.tensor([[1.0, 0, 0], [0.5, 0.25, 0.25], [torch.nan] * 3])
    found = greedy(lm, tokens, gates=gates)
    assert found[2:].tolist() == greedy(lm, tokens[2:]).tolist()
    assert found[1:2].tolist() == greedy(lm, tokens[1:2], gates=gates[1:2]).tolist()
    with applied(neox.model, fused.experts[0].adapter):
        alone = greedy(neox.model, tokens[:1])
    assert found[:1].tolist() == alone.tolist()
    specialists = torch.eye(3)
    found = greedy(lm, tokens, gates=specialists)
    for row, expert in enumerate(fused.experts):
        with applied(neox.model, expert.adapter):
            assert found[row].tolist() == greedy(neox.model, tokens[row : row + 1])[0].tolist()


def test_one_load_is_every_specialist_and_the_model(fused, lm, neox):
    tokens = random_tokens(2, 6)
    before = greedy(lm, tokens)
    for expert in fused.experts:
        with applied(neox.model, expert.adapter), torch.no_grad():
            expected = neox.model(tokens).logits.log_softmax(-1)
            text = greedy(neox.model, tokens).tolist()
        with lm.alone(expert.name) as alone:
            assert alone is lm
            torch.testing.assert_close(lm(input_ids=tokens).logits, expected, **CLOSE)
            assert greedy(lm, tokens).tolist() == text
            gates = torch.full((2, 3), torch.nan)  # gates that are given come first
            torch.testing.assert_close(
                lm(input_ids=tokens, gates=gates).logits[:, -1].argmax(-1), before[:, 6]
            )
    assert greedy(lm, tokens).tolist() == before.tolist()
    missing = pytest.raises(RoutingError, match="expected one of expert-0, base, expert-2")
    with missing, lm.alone("nobody"):
        pass


def test_a_cache_is_of_one_expert_or_of_all(lm):
    tokens = random_tokens(2, 6)
    cache = lm.make_cache()
    lm(input_ids=tokens[:, :3], past_key_values=cache)
    with lm.alone("base"), pytest.raises(RoutingError, match="expected the gates"):
        lm(input_ids=tokens[:, 3:], past_key_values=cache)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"experts_per_text": 0}, "expected experts_per_text of at least 1, got 0"),
        (
            {"experts_per_text": "all"},
            "expected experts_per_text as a number or 'merged', got 'all'",
        ),
        ({"experts_per_text": 2, "use_cache": False}, "expected a cache"),
        ({"evidence_from": "prompt", "use_cache": False}, "expected a cache"),
        ({"evidence_from": "nothing"}, "expected evidence_from 'prompt' or 'all', got 'nothing'"),
        ({"past_key_values": DynamicCache()}, "expected a cache of this model"),
        ({"cache_implementation": "static"}, "expected no cache implementation"),
    ],
)
def test_settings_that_cannot_be_are_refused(lm, settings, message):
    with pytest.raises(RoutingError, match=message):
        greedy(lm, random_tokens(1, 4), **settings)


def test_slots_of_a_population_all_run(neox):
    lm = build_causal_lm(
        EvolvedModel(neox, build_population(neox), build_router().eval(), "sigmoid")
    )
    with pytest.raises(RoutingError, match="expected a model that mixes distributions"):
        greedy(lm, random_tokens(1, 4), experts_per_text=1)
