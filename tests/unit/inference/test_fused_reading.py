"""A fused model that reads piece by piece, padded, in batches or rearranged says the same."""

from itertools import pairwise

import pytest
import torch
from adaptation_helpers import build_population, build_router
from fused_helpers import ALL_COLUMNS, build_fused, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from molora_fed.errors import RoutingError, ShapeError
from molora_fed.inference.fused_build import build_causal_lm
from molora_fed.inference.opening import PlainModel
from molora_fed.models.base import load_base
from molora_fed.models.runtime import Placement
from molora_fed.population.bundle import EvolvedModel
from molora_fed.testing import build_random_adapter

END = 256
MODELS = {
    "all-readings": ("gpt_neox", lambda base: build_fused(base, columns=ALL_COLUMNS)),
    "logits": (
        "llama",
        lambda base: build_fused(
            base, columns=ALL_COLUMNS, kinds=("svd", "lora"), mixture="logit", depth=0
        ),
    ),
    "evidence": ("gpt2", lambda base: build_fused(base, kinds=("lora", "delta"))),
    "sliding": ("gemma2", lambda base: build_fused(base, columns=ALL_COLUMNS)),
    "evolved": (
        "gpt_neox",
        lambda base: EvolvedModel(base, build_population(base), build_router().eval(), "sigmoid"),
    ),
    "specialist": ("gpt2", lambda base: PlainModel(base, build_random_adapter(base.model))),
}
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module", params=MODELS)
def lm(request, tiny_checkpoint):
    architecture, build = MODELS[request.param]
    return build_causal_lm(build(load_base(tiny_checkpoint(architecture))))


@pytest.fixture(scope="module")
def neox(tiny_checkpoint):
    return load_base(tiny_checkpoint())


@st.composite
def texts(draw, batch=None, length=None):
    """Tokens (B, T) with documents that end anywhere."""
    batch = batch or draw(st.integers(1, 3))
    length = length or draw(st.integers(2, 24))
    tokens = random_tokens(batch, length, seed=draw(st.integers(0, 99)))
    for row, at in draw(
        st.lists(st.tuples(st.integers(0, batch - 1), st.integers(0, length - 1)), max_size=3)
    ):
        tokens[row, at] = END
    return tokens


@st.composite
def pieces(draw, length):
    cuts = draw(st.sets(st.integers(1, length - 1), max_size=6))
    edges = [0, *sorted(cuts), length]
    return [after - before for before, after in pairwise(edges)]


@settings(max_examples=6)
@given(data=st.data())
def test_pieces_are_the_whole(lm, data):
    tokens = data.draw(texts())
    sizes = data.draw(pieces(tokens.shape[1]))
    full = lm(input_ids=tokens)
    cache = lm.make_cache()
    read = [lm(input_ids=p, past_key_values=cache) for p in tokens.split(sizes, dim=1)]
    torch.testing.assert_close(torch.cat([o.logits for o in read], 1), full.logits, **CLOSE)
    torch.testing.assert_close(torch.cat([o.gates for o in read], 1), full.gates, **CLOSE)
    assert torch.equal(cache.tokens, tokens)
    assert cache.get_seq_length() == tokens.shape[1]


@settings(max_examples=6)
@given(data=st.data())
def test_a_batch_is_each_text_alone_however_it_is_padded(lm, data):
    alone = [data.draw(texts(batch=1)) for _ in range(data.draw(st.integers(1, 3)))]
    width = max(text.shape[1] for text in alone) + data.draw(st.integers(0, 3))
    tokens = torch.full((len(alone), width), END)
    mask = torch.zeros_like(tokens)
    for row, text in enumerate(alone):
        tokens[row, width - text.shape[1] :] = text
        mask[row, width - text.shape[1] :] = 1
    sizes = data.draw(pieces(width))
    cache = lm.make_cache()
    read = []
    for at, piece in zip(torch.tensor([0, *sizes]).cumsum(0), tokens.split(sizes, 1), strict=False):
        seen = mask[:, : int(at) + piece.shape[1]]
        read.append(lm(input_ids=piece, attention_mask=seen, past_key_values=cache).logits)
    for row, text in enumerate(alone):
        expected = lm(input_ids=text).logits[0]
        for found in (
            lm(input_ids=tokens, attention_mask=mask).logits[row],
            torch.cat(read, 1)[row],
        ):
            torch.testing.assert_close(found[width - text.shape[1] :], expected, **CLOSE)


