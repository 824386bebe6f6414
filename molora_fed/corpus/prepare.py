"""The whole way from documents to blocks: clean, cluster, split, pack, measure, keep."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molora_fed.charter import CorpusRules
from molora_fed.corpus.blocks import Blocks, fingerprint_encoding, load_blocks, pack_documents
from molora_fed.corpus.clusters import (
    cluster_documents,
    compute_containment,
    compute_overlap,
    compute_shingles,
    index_shingles,
)
from molora_fed.corpus.inventory import Inventory
from molora_fed.corpus.report import (
    CorpusReport,
    SplitReport,
    build_contamination_report,
    parse_report,
)
from molora_fed.corpus.sizes import cut_long_documents
from molora_fed.corpus.splits import SPLIT_FRACTIONS, assign_shards, assign_splits
from molora_fed.errors import CorpusError
from molora_fed.storage.files import canonical_json, hash_bytes, replace_folder, write_json
from molora_fed.types import Document, Progress, Split

__all__ = [
    "Corpus",
    "CorpusReport",
    "SplitDocuments",
    "SplitReport",
    "build_contamination_report",
    "load_corpus",
    "load_report",
    "prepare_corpus",
    "split_documents",
]

FORMAT_VERSION = 1
_STEERED = (Split.TRAIN, Split.VALIDATION)
_REPORT_FILE = "corpus.json"
_MAX_REPORT_BYTES = 1_000_000


@dataclass(frozen=True, eq=False)
class Corpus:
    """A domain as blocks.

    Attributes:
        domain: Domain name.
        folder: Where it is kept; None if it is in memory only.
        blocks: Blocks by split.
        report: Counts and contamination.
    """

    domain: str
    folder: Path | None
    blocks: Mapping[Split, Blocks]
    report: CorpusReport


@dataclass(frozen=True, eq=False)
class SplitDocuments(Mapping[Split, list[Document]]):
    """Documents by split; indexing gives the documents of a split.

    Attributes:
        documents: Documents by split.
        clusters: Cluster of each document by split, (N_split,); numbered over all splits.
        duplicates: Documents dropped because another has the same words.
    """

    documents: Mapping[Split, list[Document]]
    clusters: Mapping[Split, NDArray[np.int32]]
    duplicates: int

    def __getitem__(self, split: Split) -> list[Document]:
        return self.documents[split]

    def __iter__(self) -> Iterator[Split]:
        return iter(self.documents)

    def __len__(self) -> int:
        return len(self.documents)


def _drop_copies(documents: Iterable[Document]) -> tuple[list[Document], int]:
    """The first of each set of documents with the same words, and how many were dropped."""
    kept: dict[str, Document] = {}
    total = 0
    for document in documents:
        total += 1
        kept.setdefault(hash_bytes(" ".join(document.text.split()).encode()), document)
    return list(kept.values()), total - len(kept)


def split_documents(
    documents: Iterable[Document], *, seed: int, progress: Progress | None = None
) -> SplitDocuments:
    """Split a domain's documents; depends on the documents and the seed alone.

    Copies are dropped, a document too large to be split is cut, near-duplicates are clustered,
    and whole clusters are dealt to the splits.

    Args:
        documents: All documents of the domain, in a fixed order.
        seed: Seed of the charter's corpus rules.
        progress: Called with documents compared of all.

    Returns:
        Documents and clusters of the five splits, none of them empty.

    Raises:
        CorpusError: If there are fewer than five clusters.
    """
    distinct, duplicates = _drop_copies(documents)
    distinct = cut_long_documents(distinct)
    sizes = np.array([len(document.text) for document in distinct], dtype=np.int64)
    clusters = cluster_documents(distinct, seed=seed, progress=progress)
    overlap = compute_overlap(compute_shingles(d.compared for d in distinct), clusters)
    splits = assign_splits(clusters, sizes, seed=seed, overlap=overlap)
    rows = {split: [n for n, s in enumerate(splits) if s is split] for split in SPLIT_FRACTIONS}
    return SplitDocuments(
        {split: [distinct[n] for n in chosen] for split, chosen in rows.items()},
        {split: clusters[chosen] for split, chosen in rows.items()},
        duplicates,
    )


def _take_shard(whole: SplitDocuments, shard: tuple[int, int]) -> SplitDocuments:
    """The part of every split that belongs to one of the contributors of a domain."""
    index, num_shards = shard
    documents, clusters = {}, {}
    for split, members in whole.items():
        sizes = np.array([len(document.text) for document in members], dtype=np.int64)
        mine = np.flatnonzero(assign_shards(whole.clusters[split], sizes, num_shards) == index)
        documents[split] = [members[n] for n in mine]
        clusters[split] = whole.clusters[split][mine]
    return SplitDocuments(documents, clusters, whole.duplicates)


def _build_report(
    domain: str,
    whole: SplitDocuments,
    part: SplitDocuments,
    blocks: Mapping[Split, Blocks],
    shard: tuple[int, int],
    block_size: int,
) -> CorpusReport:
    """Count everything and measure how much of each split occurs in the domain's train split."""
    train = index_shingles(document.compared for document in whole[Split.TRAIN])
    splits = {}
    for split, members in part.items():
        texts = [document.text for document in members]
        splits[str(split)] = SplitReport(
            documents=len(members),
            clusters=len(np.unique(part.clusters[split])),
            characters=sum(map(len, texts)),
            tokens=int(blocks[split].tokens.size),
            blocks=len(blocks[split]),
            contamination=0.0
            if split is Split.TRAIN
            else compute_containment(train, (document.compared for document in members)),
        )
    sizes = [len(document.text) for members in whole.values() for document in members]
    clusters = np.concatenate(list(whole.clusters.values()))
    cluster_sizes = np.bincount(clusters, weights=sizes)
    return CorpusReport(
        domain=domain,
        shard=shard,
        documents=len(sizes),
        duplicates=whole.duplicates,
        clusters=len(np.unique(clusters)),
        largest_cluster=float(cluster_sizes.max() / cluster_sizes.sum()),
        characters=sum(sizes),
        splits=splits,
        block_size=block_size,
    )


