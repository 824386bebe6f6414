"""How much of one text occurs word for word in another: containment of word 8-grams."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from molora_fed.corpus.shingles import compute_shingles

__all__ = ["compute_containment", "compute_contamination", "compute_overlap", "index_shingles"]


def index_shingles(texts: Iterable[str]) -> NDArray[np.uint64]:
    """The word 8-grams of all texts as one sorted array, the form containment is looked up in."""
    return np.sort(_join(compute_shingles(texts)))


def compute_containment(index: NDArray[np.uint64], texts: Iterable[str]) -> float:
    """Share of the texts' word 8-grams, counted by position, that occur in an index.

    Args:
        index: Sorted hashes, from `index_shingles`.
        texts: Whole texts, licence headers included.

    Returns:
        A fraction in [0, 1]; 0 if the texts hold no run of 8 words.
    """
    hashes = _join(compute_shingles(texts))
    if hashes.size == 0 or index.size == 0:
        return 0.0
    places = np.minimum(np.searchsorted(index, hashes), index.size - 1)
    return float((index[places] == hashes).mean())


def compute_contamination(train_texts: Iterable[str], held_out_texts: Iterable[str]) -> float:
    """Share of the held-out word 8-grams, counted by position, that occur anywhere in train.

    Args:
        train_texts: Whole texts, licence headers included.
        held_out_texts: Whole texts, licence headers included.

    Returns:
        A fraction in [0, 1]; 0 if the held-out texts hold no run of 8 words.
    """
    return compute_containment(index_shingles(train_texts), held_out_texts)


def compute_overlap(
    shingles: Sequence[NDArray[np.uint64]], clusters: NDArray[np.int32]
) -> NDArray[np.float64]:
    """Share of each cluster's word 8-grams, by position, that occur in any other cluster too.

    A split made of whole clusters is contaminated by the others at most as much as the largest
    overlap in it, however the clusters are dealt.

    Args:
        shingles: Hashes of each document, N arrays from `compute_shingles`.
        clusters: Cluster of each document, (N,), numbered from 0 without gaps.

    Returns:
        A fraction in [0, 1] per cluster, (C,); 0 for a cluster without any run of 8 words.
    """
    num_clusters = int(clusters.max(initial=-1)) + 1
    hashes = _join(shingles)  # (G,)
    owners = np.repeat(clusters, [len(row) for row in shingles])  # (G,)
    order = np.lexsort((owners, hashes))
    hashes, owners = hashes[order], owners[order]
    new_hash = np.ones(hashes.size, dtype=np.bool_)
    new_hash[1:] = hashes[1:] != hashes[:-1]
    new_owner = new_hash.copy()
    new_owner[1:] |= owners[1:] != owners[:-1]
    group = np.cumsum(new_hash) - 1  # (G,) index of the distinct hash
    shared = np.bincount(group, weights=new_owner)[group] > 1 if hashes.size else new_hash
    totals = np.bincount(owners, minlength=num_clusters)
    return np.bincount(owners, weights=shared, minlength=num_clusters) / np.maximum(totals, 1)


def _join(shingles: Sequence[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    return np.concatenate([np.empty(0, dtype=np.uint64), *shingles])
