"""Sums of experts' hidden states, kept so that a set of experts can grow and shrink by one pass.

A total is a column of 64-bit integers, the states in units of 2^-24. Integers add up to the same
bits in any order, and one can be taken out again: the mean over experts does not depend on how a
cooperative came to have its members. Beside each total lies a small JSON file that says whose
states it sums.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor

from molora_fed.bank.columns import ColumnKey, column_path, make_scratch, open_column, write_rows
from molora_fed.files import storage_errors, stream_bytes, write_json

if TYPE_CHECKING:
    from molora_fed.bank.passes import ColumnMaker

__all__ = ["UNIT", "TotalsFile", "change_total", "find_start", "list_totals", "open_mean"]

UNIT = 2.0**-24
"""What the integer 1 stands for; a float32 of size 1 has the same resolution."""

_CHUNK = 64  # blocks at once where a mean is made of a total


@dataclass(frozen=True)
class TotalsFile:
    """One total on disk.

    Attributes:
        path: The column.
        adapters: Hashes of the adapters whose states it sums, sorted; "" is the base.
        blocks: Fingerprint of the blocks.
    """

    path: Path
    adapters: tuple[str, ...]
    blocks: str

    def is_of(self, maker: "ColumnMaker") -> bool:
        """Whether it was made under this maker's base, blocks and batch, and is there."""
        return self.path == _path(maker, self.adapters) and self.path.is_file()

    def delete(self) -> None:
        """Delete the column, then the file that describes it."""
        self.path.unlink(missing_ok=True)
        self.path.with_suffix(".json").unlink(missing_ok=True)


def list_totals(folder: Path) -> list[TotalsFile]:
    """All totals of a bank's folder, by name."""
    found = []
    for path in sorted(folder.glob("total-*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):  # then it is made again
            value = json.loads(path.read_text(encoding="utf-8"))
            adapters = tuple(str(adapter) for adapter in value["adapters"])
            found.append(TotalsFile(path.with_suffix(".bin"), adapters, str(value["blocks"])))
    return found


def find_start(maker: "ColumnMaker", order: Sequence[str]) -> tuple[str, ...]:
    """The largest known part of a set of experts, to which the others are added.

    Args:
        maker: Whose blocks.
        order: Hashes of all experts.

    Returns:
        Sorted hashes; empty if no total is of any use.
    """
    wanted = Counter(order)
    best: tuple[str, ...] = ()
    for total in list_totals(maker.folder):
        is_part = not Counter(total.adapters) - wanted
        if is_part and len(total.adapters) > len(best) and total.is_of(maker):
            best = total.adapters
    return best


def _key(maker: "ColumnMaker", adapters: Sequence[str]) -> ColumnKey:
    return maker.key("total", sorted(adapters))


def _path(maker: "ColumnMaker", adapters: Sequence[str]) -> Path:
    return column_path(maker.folder, _key(maker, adapters))


def _open(maker: "ColumnMaker", adapters: Sequence[str]) -> Tensor | None:
    key = _key(maker, adapters)
    shape = (*maker.blocks.tokens.shape, maker.hidden_size)
    return open_column(column_path(maker.folder, key), shape, key.dtype)


class TotalWriter:
    """Writes a total batch by batch, from the one before and the states of one expert."""

    def __init__(self, file: BinaryIO, before: Tensor | None, sign: int) -> None:
        self._file = file
        self._before = before
        self._sign = sign

    def write(self, start: int, hidden: Tensor) -> None:
        """Add a batch.

        Args:
            start: Index of its first block.
            hidden: States, (B, T, D).
        """
        rows = self._sign * torch.round(hidden.double().cpu() / UNIT).long()
        if self._before is not None:
            rows += self._before[start : start + len(rows)]
        write_rows(self._file, rows)


@contextmanager
def change_total(
    maker: "ColumnMaker", before: Sequence[str], after: Sequence[str]
) -> Iterator[TotalWriter]:
    """Make a total from another that has one expert less, or one more, and replaces it.

    Args:
        maker: Whose blocks.
        before: Hashes in the total to begin with; none begins at zero.
        after: Hashes in the new one.

    Yields:
        What takes the states of the one expert that is new or gone, in order.

    Raises:
        StorageError: If the disk refuses; the total from before stays.
    """
    target = _path(maker, after)
    start = _open(maker, before) if before else None
    describing = {"adapters": sorted(after), "blocks": maker.blocks.fingerprint}
    write_json(target.with_suffix(".json"), describing)
    with stream_bytes(target) as file:
        yield TotalWriter(file, start, 1 if len(after) > len(before) else -1)
    if before:
        old = TotalsFile(_path(maker, before), tuple(sorted(before)), maker.blocks.fingerprint)
        with storage_errors(old.path):
            old.delete()


def open_mean(maker: "ColumnMaker", order: Sequence[str]) -> Tensor | None:
    """The experts' average state, (N, T, D) in the model's dtype, or None if its total is not made.

    Raises:
        StorageError: If the disk has no room for it.
    """
    total = _open(maker, order)
    if total is None:
        return None
    mean = make_scratch(maker.folder, total.shape, maker.dtype)
    for start in range(0, len(total), _CHUNK):
        rows = slice(start, start + _CHUNK)
        mean[rows] = (total[rows].double() * (UNIT / len(order))).to(maker.dtype)
    return mean