def _pack(
    domain: str, part: SplitDocuments, tokenizer: Any, block_size: int
) -> dict[Split, Blocks]:
    """Blocks of every split; only what trains, and what training is steered by, has targets."""
    packed = {
        split: pack_documents(
            members,
            part.clusters[split],
            tokenizer,
            domain=domain,
            split=split,
            block_size=block_size,
        )
        for split, members in part.items()
    }
    return {
        split: blocks if split in _STEERED else blocks.without_targets()
        for split, blocks in packed.items()
    }


def _check_blocks(report: CorpusReport) -> None:
    """Refuse a corpus with an empty split.

    Raises:
        CorpusError: Says how much text was read and how much is needed.
    """
    empty = [name for name, split in report.splits.items() if split.blocks == 0]
    if not empty:
        return
    smallest = min(SPLIT_FRACTIONS.values())
    # Twice what the smallest split needs on average, at a cautious 4 characters per token.
    needed = round(2 * 4 * report.block_size * report.shard[1] / smallest)
    raise CorpusError(
        f"Cannot prepare domain '{report.domain}': expected at least one block of "
        f"{report.block_size} tokens in each of the five splits, got none in {', '.join(empty)} "
        f"from {report.documents} documents of {report.characters} characters in all. "
        f"Add text: about {needed} characters are needed."
    )


def _compute_key(
    domain: str,
    documents: Sequence[Document],
    tokenizer: Any,
    rules: CorpusRules,
    shard: tuple[int, int],
) -> str:
    """SHA-256 over everything that decides the blocks."""
    parts = [
        FORMAT_VERSION,
        domain,
        fingerprint_encoding(tokenizer),
        rules.block_size,
        rules.split_seed,
        list(shard),
        [[document.name, hash_bytes(document.text.encode())] for document in documents],
    ]
    markup = [asdict(document.markup) if document.markup else None for document in documents]
    if any(markup):  # without any, the key is what it was before there was markup
        parts.append(markup)
    return hash_bytes(canonical_json(parts))


