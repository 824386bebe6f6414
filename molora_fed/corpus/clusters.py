"""Near-duplicate clusters: the unit that splits and bootstraps never break up."""

from collections.abc import Sequence

import numpy as np
from datasketch import MinHash, MinHashLSH
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components

from molora_fed.corpus.shingles import compute_shingles, strip_boilerplate
from molora_fed.types import Document, Progress

__all__ = ["cluster_documents"]

NUM_PERMUTATIONS = 64
MIN_JACCARD = 0.5
MIN_CONTAINMENT = 0.1
MAX_SHARERS = 20

_Edges = NDArray[np.int64]


def cluster_documents(
    documents: Sequence[Document], *, seed: int, progress: Progress | None = None
) -> NDArray[np.int32]:
    """Group documents that are near-duplicates of, or contain, one another.

    Two documents are linked if a MinHash of their word 8-grams puts their Jaccard similarity at
    0.5 or more, or if they share at least a tenth of the 8-grams of the smaller one, counted
    exactly over the 8-grams that at most 20 documents hold (what more hold is boilerplate, and
    copies that often made are found by MinHash). A cluster is a connected component. Licence
    headers are left out of the comparison.

    Args:
        documents: N documents.
        seed: Seed of the MinHash permutations.
        progress: Called with documents sketched of N.

    Returns:
        Cluster of each document, (N,), numbered from 0 by first document.

    Source: Broder 1997, "On the resemblance and containment of documents"; search by datasketch.
    """
    total = len(documents)
    if total == 0:
        return np.empty(0, dtype=np.int32)
    stripped = compute_shingles(strip_boilerplate(document.text) for document in documents)
    distinct = [_drop_repeats(np.sort(hashes)) for hashes in stripped]
    edges = np.concatenate(
        [_find_similar(distinct, seed, progress), _find_containing(distinct)], axis=1
    )  # (2, number of links)
    links = coo_array((np.ones(edges.shape[1], dtype=np.int8), tuple(edges)), shape=(total, total))
    _, labels = connected_components(links, directed=False)
    # Numbered by first document, whatever order the component search took.
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(first.size, dtype=np.int32)
    rank[np.argsort(first)] = np.arange(first.size, dtype=np.int32)
    return rank[inverse]


def _drop_repeats(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Distinct values of a sorted array; np.unique takes three times as long on short ones."""
    new = np.ones(hashes.size, dtype=np.bool_)
    new[1:] = hashes[1:] != hashes[:-1]
    return hashes[new]


def _find_similar(
    distinct: Sequence[NDArray[np.uint64]], seed: int, progress: Progress | None
) -> _Edges:
    """Pairs with an estimated Jaccard similarity of `MIN_JACCARD` or more, (2, pairs)."""
    search = MinHashLSH(threshold=MIN_JACCARD, num_perm=NUM_PERMUTATIONS)
    empty = MinHash(num_perm=NUM_PERMUTATIONS, seed=seed, hashfunc=int)
    sketches: dict[int, MinHash] = {}
    pairs: list[tuple[int, int]] = []
    for index, hashes in enumerate(distinct):
        if hashes.size:
            sketch = empty.copy()
            # MinHash permutes 32-bit values.
            sketch.update_batch((hashes >> np.uint64(32)).tolist())
            pairs += (
                (other, index)
                for other in sorted(search.query(sketch))
                if sketch.jaccard(sketches[other]) >= MIN_JACCARD
            )
            search.insert(index, sketch)
            sketches[index] = sketch
        if progress is not None:
            progress(index + 1, len(distinct))
    return np.array(pairs, dtype=np.int64).reshape(-1, 2).T


def _find_containing(distinct: Sequence[NDArray[np.uint64]]) -> _Edges:
    """Pairs that share at least `MIN_CONTAINMENT` of the smaller document, (2, pairs)."""
    sizes = np.array([hashes.size for hashes in distinct], dtype=np.int64)  # (N,)
    rows = np.repeat(np.arange(sizes.size), sizes)
    _, columns, sharers = np.unique(
        np.concatenate(distinct), return_inverse=True, return_counts=True
    )
    kept = (sharers[columns] > 1) & (sharers[columns] <= MAX_SHARERS)
    holds = csr_array(
        (np.ones(int(kept.sum()), dtype=np.int32), (rows[kept], columns[kept])),
        shape=(sizes.size, sharers.size),
    )
    shared = (holds @ holds.T).tocoo()  # (N, N), entry = number of 8-grams in common
    left, right = shared.row.astype(np.int64), shared.col.astype(np.int64)
    linked = (left < right) & (
        shared.data >= MIN_CONTAINMENT * np.minimum(sizes[left], sizes[right])
    )
    return np.stack([left[linked], right[linked]])
