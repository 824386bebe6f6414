"""Deals whole near-duplicate clusters to the five splits, and to contributors of one domain."""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from molora_fed.errors import CorpusError
from molora_fed.types import Split

__all__ = ["SPLIT_FRACTIONS", "assign_shards", "assign_splits"]

SPLIT_FRACTIONS: Mapping[Split, float] = MappingProxyType(
    {
        Split.TRAIN: 0.76,
        Split.VALIDATION: 0.05,
        Split.CALIBRATION: 0.08,
        Split.ADMISSION: 0.03,
        Split.HELD_OUT: 0.08,
    }
)
"""Share of the characters each split gets; part of the evaluation protocol."""

# A cluster above a step is used outside train only when those below it do not suffice.
_OVERLAP_STEPS = (0.03, 0.04, 0.05, 0.07, 0.1, 0.15, 0.25, 0.5)
_SIZE_STEPS = (1 / 12, 1 / 6, 1 / 3, 1.0)


def assign_splits(
    clusters: NDArray[np.int32],
    sizes: NDArray[np.int64],
    *,
    seed: int,
    fractions: Mapping[Split, float] = SPLIT_FRACTIONS,
    overlap: NDArray[np.float64] | None = None,
) -> list[Split]:
    """Put every document in a split, whole clusters only.

    Clusters come in a random order. Those that share little text with others and are small
    against the held-out split fill the four splits beside train first; all others go to train,
    unless text is so scarce or repetitive that they are needed. So no single document makes up
    a split, and what is measured on was not trained on.

    Args:
        clusters: Cluster of each document, (N,), numbered from 0 without gaps.
        sizes: Characters of each document, (N,).
        seed: Seed of the order of clusters.
        fractions: Share of the characters for each split, summing to 1.
        overlap: Share of each cluster's text that occurs in other clusters, (C,) in [0, 1], from
            `compute_overlap`; None if unknown.

    Returns:
        The split of each document, N of them; none of the five is empty.

    Raises:
        CorpusError: If there are fewer clusters than splits.
    """
    cluster_sizes = np.bincount(clusters, weights=sizes)  # (C,)
    num_clusters = cluster_sizes.size
    if num_clusters < len(fractions):
        raise CorpusError(
            f"Cannot split text: expected at least {len(fractions)} documents that are not "
            f"near-copies of one another, got {num_clusters}. Add more text."
        )
    targets = {split: share * cluster_sizes.sum() for split, share in fractions.items()}
    level = np.searchsorted(_SIZE_STEPS, cluster_sizes / targets[Split.HELD_OUT])
    if overlap is not None:
        level = np.maximum(level, np.searchsorted(_OVERLAP_STEPS, overlap))
    shuffled = np.random.default_rng(seed).permutation(num_clusters)
    order = shuffled[np.argsort(level[shuffled], kind="stable")]

    assigned = [Split.TRAIN] * num_clusters
    needs = {split: target for split, target in targets.items() if split is not Split.TRAIN}
    for cluster in order[:-1]:  # the least suited one is always trained on
        size = cluster_sizes[cluster]
        open_splits = [
            split
            for split, need in needs.items()
            if need >= size / 2 or (need == targets[split] and need > 0)
        ]
        if open_splits:
            split = max(open_splits, key=lambda s: needs[s] / targets[s])
            assigned[cluster] = split
            needs[split] -= size
    return [assigned[cluster] for cluster in clusters]


def assign_shards(
    clusters: NDArray[np.int32], sizes: NDArray[np.int64], num_shards: int
) -> NDArray[np.int64]:
    """Deal the clusters of one split to the contributors of a domain, about evenly.

    Args:
        clusters: Cluster of each document of the split, (N,).
        sizes: Characters of each document, (N,).
        num_shards: Number of contributors.

    Returns:
        Shard of each document, (N,) in [0, num_shards); a cluster lies in one shard.
    """
    names, inverse = np.unique(clusters, return_inverse=True)
    cluster_sizes = np.bincount(inverse, weights=sizes, minlength=names.size)
    loads = np.zeros(num_shards)
    shard_of = np.empty(names.size, dtype=np.int64)
    for cluster in np.argsort(-cluster_sizes, kind="stable"):  # the largest first
        shard_of[cluster] = np.argmin(loads)
        loads[shard_of[cluster]] += cluster_sizes[cluster]
    return shard_of[inverse]