@settings(max_examples=6)
@given(data=st.data())
def test_rows_that_are_rearranged_go_on_as_those_texts(lm, data):
    """As beam search does: texts are repeated, dropped and swapped between steps."""
    tokens = data.draw(texts(batch=3, length=10))
    cache = lm.make_cache()
    so_far = tokens[:, :0]
    for piece in tokens.split([4, 1, 2, 3], dim=1):
        order = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=3, max_size=3)))
        cache.reorder_cache(order)
        so_far = torch.cat([so_far[order], piece], dim=1)
        found = lm(input_ids=piece, past_key_values=cache)
        expected = lm(input_ids=so_far)
        at = slice(-piece.shape[1], None)
        torch.testing.assert_close(found.logits, expected.logits[:, at], **CLOSE)
        torch.testing.assert_close(found.gates, expected.gates[:, at], **CLOSE)
    assert torch.equal(cache.tokens, so_far)


@pytest.mark.parametrize("architecture", ["gpt_neox", "llama", "gpt2"])
def test_sixteen_bits_read_token_by_token_are_as_near_as_read_at_once(
    tiny_checkpoint, architecture
):
    folder = tiny_checkpoint(architecture)
    exact = build_causal_lm(build_fused(load_base(folder), columns=ALL_COLUMNS))
    half = load_base(folder, Placement(dtype=torch.bfloat16))
    lm = build_causal_lm(build_fused(half, columns=ALL_COLUMNS))
    tokens = random_tokens(3, 24)
    expected = exact(input_ids=tokens).logits
    cache = lm.make_cache()
    read = [lm(input_ids=p, past_key_values=cache).logits for p in tokens.split(1, dim=1)]
    error = (torch.cat(read, 1) - expected).abs().mean()
    assert error < 1.5 * (lm(input_ids=tokens).logits - expected).abs().mean()


def test_texts_are_repeated_and_left_out(lm):
    tokens = random_tokens(2, 9)
    cache = lm.make_cache()
    lm(input_ids=tokens[:, :5], past_key_values=cache)
    cache.batch_repeat_interleave(3)
    rest = random_tokens(6, 4, seed=1)
    found = lm(input_ids=rest, past_key_values=cache).logits
    whole = torch.cat([tokens[:, :5].repeat_interleave(3, 0), rest], dim=1)
    torch.testing.assert_close(found, lm(input_ids=whole).logits[:, 5:], **CLOSE)
    cache.batch_select_indices(torch.tensor([4]))
    last = lm(input_ids=tokens[:1, 5:], past_key_values=cache).logits
    whole = torch.cat([whole[4:5], tokens[:1, 5:]], dim=1)
    torch.testing.assert_close(last, lm(input_ids=whole).logits[:, 9:], **CLOSE)


def test_a_cache_is_used_again_after_a_reset(lm):
    tokens = random_tokens(2, 9)
    cache = lm.make_cache()
    lm(input_ids=random_tokens(1, 12, seed=3), past_key_values=cache)
    cache.reset()
    found = lm(input_ids=tokens, past_key_values=cache).logits
    torch.testing.assert_close(found, lm(input_ids=tokens).logits, **CLOSE)


# -- what is refused ------------------------------------------------------------------------


