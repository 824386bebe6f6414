"""Blocks: tokens of one split of one domain, how documents are packed into them, their files."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from molora_fed.errors import CorpusError
from molora_fed.storage.files import canonical_json, hash_bytes, write_bytes
from molora_fed.storage.untrusted import clean, parse_json
from molora_fed.types import Document, Split

__all__ = [
    "Blocks",
    "fingerprint_encoding",
    "load_blocks",
    "pack_documents",
    "tokenize_documents",
]


_TENSORS = ("tokens", "documents", "clusters")
_TARGETS = "targets"
MAX_BLOCKS_BYTES = 4 * 2**30
_DTYPES: dict[str, tuple[str, type]] = {
    **dict.fromkeys(_TENSORS, ("I32", np.int32)),
    _TARGETS: ("BOOL", np.bool_),
}
"""Of each tensor, as its file calls it and as numpy does."""
_MAX_HEAD = 4_096  # characters of what a file says of its blocks


@dataclass(frozen=True, eq=False)
class Blocks:
    """Packed blocks; no padding, every position counts.

    Attributes:
        domain: Domain name.
        split: Which split these are.
        tokens: Token ids, (N, T) int32.
        documents: Index of the document each token belongs to, (N, T) int32; a document's last
            token is the end-of-text token.
        clusters: Near-duplicate cluster of each token, (N, T) int32; the unit of bootstraps.
        targets: Whether a token counts in a training loss, (N, T) bool; None if all do. What is
            measured for others is measured over all tokens.
    """

    domain: str
    split: Split
    tokens: NDArray[np.int32]
    documents: NDArray[np.int32]
    clusters: NDArray[np.int32]
    targets: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        shapes = {name: array.shape for name, array in self._arrays().items()}
        if len(set(shapes.values())) != 1 or self.tokens.ndim != 2:
            raise CorpusError(
                f"Cannot use blocks of domain '{self.domain}': expected equal (N, T) "
                f"arrays, got {shapes}. Prepare the corpus again."
            )

    def _arrays(self) -> dict[str, NDArray[Any]]:
        """All arrays that there are, by name."""
        targets = {} if self.targets is None else {_TARGETS: self.targets}
        return {**{name: getattr(self, name) for name in _TENSORS}, **targets}

    def __len__(self) -> int:
        """Number of blocks N."""
        return int(self.tokens.shape[0])

    @property
    def block_size(self) -> int:
        """T, tokens per block."""
        return int(self.tokens.shape[1])

    @cached_property
    def document_starts(self) -> NDArray[np.bool_]:
        """True at the first token of a document and at the first of a block, (N, T)."""
        starts = np.ones(self.documents.shape, dtype=np.bool_)
        starts[:, 1:] = self.documents[:, 1:] != self.documents[:, :-1]
        return starts

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over shape and arrays; equal blocks have equal fingerprints."""
        head = json.dumps([self.domain, self.split, list(self.tokens.shape)]).encode()
        body = (np.ascontiguousarray(array).tobytes() for array in self._arrays().values())
        return hash_bytes(head + b"".join(body))

    def take(self, count: int) -> "Blocks":
        """The first `count` blocks (all of them if there are fewer)."""
        return self.select(slice(count))

    def select(self, rows: "NDArray[Any] | slice") -> "Blocks":
        """Some of the blocks: a slice, a mask (N,), or indices."""
        chosen = {name: array[rows] for name, array in self._arrays().items()}
        return Blocks(self.domain, self.split, **chosen)

    def without_targets(self) -> "Blocks":
        """The same blocks, all of whose tokens count."""
        return self if self.targets is None else replace(self, targets=None)

    def in_text_order(self) -> "Blocks | None":
        """The blocks of a whole split in the order of the text they were cut from.

        Consecutive blocks are then consecutive text. None for a sample of a split, whose order in
        the text is not known; a sample of a single document cannot be told from a whole split.
        """
        order = _draw_order(len(self))
        ordered = self.select(np.argsort(order))
        owners = ordered.documents.reshape(-1)
        return ordered if np.all(owners[1:] >= owners[:-1]) else None

    def to_bytes(self) -> bytes:
        """The safetensors form that `load_blocks` reads."""
        tensors: dict[str, NDArray[Any]] = {
            name: np.ascontiguousarray(array, dtype=_DTYPES[name][1])
            for name, array in self._arrays().items()
        }
        head = {"domain": self.domain, "split": str(self.split)}
        # One entry only: safetensors writes several in an order that differs from call to call.
        return save(tensors, metadata={"blocks": canonical_json(head).decode()})

    def save(self, path: Path) -> None:
        """Write the blocks, whole or not at all.

        Raises:
            StorageError: On I/O errors.
        """
        write_bytes(path, self.to_bytes())


