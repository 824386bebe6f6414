"""Blocks: packed tokens of one split of one domain, with the document and cluster of each."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from molora_fed.errors import CorpusError
from molora_fed.files import canonical_json, hash_bytes, write_bytes
from molora_fed.types import Split

__all__ = ["Blocks", "load_blocks"]

_TENSORS = ("tokens", "documents", "clusters")
MAX_BLOCKS_BYTES = 4 * 2**30


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
    """

    domain: str
    split: Split
    tokens: NDArray[np.int32]
    documents: NDArray[np.int32]
    clusters: NDArray[np.int32]

    def __post_init__(self) -> None:
        shapes = {name: getattr(self, name).shape for name in _TENSORS}
        if len(set(shapes.values())) != 1 or self.tokens.ndim != 2:
            raise CorpusError(
                f"Cannot use blocks of domain '{self.domain}': expected three equal (N, T) "
                f"arrays, got {shapes}. Prepare the corpus again."
            )

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
        """SHA-256 over shape, tokens and documents; equal blocks have equal fingerprints."""
        head = json.dumps([self.domain, self.split, list(self.tokens.shape)]).encode()
        body = (np.ascontiguousarray(getattr(self, n)).tobytes() for n in _TENSORS)
        return hash_bytes(head + b"".join(body))

    def take(self, count: int) -> "Blocks":
        """The first `count` blocks (all of them if there are fewer)."""
        return Blocks(
            self.domain,
            self.split,
            self.tokens[:count],
            self.documents[:count],
            self.clusters[:count],
        )

    def to_bytes(self) -> bytes:
        """The safetensors form that `load_blocks` reads."""
        tensors = {n: np.ascontiguousarray(getattr(self, n), dtype=np.int32) for n in _TENSORS}
        head = {"domain": self.domain, "split": str(self.split)}
        # One entry only: safetensors writes several in an order that differs from call to call.
        return save(tensors, metadata={"blocks": canonical_json(head).decode()})

    def save(self, path: Path) -> None:
        """Write the blocks, whole or not at all.

        Raises:
            StorageError: If the disk refuses.
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
    what = f"Cannot read blocks '{path}'"
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise CorpusError(
                f"{what}: expected at most {max_bytes} bytes, got {size}. Send fewer blocks."
            )
        with safe_open(path, framework="np") as file:
            head = json.loads((file.metadata() or {}).get("blocks", "{}"))
            names = set(file.keys())
            if (
                names != set(_TENSORS)
                or not isinstance(head, dict)
                or not {"domain", "split"} <= head.keys()
            ):
                raise CorpusError(
                    f"{what}: expected tensors {', '.join(_TENSORS)} with domain and split, "
                    f"got {', '.join(sorted(names))}. Prepare the corpus again."
                )
            arrays = {name: file.get_tensor(name) for name in _TENSORS}
        for name, array in arrays.items():
            if array.dtype != np.int32:
                raise CorpusError(
                    f"{what}: expected int32 in '{name}', got {array.dtype}. "
                    "Prepare the corpus again."
                )
        return Blocks(str(head["domain"]), Split(head["split"]), **arrays)
    except CorpusError:
        raise
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise CorpusError(
            f"{what}: expected a safetensors file of blocks, got {error}. Prepare the corpus again."
        ) from error
