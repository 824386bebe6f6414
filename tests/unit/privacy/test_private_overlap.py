"""Blocks are left out as where all texts lie in one place; counts are all that leaves."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molora_fed.corpus.blocks import pack_documents
from molora_fed.corpus.overlap import KnownText, index_blocks, list_shingles, measure_overlap
from molora_fed.privacy import intersection, messages
from molora_fed.privacy.intersection import Receiver, Sender
from molora_fed.privacy.overlap import (
    OverlapCounts,
    measure_private_overlap,
    read_counts,
    sum_counts,
)
from molora_fed.types import Document, Split

NAMES = ("ann", "bob", "eve")


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
        found[name] = measure_private_overlap(
            parts[name][Split.HELD_OUT],
            others=receiver.list_known(state),
            home=[*list_home(parts, name, tokenizer), base],
            owner=name,
            tokenizer=tokenizer,
        )
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


def test_counts_are_of_the_blocks_that_are_kept(tokenizer):
    text = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    blocks = pack([text, " ".join(f"x{n}" for n in range(90))], tokenizer, Split.HELD_OUT, "law")
    found = measure_private_overlap(
        blocks,
        others=list_shingles(blocks.take(1), tokenizer),
        home=[],
        owner="ann",
        tokenizer=tokenizer,
    )
    counts = OverlapCounts.count(found)
    assert counts == OverlapCounts(len(blocks), 1)
    assert read_counts(counts.to_bytes(), "ann") == counts
    assert counts.to_bytes() == b'{"blocks":%d,"left_out":1}' % len(blocks)


@pytest.mark.parametrize("turn", [1, -1])
def test_counts_of_a_domain_are_added_up(turn):
    rows = [("law", OverlapCounts(160, 6)), ("art", OverlapCounts(80, 0)),
            ("law", OverlapCounts(20, 20))][::turn]  # fmt: skip
    found = sum_counts(rows)
    assert found == {"art": OverlapCounts(80, 0), "law": OverlapCounts(180, 26)}
    assert list(found) == ["art", "law"]
