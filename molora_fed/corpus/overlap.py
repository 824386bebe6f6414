"""Overlap: how much of each held-out block lies in text that a fused model's parts have read.

A domain's splits share little text among themselves, but one contributor's held-out text may lie
in another's train text, or in the base's. Only blocks are needed, so that samples that were sent
can be compared as well as text on this machine.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from molora_fed.corpus.blocks import Blocks
from molora_fed.corpus.clusters import WORD, compute_shingles, find_shingles
from molora_fed.errors import CorpusError
from molora_fed.storage.files import write_bytes

__all__ = [
    "MAX_BLOCK_OVERLAP",
    "KnownText",
    "Overlap",
    "Shingles",
    "compute_block_shares",
    "copy_index",
    "find_base_index",
    "index_blocks",
    "list_shingles",
    "load_index",
    "measure_overlap",
    "save_index",
    "shingle_blocks",
    "summarise_overlap",
]

MAX_BLOCK_OVERLAP = 0.1
"""Largest share of a held-out block's word 8-grams that may lie in known text; blocks above it are
left out of every figure. Two documents count as near-duplicates from the same share on. In the
built-in cooperatives it leaves less than 1 % in every domain and costs the default four at most 6
blocks of 160 each; a quarter would leave 2.5 % in one (docs/results/contamination.md)."""

_CUT_START = re.compile(rf"\A\ufffd*(?:{WORD.pattern})?")
_CUT_END = re.compile(rf"(?:{WORD.pattern})?\ufffd*\Z")


def _list_runs(blocks: Blocks) -> Iterator[tuple[int, int]]:
    """Where each document's part of each block begins and ends, in the flattened tokens."""
    starts = np.flatnonzero(blocks.document_starts.reshape(-1))
    return zip(starts.tolist(), [*starts[1:].tolist(), blocks.tokens.size], strict=True)


