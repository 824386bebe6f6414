"""One frozen pass of the base or of one expert over blocks, and the columns it leaves on disk."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor

from molora_fed.adapters.carried_files import CarriedFiles
from molora_fed.bank.columns import (
    ColumnKey,
    build_key,
    column_path,
    make_scratch,
    open_column,
    write_rows,
)
from molora_fed.corpus.blocks import Blocks
from molora_fed.errors import ExpertError, StorageError
from molora_fed.models.forward import Pass, Resume, run_blocks
from molora_fed.models.states import Capture
from molora_fed.storage.files import make_folder, storage_errors, stream_bytes, write_json
from molora_fed.types import Mixture, Progress, Reading

if TYPE_CHECKING:
    from molora_fed.adapters.updates import Adapter
    from molora_fed.models.base import Base

    pass

__all__ = [
    "UNIT",
    "ColumnMaker",
    "Expert",
    "TotalsFile",
    "Wanted",
    "Work",
    "change_total",
    "check_room",
    "estimate_bank_bytes",
    "find_start",
    "list_totals",
    "open_mean",
]


@dataclass(frozen=True)
class Expert:
    """One expert of a bank.

    Attributes:
        name: Unique name; the contributor's.
        adapter: Its adapter, or a function that loads it when its turn comes, so that one
            adapter at a time is in memory; None is the base itself.
        carried: What its contribution carries.
    """

    name: str
    adapter: "Adapter | Callable[[], Adapter] | None"
    carried: CarriedFiles = field(default_factory=CarriedFiles)

    def load(self) -> "Adapter | None":
        """The adapter, loaded now if it is not in memory."""
        return self.adapter() if callable(self.adapter) else self.adapter


@dataclass(frozen=True)
class Wanted:
    """Which columns a bank needs beside the log-probabilities.

    Attributes:
        base: The base's hidden state.
        prefix: The state after the shared frozen blocks.
        mean: The experts' average state.
        experts: Every expert's state.
    """

    base: bool
    prefix: bool
    mean: bool
    experts: bool

    @staticmethod
    def of(readings: frozenset[Reading], mixture: Mixture) -> "Wanted":
        """The columns that these readings and this mixture need."""
        return Wanted(
            base="base_hidden" in readings,
            prefix="prefix_hidden" in readings,
            mean="mean_hidden" in readings,
            experts="experts_hidden" in readings or mixture == "logit",
        )


def estimate_bank_bytes(
    *,
    num_tokens: int,
    num_experts: int,
    hidden_size: int,
    itemsize: int,
    readings: frozenset[Reading],
    mixture: Mixture = "probability",
    keeps_prefix: bool = False,
) -> int:
    """Bytes on disk a bank takes at its largest, before it is built.

    Args:
        num_tokens: N * T.
        num_experts: E.
        hidden_size: D.
        itemsize: Bytes per number of the model's dtype.
        readings: Columns that routers read.
        mixture: The logit mixture keeps every expert's state.
        keeps_prefix: Whether the state after the frozen blocks is kept, so that these run once.
    """
    wanted = Wanted.of(readings, mixture)
    prefix = wanted.prefix or keeps_prefix
    logprob = 4 * (2 * num_experts + 1)  # each column, and the copy with experts side by side
    states = itemsize * (wanted.base + prefix + wanted.mean + wanted.experts * num_experts)
    sums = 2 * 8 * wanted.mean  # the old and the new running total of 64-bit integers
    return num_tokens * (logprob + hidden_size * (states + sums))


def check_room(folder: Path, needed: int) -> None:
    """Refuse a bank that the disk has no room for, before the first pass.

    Raises:
        StorageError: If less than `needed` bytes are free.
    """
    make_folder(folder)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"Cannot build bank in '{folder}': expected {needed} free bytes, got {free}. "
            "Free some space, or choose a router that reads fewer columns."
        )


@dataclass(frozen=True)
class Work:
    """What one pass has to leave on disk.

    Attributes:
        own: Hash of the adapter it runs; "" is the base.
        columns: Its own columns that are missing.
        adds: Whether its state goes into the experts' total.
    """

    own: str
    columns: tuple[str, ...]
    adds: bool

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.columns) or self.adds


@dataclass(frozen=True)
class ColumnMaker:
    """Makes the columns of one list of blocks, each expert's in one pass, and only missing ones.

    Attributes:
        folder: Where columns lie.
        base: The base checkpoint.
        blocks: Blocks of one domain and split.
        batch: Blocks per forward pass.
        depth: Frozen depth K.
        hidden_size: D.
        kept: Indices of the blocks that a bank shows, (kept,) int64; None shows all. Columns are
            made of all of them, so that they serve whichever are shown.
    """

    folder: Path
    base: "Base"
    blocks: Blocks
    batch: int
    depth: int
    hidden_size: int
    kept: Tensor | None = field(default=None, compare=False)

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype, which states are kept in."""
        return self.base.model.dtype

    def key(self, name: str, adapters: Sequence[str]) -> ColumnKey:
        """The key of one of this maker's columns; `adapters` are hashes, "" is the base."""
        return build_key(
            name,
            adapters,
            base=self.base.weights,
            blocks=self.blocks.fingerprint,
            dtype=self.dtype,
            batch=self.batch,
            depth=self.depth,
        )

    def path(self, name: str, adapters: Sequence[str]) -> Path:
        """Where a column lies."""
        return column_path(self.folder, self.key(name, adapters))

    def open(self, name: str, adapters: Sequence[str]) -> Tensor | None:
        """The column, mapped, or None if it has not been made."""
        shape = self.blocks.tokens.shape
        key = self.key(name, adapters)
        full = shape if name == "logprob" else (*shape, self.hidden_size)
        return open_column(column_path(self.folder, key), full, key.dtype)

    def plan(self, order: Sequence[str], index: int, wanted: Wanted) -> Work:
        """What is missing on disk.

        Args:
            order: Hashes of all experts, in canonical order.
            index: Which of them; -1 is the base where it is no expert.
            wanted: Columns beside the log-probabilities.
        """
        own = order[index] if index >= 0 else ""
        names = ["logprob"]
        if (wanted.experts and index >= 0) or (wanted.base and own == ""):
            names.append("hidden")
        if wanted.prefix and own == "":
            names.append("prefix")
        missing = tuple(name for name in names if self.open(name, [own]) is None)
        adds = False
        if index >= 0 and wanted.mean:
            adds = find_start(self, order).count(own) < list(order[: index + 1]).count(own)
        return Work(own, missing, adds)

    def run(
        self,
        what: str,
        order: Sequence[str],
        work: Work,
        *,
        resumes: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Run the model once over the blocks and write the columns that are missing.

        Args:
            what: Expert's name, for errors.
            order: Hashes of all experts, in canonical order.
            work: From `plan`.
            resumes: Whether the frozen blocks need not run again: where `can_resume` holds, and
                the adapter changes none of them.
            progress: Receives blocks done and blocks in all.

        Raises:
            ExpertError: If a number is not finite or too large; no column is left behind.
            StorageError: On I/O errors; likewise.
        """
        capture = Capture(
            hidden=work.adds or "hidden" in work.columns,
            prefix_depth=self.depth if "prefix" in work.columns else None,
        )
        with ExitStack() as stack:
            files = {
                name: stack.enter_context(stream_bytes(self.path(name, [work.own])))
                for name in work.columns
            }
            summing = None
            if work.adds:
                before = find_start(self, order)
                summing = stack.enter_context(change_total(self, before, (*before, work.own)))
            steps = run_blocks(
                self.base.model,
                self.blocks.tokens,
                batch=self.batch,
                capture=capture,
                resume=self._find_resume() if resumes and work.own else None,
                progress=progress,
            )
            for step in steps:
                _check_finite(step, what, self.blocks.domain)
                for name, file in files.items():
                    write_rows(file, getattr(step, name))
                if summing is not None and step.hidden is not None:
                    summing.write(step.start, step.hidden)

    def _find_resume(self) -> Resume | None:
        """What entered the first block that is not frozen, if the base's pass has left it."""
        prefix = self.open("prefix", [""])
        return prefix if prefix is None else Resume(self.depth, lambda a, b: prefix[a:b])

    def subtract(self, own: str, *, progress: Progress | None = None) -> None:
        """Take an expert out of every total it is in: one pass of the model, which is it now.

        Args:
            own: Hash of the adapter that is applied.
            progress: Receives blocks done and blocks in all.

        Raises:
            StorageError: On I/O errors.
        """
        totals = [t for t in list_totals(self.folder) if own in t.adapters and t.is_of(self)]
        with ExitStack() as stack:
            writers = []
            for total in totals:
                after = list(total.adapters)
                after.remove(own)
                if after:
                    changing = change_total(self, total.adapters, after)
                    writers.append(stack.enter_context(changing))
                else:
                    total.delete()
            if not writers:
                return
            for step in run_blocks(
                self.base.model,
                self.blocks.tokens,
                batch=self.batch,
                capture=Capture(hidden=True),
                progress=progress,
            ):
                for writer in writers:
                    if step.hidden is not None:
                        writer.write(step.start, step.hidden)


def _check_finite(step: Pass, what: str, domain: str) -> None:
    bad = int((~torch.isfinite(step.logprob)).sum())
    if bad:
        raise ExpertError(
            f"Cannot build bank for expert '{what}' on domain '{domain}': expected finite "
            f"log-probabilities, got {bad} that are not. Leave this contribution out.",
            what,
        )
    if step.hidden is not None and not bool((step.hidden.abs() <= MAX_STATE).all()):  # NaN, too
        raise ExpertError(
            f"Cannot build bank for expert '{what}' on domain '{domain}': expected hidden states "
            f"of at most {MAX_STATE:g}, got larger ones. Leave this contribution out.",
            what,
        )


MAX_STATE = 2.0**30
"""Largest hidden state; integers of 64 bits hold the sum of 500 experts of that size."""
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
        StorageError: On I/O errors; the total from before stays.
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