def load_blocks(path: Path, *, max_bytes: int = MAX_BLOCKS_BYTES) -> Blocks:
    """Read blocks; safe on files from outside.

    Args:
        path: File written by `Blocks.save`.
        max_bytes: Refused above this size, before anything is allocated.

    Raises:
        CorpusError: If the file is missing, too large, malformed, or not blocks.
    """
    what = f"Cannot read blocks '{clean(path)}'"
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise CorpusError(
                f"{what}: expected at most {max_bytes} bytes, got {size}. Send fewer blocks."
            )
        with safe_open(path, framework="np") as file:
            head = parse_json((file.metadata() or {}).get("blocks", "{}"), max_bytes=_MAX_HEAD)
            names = set(file.keys())
            if (
                names - {_TARGETS} != set(_TENSORS)
                or not isinstance(head, dict)
                or not {"domain", "split"} <= head.keys()
            ):
                found = ", ".join(clean(name, 40) for name in sorted(names)[:5])
                raise CorpusError(
                    f"{what}: expected tensors {', '.join(_TENSORS)} with domain and split, "
                    f"got {found}. Prepare the corpus again."
                )
            # By the header, before numpy is asked for a type that it may not have.
            parts = {name: file.get_slice(name) for name in _DTYPES if name in names}
            for name, part in parts.items():
                dtype, kind = _DTYPES[name]
                if part.get_dtype() != dtype:
                    raise CorpusError(
                        f"{what}: expected {kind.__name__} in '{name}', got {part.get_dtype()}. "
                        "Prepare the corpus again."
                    )
            shapes = {name: tuple(part.get_shape()) for name, part in parts.items()}
            if len(set(shapes.values())) != 1 or len(shapes["tokens"]) != 2:
                raise CorpusError(
                    f"{what}: expected equal (N, T) arrays, got {clean(shapes)}. "
                    "Prepare the corpus again."
                )
            arrays = {name: file.get_tensor(name) for name in sorted(names)}
        return Blocks(clean(head["domain"]), Split(head["split"]), **arrays)
    except CorpusError:
        raise
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise CorpusError(
            f"{what}: expected a safetensors file of blocks, got {clean(error)}. "
            "Prepare the corpus again."
        ) from error


_ORDER_SEED = 0
_Value = TypeVar("_Value", bound=np.generic)


def _draw_order(num_blocks: int) -> NDArray[np.int64]:
    """The order in which a split's blocks are kept, as indices into the text's order, (N,)."""
    return np.random.default_rng(_ORDER_SEED).permutation(num_blocks)


def fingerprint_encoding(tokenizer: Any) -> str:
    """SHA-256 of everything that decides which ids a text becomes (Hugging Face tokenizer)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        vocabulary = sorted(tokenizer.get_vocab().items())
        return hash_bytes(canonical_json([tokenizer.eos_token_id, vocabulary]))
    rules = json.loads(backend.to_str())
    # Left behind by the last call of anyone; every call sets them anew.
    rules.pop("truncation", None)
    rules.pop("padding", None)
    return hash_bytes(canonical_json([tokenizer.eos_token_id, rules]))


def tokenize_documents(documents: Sequence[Document], tokenizer: Any) -> list[NDArray[np.int32]]:
    """Token ids of each document, each ended by the end-of-text token.

    Args:
        documents: N documents; special tokens spelled out in their text stay text, but for those
            that a chat template put there, as their markup says.
        tokenizer: Hugging Face tokenizer with an end-of-text token.

    Returns:
        N arrays of shape (number of tokens + 1,).

    Raises:
        CorpusError: If the tokenizer has no end-of-text token.
    """
    return [tokens for tokens, _ in _tokenize(documents, tokenizer, with_targets=False)]


_Tokens = tuple[NDArray[np.int32], NDArray[np.bool_]]


def _tokenize(
    documents: Sequence[Document], tokenizer: Any, *, with_targets: bool
) -> list[_Tokens]:
    """Ids of each document's tokens, and which count in a training loss: all without targets.

    Raises:
        CorpusError: If the tokenizer has no end-of-text token, or does not tell which characters a
            token stands for where targets are wanted.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise CorpusError(
            f"Cannot pack text with tokenizer '{tokenizer.name_or_path}': expected an end-of-text "
            "token, got none. Set eos_token in its tokenizer_config.json."
        )
    if with_targets and not tokenizer.is_fast:
        raise CorpusError(
            f"Cannot count answers alone with tokenizer '{tokenizer.name_or_path}': expected one "
            "that tells which characters a token stands for, got one without tokenizer.json. "
            "Leave --loss-on out."
        )
    parts = [_list_parts(document) for document in documents]
    texts = [text for some in parts for _, text, is_special in some if not is_special]
    if not texts:
        return []
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_offsets_mapping=with_targets,
        verbose=False,
    )
    found = iter(
        zip(
            encoded["input_ids"],
            encoded["offset_mapping"] if with_targets else repeat(()),
            strict=False,
        )
    )
    result = []
    for document, some in zip(documents, parts, strict=True):
        ids: list[int] = []
        starts: list[int] = []  # of each token's characters; empty without targets
        for place, text, is_special in some:
            if is_special:
                ids.append(tokenizer.convert_tokens_to_ids(text))
                starts += [place] * with_targets
            else:
                own, offsets = next(found)
                ids += own
                starts += (place + first for first, _ in offsets)
        tokens = np.array([*ids, end], dtype=np.int32)
        result.append((tokens, _find_targets(document, starts, len(tokens))))
    return result


