"""Blocks are left out as where all texts lie in one place."""

from functools import partial

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from molora_fed.corpus.blocks import pack_documents
from molora_fed.corpus.overlap import KnownText, index_blocks, list_shingles, measure_overlap
from molora_fed.privacy import intersection, messages, overlap
from molora_fed.privacy.intersection import Receiver, Sender
from molora_fed.privacy.overlap import open_receiver
from molora_fed.types import Document, Split

NAMES = ("ann", "bob", "eve")
TEXT = " ".join(f"w{number}" for number in range(40))


def make_key(number):
    return ec.derive_private_key(number, ec.SECP384R1())


KEY = make_key(1)


@pytest.fixture(scope="module", autouse=True)
def _small_batches():
    """Random elements take time, and are not what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (intersection, messages):
            patch.setattr(module, "BATCH", 64)
            patch.setattr(module, "SET_BATCH", 1024)
        yield


def pack(texts, tokenizer, split, domain):
    documents = [Document(str(number), text) for number, text in enumerate(texts)]
    clusters = np.arange(len(documents), dtype=np.int32)
    return pack_documents(documents, clusters, tokenizer, domain=domain, split=split, block_size=96)


def write(generator, phrases, count):
    """A text of phrases that others use too."""
    return " ".join(phrases[n] for n in generator.integers(0, len(phrases), size=count))


def build_texts(seed, tokenizer):
    """Held-out blocks, train text and samples of three members, and the base's text."""
    generator = np.random.default_rng(seed)
    phrases = [" ".join(f"w{n}" for n in generator.integers(0, 900, size=12)) for _ in range(60)]
    parts = {}
    for place, name in enumerate((*NAMES, "base")):
        near = phrases[12 * place : 12 * place + 24]
        parts[name] = {
            split: pack(
                [write(generator, near, 6) for _ in range(count)], tokenizer, split,
                "law" if name == "ann" else "art",
            )
            for split, count in ((Split.TRAIN, 6), (Split.HELD_OUT, 4), (Split.CALIBRATION, 1))
        }  # fmt: skip
    return parts


def list_home(parts, name, tokenizer):
    """Known text of a member, as pooled mode names it."""
    return [
        KnownText("train", name, lambda: index_blocks(parts[name][Split.TRAIN], tokenizer)),
        KnownText("sample", name, lambda: index_blocks(parts[name][Split.CALIBRATION], tokenizer)),
    ]


def compare_privately(parts, tokenizer):
    base = KnownText("base", "", lambda: index_blocks(parts["base"][Split.TRAIN], tokenizer))
    senders, receivers = {}, {}
    for name in NAMES:
        home = list_home(parts, name, tokenizer)
        known = np.unique(np.concatenate([text.load() for text in home]))
        secret = name.encode().ljust(32)
        senders[name] = Sender(known, secret=secret, fusion="3")
        items = list_shingles(parts[name][Split.HELD_OUT], tokenizer)
        receivers[name] = Receiver(items, secret=secret, purpose="7")
    tags = {
        name: sender.finish(sender.advance(sender.begin(), sender.total))
        for name, sender in senders.items()
    }
    found = {}
    for name, receiver in receivers.items():
        state, query = receiver.begin(), receiver.query
        for other in NAMES:
            if other != name:
                reply = senders[other].answer(
                    query, name, committed=query.commitment, admit=lambda place, question: None
                )
                state = receiver.open(state, other, tags[other], reply)
        elsewhere = KnownText("train", "", partial(receiver.list_known, state))
        known = [*list_home(parts, name, tokenizer), base, elsewhere]
        found |= measure_overlap({name: parts[name][Split.HELD_OUT]}, known, tokenizer)
    return found


@settings(max_examples=6)
@given(seed=st.integers(0, 10**6))
def test_the_same_blocks_are_left_out_as_with_all_texts_in_one_place(tokenizer, seed):
    parts = build_texts(seed, tokenizer)
    known = [text for name in NAMES for text in list_home(parts, name, tokenizer)]
    known.append(KnownText("base", "", lambda: index_blocks(parts["base"][Split.TRAIN], tokenizer)))
    held_out = {name: parts[name][Split.HELD_OUT] for name in NAMES}
    pooled = measure_overlap(held_out, known, tokenizer)
    private = compare_privately(parts, tokenizer)
    for name in NAMES:
        assert np.array_equal(private[name].known, pooled[name].known)
        assert np.array_equal(private[name].totals, pooled[name].totals)
        assert np.array_equal(private[name].kept, pooled[name].kept)
        for kind in ("domain", "own", "union", "base"):
            assert getattr(private[name], kind) == getattr(pooled[name], kind)
    # The texts are such that others' text and the base's both matter.
    assert any(one.union > one.own for one in pooled.values())
    assert sum(int((~one.kept).sum()) for one in pooled.values()) > 0


def open_for(tokenizer, text, **changes):
    blocks = pack([text], tokenizer, Split.HELD_OUT, "law")
    arguments = {"key": KEY, "identity": "a" * 64, "name": "ann", **changes}
    return open_receiver(blocks, tokenizer, **arguments)


def test_a_query_follows_from_blocks_key_and_purpose_alone(tokenizer):
    first = open_for(tokenizer, TEXT)
    assert open_for(tokenizer, TEXT).query == first.query and first.items.size
    for changes in ({"name": "bob"}, {"identity": "b" * 64}, {"key": make_key(2)}):
        other = open_for(tokenizer, TEXT, **changes)
        assert not set(other.query.elements) & set(first.query.elements), changes
    assert open_for(tokenizer, f"more {TEXT}").query.commitment != first.query.commitment


def test_there_is_no_query_of_more_shingles_than_it_takes(tokenizer, monkeypatch):
    size = open_for(tokenizer, TEXT).items.size
    monkeypatch.setattr(overlap, "BATCH", 1)
    monkeypatch.setattr(overlap, "MAX_QUERY_BATCHES", size - 1)
    assert open_for(tokenizer, TEXT) is None
    monkeypatch.setattr(overlap, "MAX_QUERY_BATCHES", size)
    assert open_for(tokenizer, TEXT).items.size == size