def prepare_corpus(
    domain: str,
    documents: Iterable[Document],
    tokenizer: Any,
    *,
    rules: CorpusRules,
    folder: Path | None = None,
    shard: tuple[int, int] = (0, 1),
    inventory: Inventory | None = None,
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """Turn a domain's documents into blocks, or load them if the same were prepared before.

    Args:
        domain: Domain name.
        documents: All documents of the domain, in a fixed order.
        tokenizer: Hugging Face tokenizer of the base checkpoint.
        rules: Block size and seed, from the charter.
        folder: Where to keep the blocks and the report; None keeps them in memory only.
        shard: Index of this contributor among those who share the domain, and their number;
            the shards are disjoint in every split.
        inventory: What was read and left out, filled by the documents as they come; for the report.
        options: Options of the registered domain that the documents are of, for the report.
        progress: Called with documents compared of all.

    Returns:
        The blocks of the five splits, none of them empty, and the report.

    Raises:
        CorpusError: If there is too little text; says what was read and what is needed.
        StorageError: On I/O errors.
    """
    index, num_shards = shard
    if not 0 <= index < num_shards:
        raise CorpusError(
            f"Cannot prepare domain '{domain}': expected a shard index below {num_shards}, got "
            f"{index}. Count contributors from 0."
        )
    everything = [document for document in documents if document.text.strip()]
    characters = sum(len(document.text) for document in everything)
    key = _compute_key(domain, everything, tokenizer, rules, shard)
    found = _find_prepared(folder, key)
    files, options = inventory.to_json() if inventory else None, dict(options or {})
    if found is not None:
        return replace(found, report=replace(found.report, files=files, options=options))
    try:
        whole = split_documents(everything, seed=rules.split_seed, progress=progress)
    except CorpusError as error:
        raise CorpusError(
            f"Cannot prepare domain '{domain}' from {len(everything)} documents of {characters} "
            f"characters in all: {error}"
        ) from error
    part = _take_shard(whole, shard)
    blocks = _pack(domain, part, tokenizer, rules.block_size)
    report = _build_report(domain, whole, part, blocks, shard, rules.block_size)
    report = replace(report, files=files, options=options)
    _check_blocks(report)
    if folder is not None:
        with replace_folder(folder) as temporary:
            for split, packed in blocks.items():
                packed.save(temporary / f"{split}.safetensors")
            write_json(temporary / _REPORT_FILE, {"key": key, "report": report.to_json()})
    return Corpus(domain, folder, blocks, report)


def _find_prepared(folder: Path | None, key: str) -> Corpus | None:
    """The corpus in a folder if it was made from the same input and is undamaged."""
    if folder is None or _read_header(folder).get("key") != key:
        return None
    try:
        return load_corpus(folder)
    except CorpusError:
        return None  # damaged since; it is prepared anew


def _read_header(folder: Path) -> dict[str, Any]:
    """The key and report of a prepared corpus; empty if there is none that can be read."""
    path = folder / _REPORT_FILE
    try:
        if path.stat().st_size > _MAX_REPORT_BYTES:
            return {}
        header = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return header if isinstance(header, dict) else {}


def load_report(folder: Path) -> CorpusReport:
    """Read the report of a corpus that `prepare_corpus` kept.

    Raises:
        CorpusError: If the folder or the report is missing or malformed.
    """
    try:
        return parse_report(_read_header(folder)["report"])
    except (KeyError, TypeError, ValueError) as error:
        raise CorpusError(
            f"Cannot load corpus '{folder}': expected a prepared corpus, got no valid "
            f"{_REPORT_FILE}. Prepare it again."
        ) from error


def load_corpus(folder: Path) -> Corpus:
    """Read a corpus that `prepare_corpus` kept.

    Raises:
        CorpusError: If the folder is missing, incomplete or malformed.
    """
    report = load_report(folder)
    blocks = {split: load_blocks(folder / f"{split}.safetensors") for split in SPLIT_FRACTIONS}
    for split, packed in blocks.items():
        expected = report.splits[split].blocks
        if len(packed) != expected or packed.split is not split:
            raise CorpusError(
                f"Cannot load corpus '{folder}': expected {expected} blocks of split '{split}', "
                f"got {len(packed)} of '{packed.split}'. Prepare it again."
            )
    return Corpus(report.domain, folder, blocks, report)