def _list_parts(document: Document) -> list[tuple[int, str, bool]]:
    """Texts and special tokens of a document: first character, text, whether it is a token."""
    text, parts, start = document.text, [], 0
    for first, end in document.markup.special if document.markup else ():
        parts += [(start, text[start:first], False)] if start < first else []
        parts.append((first, text[first:end], True))
        start = end
    return [*parts, (start, text[start:], False)] if start < len(text) or not parts else parts


def _find_targets(document: Document, starts: Sequence[int], num_tokens: int) -> NDArray[np.bool_]:
    """Which tokens count: those that begin in an answer, and the end of a text that ends in one."""
    answers = document.markup.answers if document.markup else None
    if answers is None or not starts:
        return np.ones(num_tokens, dtype=np.bool_)
    targets = np.zeros(num_tokens, dtype=np.bool_)
    places = np.array(starts, dtype=np.int64)
    for first, end in answers:
        targets[:-1] |= (places >= first) & (places < end)
    targets[-1] = bool(answers) and answers[-1][1] == len(document.text)
    return targets


def pack_documents(
    documents: Sequence[Document],
    clusters: NDArray[np.int32],
    tokenizer: Any,
    *,
    domain: str,
    split: Split,
    block_size: int,
) -> Blocks:
    """Tokenise documents and pack them into blocks.

    The blocks come in a fixed random order, so that the first few of them, which is what a
    contributor sends as a sample, are drawn from all clusters. The last, incomplete block is
    left out.

    Args:
        documents: N documents.
        clusters: Cluster of each document, (N,).
        tokenizer: Hugging Face tokenizer with an end-of-text token.
        domain: Domain name, kept in the blocks.
        split: Split, kept in the blocks.
        block_size: T, tokens per block.

    Returns:
        Blocks whose `documents` are indices into `documents`; none if there are too few tokens.
        They have targets if in any document not all tokens count.

    Raises:
        CorpusError: If the tokenizer has no end-of-text token, or does not tell which characters a
            token stands for where targets are wanted.
    """
    with_targets = any(d.markup is not None and d.markup.answers is not None for d in documents)
    tokenized = _tokenize(documents, tokenizer, with_targets=with_targets)
    tokens = [ids for ids, _ in tokenized]
    lengths = [len(ids) for ids in tokens]
    num_blocks = sum(lengths) // block_size
    owners = np.repeat(np.arange(len(documents), dtype=np.int32), lengths)
    flat = np.concatenate([np.empty(0, dtype=np.int32), *tokens])
    order = _draw_order(num_blocks)

    def cut(row: NDArray[_Value]) -> NDArray[_Value]:
        return row[: num_blocks * block_size].reshape(num_blocks, block_size)[order]

    targets = np.concatenate([np.empty(0, dtype=np.bool_), *(counts for _, counts in tokenized)])
    return Blocks(
        domain,
        split,
        cut(flat),
        cut(owners),
        cut(clusters.astype(np.int32)[owners]),
        cut(targets) if with_targets else None,
    )
