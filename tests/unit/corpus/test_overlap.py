"""Overlap by block: what lies in known text is found wherever blocks were cut."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molora_fed.corpus.blocks import pack_documents
from molora_fed.corpus.clusters import index_shingles
from molora_fed.corpus.overlap import (
    MAX_BLOCK_OVERLAP,
    KnownText,
    compute_block_shares,
    copy_index,
    find_base_index,
    index_blocks,
    load_index,
    measure_overlap,
    save_index,
    summarise_overlap,
)
from molora_fed.errors import CorpusError
from molora_fed.types import Document, Split


def pack(texts, tokenizer, *, size=64, split=Split.HELD_OUT, domain="law"):
    documents = [Document(str(number), text) for number, text in enumerate(texts)]
    clusters = np.arange(len(documents), dtype=np.int32)
    return pack_documents(
        documents, clusters, tokenizer, domain=domain, split=split, block_size=size
    )


def write_text(seed, words, *, letters="abcdefghijklm"):
    """Words of one to five letters, so that blocks cut many of them."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 6, size=words)
    return " ".join("".join(generator.choice(list(letters), size=n)) for n in lengths)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shift=st.integers(0, 63),
    size=st.sampled_from([48, 64, 100]),
    lengths=st.lists(st.integers(20, 120), min_size=1, max_size=4),
)
def test_copied_blocks_have_share_one_wherever_they_are_cut(tokenizer, seed, shift, size, lengths):
    texts = [write_text(seed + n, words) for n, words in enumerate(lengths)]
    # In the train text the same documents begin elsewhere in their blocks.
    train = pack(["z" * shift, *texts, "y" * 64], tokenizer, split=Split.TRAIN)
    held_out = pack([*texts, "x" * size], tokenizer, size=size)
    shares = compute_block_shares(index_blocks(train, tokenizer), held_out, tokenizer)
    assert set(shares) <= {0.0, 1.0}
    has_shingles = compute_block_shares(index_shingles(texts), held_out, tokenizer) > 0
    assert np.array_equal(shares == 1.0, has_shingles)
    assert has_shingles.any()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_disjoint_words_have_share_zero(tokenizer, seed):
    train = pack([write_text(seed, 200)], tokenizer, split=Split.TRAIN)
    held_out = pack([write_text(seed, 200, letters="nopqrstuvwxyz")], tokenizer)
    shares = compute_block_shares(index_blocks(train, tokenizer), held_out, tokenizer)
    assert not shares.any()


def test_a_share_is_counted_by_position(tokenizer):
    known, new = write_text(1, 30, letters="abc"), write_text(2, 30, letters="xyz")
    held_out = pack([f"{known} {new}" + " end" * 40], tokenizer, size=256)
    words = f"{known} {new}".split()
    text = tokenizer.decode(held_out.tokens[0].tolist())
    total = len(text.split()) - 8  # the first word is dropped, and 8 words make one run
    expected = (30 - 8) / total
    index = index_shingles([known])
    share = compute_block_shares(index, held_out, tokenizer)[0]
    assert share == pytest.approx(expected, abs=1.5 / total)
    assert len(words) == 60


def test_no_run_goes_from_one_document_into_the_next(tokenizer):
    words = write_text(3, 14).split()
    held_out = pack([" ".join(words[:7]), " ".join(words[7:]) + " x" * 64], tokenizer, size=128)
    shares = compute_block_shares(index_shingles([" ".join(words)]), held_out, tokenizer)
    assert not shares.any()


def test_runs_across_blocks_of_a_whole_split_are_known(tokenizer):
    text = write_text(4, 400)
    texts = [text, write_text(5, 400)]
    train = pack(texts, tokenizer, size=16, split=Split.TRAIN)  # too short for any 8 words
    whole = index_blocks(train, tokenizer)
    assert len(whole) > 0.9 * len(index_shingles(texts))
    assert np.isin(whole, index_shingles(texts)).all()
    # Of a sample it is not known which block comes after which.
    assert train.take(len(train) // 2).in_text_order() is None
    assert len(index_blocks(train.take(len(train) // 2), tokenizer)) < len(whole) / 4


def test_japanese_blocks_lose_a_character_at_the_edge_and_no_more(tokenizer):
    text = "".join(chr(0x4E00 + n) for n in np.random.default_rng(5).integers(0, 5000, 200))
    held_out = pack([text + "。" * 40], tokenizer, size=64)
    shares = compute_block_shares(index_shingles([text]), held_out, tokenizer)
    assert set(shares) <= {0.0, 1.0} and shares.sum() >= 5


def build_known(kind, owner, texts):
    return KnownText(kind, owner, lambda: index_shingles(texts))


def test_blocks_are_left_out_for_what_others_and_the_base_have_read(tokenizer):
    texts = [write_text(seed, 120) for seed in range(10, 16)]
    held_out = {
        "law": pack(texts[:3], tokenizer),
        "art": pack(texts[3:], tokenizer, domain="art"),
    }
    known = [
        build_known("train", "law", []),
        build_known("train", "art", texts[:1]),
        build_known("sample", "law", texts[3:4]),
        build_known("base", "", texts[4:5]),
    ]
    found = measure_overlap(held_out, known, tokenizer)
    for name, indices in {"law": [0], "art": [0, 1]}.items():
        blocks = held_out[name]
        is_known = np.isin(blocks.documents, indices).mean(axis=1)
        assert not found[name].kept[is_known > 0.6].any()
        assert found[name].kept[is_known == 0].all()
        assert (found[name].shares[found[name].kept] <= MAX_BLOCK_OVERLAP).all()
    by_domain = summarise_overlap(found.values())
    assert list(by_domain) == ["art", "law"]
    assert by_domain["law"]["own"] == by_domain["law"]["base"] == 0.0
    assert 0.25 < by_domain["law"]["union"] < 0.4 and 0.25 < by_domain["art"]["base"] < 0.4
    for name, row in by_domain.items():
        assert row["blocks"] == len(held_out[name])
        assert row["left_out"] == int((~found[name].kept).sum()) > 0
        assert row["after"] <= MAX_BLOCK_OVERLAP < row["union"]


def test_own_train_text_counts_for_its_owner_alone(tokenizer):
    text = write_text(20, 120)
    held_out = {"law-1": pack([text], tokenizer), "law-2": pack([text], tokenizer)}
    found = measure_overlap(held_out, [build_known("train", "law-1", [text])], tokenizer)
    assert found["law-1"].own == found["law-1"].union == found["law-2"].union > 0
    assert found["law-2"].own == 0
    row = summarise_overlap(found.values())["law"]
    assert row["union"] == 1.0 and row["own"] == 0.5 and row["after"] == 0.0
    assert row["left_out"] == row["blocks"] - row["empty"]


def test_an_index_is_kept_beside_its_base_and_serves_no_other(tmp_path):
    index = index_shingles([write_text(30, 100)])
    base, copy = tmp_path / "base", tmp_path / "copy" / "base"
    save_index(find_base_index(base), index, "recipe")
    copy_index(base, copy)
    for folder in (base, copy):
        found = load_index(find_base_index(folder), "recipe")
        assert np.array_equal(found, index)
        assert load_index(find_base_index(folder), "another") is None
        assert find_base_index(folder).parent == folder.parent
    assert load_index(find_base_index(tmp_path / "none"), "recipe") is None
    copy_index(tmp_path / "none", copy)  # nothing to copy
    find_base_index(base).write_bytes(b"garbage")
    with pytest.raises(CorpusError, match="Delete the file") as caught:
        load_index(find_base_index(base), "recipe")
    assert "\n" not in str(caught.value)
