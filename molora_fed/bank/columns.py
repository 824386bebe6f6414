"""Columns on disk: named by the hash of everything that decides their numbers, memory-mapped."""

import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from molora_fed.errors import BankError
from molora_fed.storage.files import canonical_json, hash_bytes, storage_errors

__all__ = ["ColumnKey", "build_key", "column_path", "make_scratch", "open_column", "write_rows"]

CODE_VERSION = 1  # raise whenever a change alters the numbers in a column


@dataclass(frozen=True)
class ColumnKey:
    """Everything that decides a column's numbers.

    Attributes:
        name: What it holds: logprob, hidden, prefix or total.
        base: Fingerprint of the base's weights.
        adapters: Hashes of the adapters it is computed from, in order; "" is the base itself.
        blocks: Fingerprint of the blocks.
        dtype: Dtype of its numbers.
        batch: Blocks per forward pass.
        depth: Frozen depth, for prefix states; -1 otherwise.
    """

    name: str
    base: str
    adapters: tuple[str, ...]
    blocks: str
    dtype: torch.dtype
    batch: int
    depth: int = -1

    @property
    def hash(self) -> str:
        """SHA-256 of the key, lower-case hex."""
        return _hash_key(self)


@lru_cache(maxsize=4096)
def _hash_key(key: ColumnKey) -> str:
    parts = {**vars(key), "dtype": str(key.dtype), "version": CODE_VERSION}
    return hash_bytes(canonical_json(parts))


def build_key(
    name: str,
    adapters: Sequence[str],
    *,
    base: str,
    blocks: str,
    dtype: torch.dtype,
    batch: int,
    depth: int,
) -> ColumnKey:
    """The key of a column, whatever of the arguments decides that column's numbers.

    Args:
        name: What it holds.
        adapters: Hashes of the adapters it is computed from, in order.
        base: Fingerprint of the base's weights.
        blocks: Fingerprint of the blocks.
        dtype: The model's dtype; log-probabilities are float32 and totals int64 with any.
        batch: Blocks per forward pass.
        depth: Frozen depth K; only prefix states depend on it.
    """
    return ColumnKey(
        name=name,
        base=base,
        adapters=tuple(adapters),
        blocks=blocks,
        dtype={"logprob": torch.float32, "total": torch.int64}.get(name, dtype),
        batch=batch,
        depth=depth if name == "prefix" else -1,
    )


def column_path(folder: Path, key: ColumnKey) -> Path:
    """Where a column lies: its key's hash is its name, so a stale one is never read."""
    return folder / f"{key.name}-{key.hash[:32]}.bin"


def open_column(path: Path, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
    """Map a column; nothing is read until its rows are.

    Args:
        path: From `column_path`.
        shape: Shape of the whole column.
        dtype: Its dtype.

    Returns:
        A tensor over the file's pages (writes to it would not reach the file), or None if the
        column has not been made.

    Raises:
        BankError: If the file has another size.
    """
    if not path.is_file():
        return None
    expected = prod(shape) * dtype.itemsize
    if path.stat().st_size != expected:
        raise BankError(
            f"Cannot open bank column '{path.name}': expected {expected} bytes, "
            f"got {path.stat().st_size}. Delete the file; it is made again."
        )
    if expected == 0:
        return torch.zeros(tuple(shape), dtype=dtype)
    mapped: Tensor = torch.from_file(str(path), shared=False, size=prod(shape), dtype=dtype)
    return mapped.view(tuple(shape))


def make_scratch(folder: Path | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An empty tensor for derived numbers: pages of an unnamed file, so memory stays flat.

    Args:
        folder: Where there is room; None takes ordinary memory.
        shape: Shape.
        dtype: Dtype.

    Raises:
        StorageError: If the disk has no room; checked before anything is written.
    """
    size = prod(shape) * dtype.itemsize
    if folder is None or size == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    path = folder / f".scratch.{uuid.uuid4().hex}.tmp"
    with storage_errors(path):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                # Room is reserved first: writing to a hole on a full disk would kill the process.
                reserve = getattr(os, "posix_fallocate", None)  # not on every system
                if reserve is not None:
                    reserve(descriptor, 0, size)
            finally:
                os.close(descriptor)
            mapped: Tensor = torch.from_file(str(path), shared=True, size=prod(shape), dtype=dtype)
        finally:
            path.unlink(missing_ok=True)
    return mapped.view(tuple(shape))


def write_rows(file: BinaryIO, rows: Tensor) -> None:
    """Append rows to a column's file."""
    file.write(rows.detach().cpu().contiguous().view(torch.uint8).numpy().data)
