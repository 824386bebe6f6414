"""Near-duplicates: shingles, the clusters that splits never break up, and contamination."""

import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np
from datasketch import MinHash, MinHashLSH
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components

from molora_fed.types import Document, Progress

__all__ = [
    "SHINGLE_WORDS",
    "WORD",
    "cluster_documents",
    "compute_containment",
    "compute_contamination",
    "compute_overlap",
    "compute_shingles",
    "find_shingles",
    "index_shingles",
    "strip_boilerplate",
]


SHINGLE_WORDS = 8

_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
# Japanese and Chinese put no space between words: there each character counts as one.
WORD = re.compile(rf"[{_IDEOGRAPHS}]|[^\W{_IDEOGRAPHS}]+")
_LICENCE = re.compile(
    r"licen[cs]e|copyright|\(c\) \d|all rights reserved|spdx|redistribution|"
    r"permission is hereby granted|coding[:=]|\A#!",
    re.IGNORECASE,
)
_COMMENT_BLOCK = re.compile(
    r"(?:[ \t]*//[^\n]*\n)+|(?:[ \t]*#[^\n]*\n)+|(?:\.\\\"[^\n]*\n)+|/\*.*?\*/", re.DOTALL
)
_SPACE = re.compile(r"\s*")
_MAX_HEADER_BLOCKS = 4


def strip_boilerplate(text: str) -> str:
    """Drop licence headers: leading comment blocks that speak of licence or copyright.

    Decides only which documents are near-duplicates; the text that models see keeps them.
    """
    start = 0
    for _ in range(_MAX_HEADER_BLOCKS):
        gap = _SPACE.match(text, start)
        block = _COMMENT_BLOCK.match(text, gap.end() if gap else start)
        if block is None or not _LICENCE.search(block.group()):
            break
        start = block.end()
    return text[start:]


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _hash_word(word: str) -> int:
    """64 bits of a word, the same in every process (Python's own string hash is not)."""
    digest = hashlib.blake2b(word.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def compute_shingles(texts: Iterable[str]) -> list[NDArray[np.uint64]]:
    """Hash every run of 8 words (letters, digits, underscore; lower case) of each text.

    Args:
        texts: Any texts.

    Returns:
        For each text its hashes in order of position, shape (max(words - 7, 0),). Equal runs have
        equal hashes, in every process; different runs collide with probability 2^-64.
    """
    table: dict[str, int] = {}
    shingles = []
    for text in texts:
        words = WORD.findall(text.lower())
        for word in set(words).difference(table):
            table[word] = _hash_word(word)
        hashed = np.array([table[word] for word in words], dtype=np.uint64)  # (W,)
        count = max(len(words) - SHINGLE_WORDS + 1, 0)
        hashes = np.zeros(count, dtype=np.uint64)
        for offset in range(SHINGLE_WORDS):
            # Mixing between the additions makes the hash depend on the order of the words.
            hashes = _mix(hashes + hashed[offset : offset + count])
        shingles.append(hashes)
    return shingles


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
    stripped = compute_shingles(strip_boilerplate(document.compared) for document in documents)
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


def index_shingles(texts: Iterable[str]) -> NDArray[np.uint64]:
    """The word 8-grams of all texts, each once, sorted: the form containment is looked up in."""
    return _drop_repeats(np.sort(_join(compute_shingles(texts))))


def find_shingles(index: NDArray[np.uint64], hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which hashes occur in an index.

    Args:
        index: Sorted hashes, from `index_shingles`.
        hashes: Any hashes, (G,).

    Returns:
        True where a hash occurs, (G,).
    """
    if index.size == 0:
        return np.zeros(hashes.shape, dtype=np.bool_)
    places = np.minimum(np.searchsorted(index, hashes), index.size - 1)
    return index[places] == hashes


def compute_containment(index: NDArray[np.uint64], texts: Iterable[str]) -> float:
    """Share of the texts' word 8-grams, counted by position, that occur in an index.

    Args:
        index: Sorted hashes, from `index_shingles`.
        texts: Whole texts, licence headers included.

    Returns:
        A fraction in [0, 1]; 0 if the texts hold no run of 8 words.
    """
    hashes = _join(compute_shingles(texts))
    return float(find_shingles(index, hashes).mean()) if hashes.size else 0.0


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
