import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from molora_fed.corpus.splits import SPLIT_FRACTIONS, assign_shards, assign_splits
from molora_fed.errors import CorpusError
from molora_fed.types import Split


def shares(splits, sizes):
    total = sum(sizes)
    return {
        split: sum(size for s, size in zip(splits, sizes, strict=True) if s is split) / total
        for split in Split
    }


def test_fractions_sum_to_one():
    assert set(SPLIT_FRACTIONS) == set(Split)
    assert sum(SPLIT_FRACTIONS.values()) == pytest.approx(1)


def test_shares_are_met():
    rng = np.random.default_rng(0)
    sizes = rng.integers(400, 32_000, size=400)
    splits = assign_splits(np.arange(400, dtype=np.int32), sizes, seed=42)
    for split, share in shares(splits, sizes.tolist()).items():
        assert share == pytest.approx(SPLIT_FRACTIONS[split], abs=0.004)


def test_held_out_is_made_of_many_clusters_even_if_a_few_are_large():
    sizes = np.array([500_000] * 4 + [4_000] * 400)
    splits = assign_splits(np.arange(404, dtype=np.int32), sizes, seed=1)
    assert all(split is Split.TRAIN for split in splits[:4])
    assert sum(split is Split.HELD_OUT for split in splits) >= 20


def test_overlapping_clusters_go_to_train_if_the_others_suffice():
    overlap = np.where(np.arange(200) % 2, 0.2, 0.0)
    splits = assign_splits(
        np.arange(200, dtype=np.int32), np.full(200, 1_000), seed=1, overlap=overlap
    )
    assert all(split is Split.TRAIN for split in splits[1::2])
    needed = assign_splits(
        np.arange(200, dtype=np.int32), np.full(200, 1_000), seed=1, overlap=np.full(200, 0.2)
    )
    assert Split.HELD_OUT in needed


def test_the_seed_decides():
    clusters, sizes = np.arange(100, dtype=np.int32), np.full(100, 1_000)
    first = assign_splits(clusters, sizes, seed=1)
    assert first == assign_splits(clusters, sizes, seed=1)
    assert first != assign_splits(clusters, sizes, seed=2)


@given(
    sizes=st.lists(st.integers(1, 50_000), min_size=5, max_size=80),
    clusters=st.data(),
    seed=st.integers(0, 1_000),
)
def test_whole_clusters_and_no_empty_split(sizes, clusters, seed):
    extra = clusters.draw(st.lists(st.integers(0, 4), min_size=len(sizes) - 5, max_size=len(sizes)))
    labels = np.array([0, 1, 2, 3, 4, *extra][: len(sizes)], dtype=np.int32)
    splits = assign_splits(labels, np.array(sizes), seed=seed)
    assert set(splits) == set(Split)
    by_cluster = {}
    for label, split in zip(labels.tolist(), splits, strict=True):
        assert by_cluster.setdefault(label, split) is split


@pytest.mark.parametrize("count", [0, 1, 4])
def test_too_few_clusters(count):
    with pytest.raises(CorpusError, match=f"at least 5 documents .* got {count}"):
        assign_splits(np.arange(count, dtype=np.int32), np.full(count, 9), seed=1)


def test_shards_are_disjoint_even_and_whole():
    clusters = np.repeat(np.arange(30, dtype=np.int32), 3)
    sizes = np.random.default_rng(0).integers(1_000, 9_000, size=90)
    shards = assign_shards(clusters, sizes, 3)
    assert all(len(set(shards[clusters == c].tolist())) == 1 for c in range(30))
    loads = np.bincount(shards, weights=sizes)
    assert loads.shape == (3,)
    assert loads.max() < 1.1 * loads.min()
    assert assign_shards(clusters, sizes, 1).tolist() == [0] * 90