@dataclass(frozen=True, eq=False)
class Shingles:
    """Word 8-grams of blocks.

    Attributes:
        hashes: By position, (G,).
        rows: Block that each lies in, (G,).
        num_blocks: N.
    """

    hashes: NDArray[np.uint64]
    rows: NDArray[np.int64]
    num_blocks: int

    def count(self, chosen: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
        """8-grams of each block, (N,); of the chosen positions (G,) if given."""
        rows = self.rows if chosen is None else self.rows[chosen]
        return np.bincount(rows, minlength=self.num_blocks)


def shingle_blocks(blocks: Blocks, tokenizer: Any) -> Shingles:
    """The 8-grams that lie in one document and one block.

    A word that the block's edge may have cut is dropped: half a word is in no other text.

    Args:
        blocks: N blocks.
        tokenizer: Hugging Face tokenizer they were made with.
    """
    tokens, size = blocks.tokens.reshape(-1), blocks.block_size
    rows, texts = [], []
    for start, end in _list_runs(blocks):
        text = _decode(tokens[start:end], tokenizer)
        if start % size == 0:
            text = _CUT_START.sub("", text, count=1)
        if end % size == 0 and tokens[end - 1] != tokenizer.eos_token_id:
            text = _CUT_END.sub("", text, count=1)
        rows.append(start // size)
        texts.append(text)
    shingles = compute_shingles(texts)
    counts = [len(hashes) for hashes in shingles]
    hashes = np.concatenate([np.empty(0, dtype=np.uint64), *shingles])
    return Shingles(hashes, np.repeat(np.array(rows, dtype=np.int64), counts), len(blocks))


def _decode(tokens: NDArray[np.int32], tokenizer: Any) -> str:
    return str(
        tokenizer.decode(
            tokens.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    )


def list_shingles(blocks: Blocks, tokenizer: Any) -> NDArray[np.uint64]:
    """The word 8-grams that shares are counted of, each once, sorted; none lies in two blocks.

    Args:
        blocks: N blocks.
        tokenizer: Hugging Face tokenizer they were made with.
    """
    return np.unique(shingle_blocks(blocks, tokenizer).hashes)


def index_blocks(blocks: Blocks, tokenizer: Any) -> NDArray[np.uint64]:
    """The word 8-grams of blocks, each once, sorted.

    Args:
        blocks: Of a whole split, whose 8-grams across blocks are found too; or a sample.
        tokenizer: Hugging Face tokenizer they were made with.
    """
    ordered = blocks.in_text_order()
    if ordered is None:
        return list_shingles(blocks, tokenizer)
    # One block as long as the text, so that no word and no 8-gram is cut within a document.
    tokens, documents, clusters = (
        array.reshape(1, -1) for array in (ordered.tokens, ordered.documents, ordered.clusters)
    )
    joined = Blocks(blocks.domain, blocks.split, tokens, documents, clusters)
    return list_shingles(joined, tokenizer)


def compute_block_shares(
    index: NDArray[np.uint64], blocks: Blocks, tokenizer: Any
) -> NDArray[np.float64]:
    """Share of each block's word 8-grams that occur in an index.

    Args:
        index: Sorted hashes, from `index_blocks` or `index_shingles`.
        blocks: N blocks.
        tokenizer: Hugging Face tokenizer they were made with.

    Returns:
        A fraction in [0, 1] per block, (N,); 0 for a block without any run of 8 words.
    """
    shingles = shingle_blocks(blocks, tokenizer)
    return _divide(shingles.count(find_shingles(index, shingles.hashes)), shingles.count())


def _divide(some: NDArray[np.int64], all_of: NDArray[np.int64]) -> NDArray[np.float64]:
    return some / np.maximum(all_of, 1)


@dataclass(frozen=True, eq=False)
class KnownText:
    """Text that a part of a fused model has read.

    Attributes:
        kind: "train" of a specialist; "sample", blocks sent to fit routers and forecasts on;
            "base".
        owner: The contributor; empty for the base.
        load: Reads its word 8-grams, sorted; called once, so that one text at a time is in memory.
    """

    kind: Literal["train", "sample", "base"]
    owner: str
    load: Callable[[], NDArray[np.uint64]]


@dataclass(frozen=True, eq=False)
class Overlap:
    """How much of a contributor's held-out blocks lies in known text.

    Attributes:
        domain: Domain of the blocks.
        totals: 8-grams of each block, by position, (N,).
        known: Those of them in any known text, (N,).
        own: 8-grams of all blocks in the contributor's own train text.
        union: Those in any contributor's train text or samples.
        base: Those in the base's train text.
    """

    domain: str
    totals: NDArray[np.int64]
    known: NDArray[np.int64]
    own: int
    union: int
    base: int

    @property
    def shares(self) -> NDArray[np.float64]:
        """Share of each block's 8-grams in known text, (N,); 0 of a block without any."""
        return _divide(self.known, self.totals)

    @property
    def kept(self) -> NDArray[np.bool_]:
        """Blocks that figures are made of, (N,)."""
        return self.shares <= MAX_BLOCK_OVERLAP


def measure_overlap(
    held_out: Mapping[str, Blocks], known: Iterable[KnownText], tokenizer: Any
) -> dict[str, Overlap]:
    """Compare held-out blocks with all known text, and choose the blocks that figures are made of.

    Args:
        held_out: Held-out blocks by contributor.
        known: Known text; a contributor's own counts as well as others'.
        tokenizer: Hugging Face tokenizer the blocks were made with.

    Returns:
        By contributor; blocks with more than `MAX_BLOCK_OVERLAP` in known text are not kept.
    """
    shingles = {name: shingle_blocks(blocks, tokenizer) for name, blocks in held_out.items()}
    found = {
        name: {
            kind: np.zeros(own.hashes.shape, dtype=np.bool_) for kind in ("own", "union", "base")
        }
        for name, own in shingles.items()
    }
    for text in known:
        index = text.load()
        for name, own in shingles.items():
            hits = find_shingles(index, own.hashes)
            found[name]["base" if text.kind == "base" else "union"] |= hits
            if text.kind == "train" and text.owner == name:
                found[name]["own"] |= hits
    return {
        name: _describe(blocks.domain, shingles[name], **found[name])
        for name, blocks in held_out.items()
    }


def _describe(
    domain: str,
    shingles: Shingles,
    own: NDArray[np.bool_],
    union: NDArray[np.bool_],
    base: NDArray[np.bool_],
) -> Overlap:
    return Overlap(
        domain=domain,
        totals=shingles.count(),
        known=shingles.count(union | base),
        own=int(own.sum()),
        union=int(union.sum()),
        base=int(base.sum()),
    )


def summarise_overlap(overlaps: Iterable[Overlap]) -> dict[str, dict[str, Any]]:
    """Overlap by domain, its contributors counted together.

    Returns:
        By domain: `own`, `union` and `base`, shares in [0, 1] of the 8-grams of all blocks that lie
        in the contributor's own train text, in any contributor's train text or samples, and in
        the base's train text; `blocks`, of them `left_out`, and `empty`, those without any run of
        8 words; and `after`, the share of the kept blocks' 8-grams that lie in any known text.
    """
    by_domain: dict[str, list[Overlap]] = {}
    for overlap in overlaps:
        by_domain.setdefault(overlap.domain, []).append(overlap)
    return {domain: _summarise(by_domain[domain]) for domain in sorted(by_domain)}


def _summarise(overlaps: Sequence[Overlap]) -> dict[str, Any]:
    totals, known, kept = (
        np.concatenate([getattr(one, name) for one in overlaps])
        for name in ("totals", "known", "kept")
    )
    shingles = max(int(totals.sum()), 1)
    return {
        **{
            name: sum(getattr(one, name) for one in overlaps) / shingles
            for name in ("own", "union", "base")
        },
        "blocks": kept.size,
        "left_out": int((~kept).sum()),
        "empty": int((totals == 0).sum()),
        "after": int(known[kept].sum()) / max(int(totals[kept].sum()), 1),
    }


def find_base_index(folder: Path) -> Path:
    """Where the word 8-grams of a base's train text lie: beside the base, so no file of it."""
    return folder.with_name(f"{folder.name}-text.safetensors")


def save_index(path: Path, index: NDArray[np.uint64], key: str) -> None:
    """Keep an index, whole or not at all.

    Args:
        path: Target.
        index: Sorted hashes.
        key: What the text belongs to, e.g. a base's recipe.

    Raises:
        StorageError: On I/O errors.
    """
    write_bytes(path, save({"shingles": index}, metadata={"key": key}))


def copy_index(source: Path, target: Path) -> None:
    """Copy the index that lies beside one base to where it lies beside its copy.

    Raises:
        StorageError: On I/O errors.
    """
    path = find_base_index(source)
    if path.is_file():
        write_bytes(find_base_index(target), path.read_bytes())


def load_index(path: Path, key: str) -> NDArray[np.uint64] | None:
    """Read an index; None if there is none, or it belongs to something else.

    Args:
        path: File of `save_index`.
        key: What it has to belong to.

    Raises:
        CorpusError: If the file is malformed.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="np") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            index: NDArray[np.uint64] = file.get_tensor("shingles")
        if index.dtype != np.uint64 or index.ndim != 1:
            raise ValueError(f"{index.dtype} of shape {index.shape}")
    except (OSError, SafetensorError, ValueError) as error:
        raise CorpusError(
            f"Cannot read the base's text index '{path}': expected sorted 64-bit hashes, got "
            f"{error}. Delete the file."
        ) from error
    return index