@settings(max_examples=10)
@given(data=st.data())
def test_a_text_that_begins_otherwise_is_always_refused(lm, data):
    tokens = data.draw(texts(length=data.draw(st.integers(2, 12))))
    read = data.draw(st.integers(1, tokens.shape[1] - 1))
    cache = lm.make_cache()
    lm(input_ids=tokens[:, :read], past_key_values=cache)
    row = data.draw(st.integers(0, len(tokens) - 1))
    edit = data.draw(st.sampled_from(["change", "insert", "remove"]))
    at = data.draw(st.integers(0, read - 1))
    other = tokens.clone()
    if edit == "change":
        other[row, at] = (tokens[row, at] + data.draw(st.integers(1, 256))) % 257
    elif edit == "insert":
        other = torch.cat([tokens[:, :at], (tokens[:, at : at + 1] + 1) % 257, tokens[:, at:]], 1)
    else:
        other = tokens[:, : data.draw(st.integers(1, read))]
    with pytest.raises(RoutingError, match="expected texts that begin with"):
        lm.generate(
            other,
            attention_mask=torch.ones_like(other),
            past_key_values=cache,
            max_new_tokens=2,
            do_sample=False,
        )
    # What was read is as it was: the same text goes on.
    found = lm(input_ids=tokens[:, read:], past_key_values=cache).logits
    torch.testing.assert_close(found, lm(input_ids=tokens).logits[:, read:], **CLOSE)


def test_padding_that_was_not_read_so_is_refused(lm):
    tokens = random_tokens(2, 6)
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    for before, after in ((mask, None), (None, mask), (mask, mask.flip(0))):
        cache = lm.make_cache()
        first = None if before is None else before[:, :4]
        lm(input_ids=tokens[:, :4], attention_mask=first, past_key_values=cache)
        with pytest.raises(RoutingError, match="expected the padding"):
            lm(input_ids=tokens[:, 4:], attention_mask=after, past_key_values=cache)
        with pytest.raises(ShapeError, match=r"mask of shape \(B, T\) = \(2, 6\), got \(2, 2\)"):
            lm(input_ids=tokens[:, 4:], attention_mask=mask[:, 4:], past_key_values=cache)


def test_a_cache_of_others_is_refused(neox):
    one = build_causal_lm(build_fused(neox))
    tokens = random_tokens(2, 6)
    others = [
        build_fused(neox, mixture="logit"),
        build_fused(neox, kinds=("lora", None, "svd")),
        build_fused(neox, columns=("base_hidden",)),
        PlainModel(neox),
    ]
    for other in others:
        cache = build_causal_lm(other).make_cache()
        with pytest.raises(RoutingError, match="expected one of this model"):
            one(input_ids=tokens, past_key_values=cache)
    same = build_causal_lm(build_fused(neox)).make_cache()  # of the same experts, made again
    one(input_ids=tokens, past_key_values=same)


@pytest.mark.parametrize("gates", [None, torch.eye(3)[:2], torch.full((2, 3), torch.nan)])
def test_other_gates_are_refused(neox, gates):
    lm = build_causal_lm(build_fused(neox))
    tokens = random_tokens(2, 6)
    cache = lm.make_cache()
    given_first = torch.tensor([[0.2, 0.8, 0.0], [0.1, 0.2, 0.7]])
    lm(input_ids=tokens[:, :3], past_key_values=cache, gates=given_first)
    with pytest.raises(RoutingError, match="expected the gates it was made with"):
        lm(input_ids=tokens[:, 3:], past_key_values=cache, gates=gates)
    lm(input_ids=tokens[:, 3:], past_key_values=cache, gates=given_first)


@pytest.mark.parametrize("rows", [1, 3])
def test_another_number_of_texts_is_refused(lm, rows):
    cache = lm.make_cache()
    lm(input_ids=random_tokens(2, 3), past_key_values=cache)
    with pytest.raises(RoutingError, match=f"expected 2 texts, got {rows}"):
        lm(input_ids=random_tokens(rows, 3), past_key_values=cache)


def test_what_was_read_cannot_be_taken_back(lm):
    cache = lm.make_cache()
    lm(input_ids=random_tokens(2, 3), past_key_values=cache)
    with pytest.raises(RoutingError, match="got 2 tokens to take back"):
        cache.crop(-2)
