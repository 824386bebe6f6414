"""What commands print: plain aligned lists, and Rich tables where figures are compared."""

import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from molora_fed.storage.untrusted import clean

if TYPE_CHECKING:
    from rich.console import RenderableType

    from molora_fed.cooperative.outgoing import Outgoing
    from molora_fed.corpus.report import CorpusReport

__all__ = [
    "build_corpus_table",
    "build_text_tables",
    "format_time",
    "note",
    "print_columns",
    "show",
    "show_outgoing",
]

MAX_LINE = 8_000
"""Characters of one line."""
PIPE_WIDTH = 200
"""Columns of tables that go to a file or another program: nothing is cut."""


def format_time(seconds: int) -> str:
    """A time, seconds since 1970, to the minute and in this machine's zone."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def note(text: str) -> None:
    """Say something about the run, beside its result: one line on standard error."""
    print(clean(text, MAX_LINE), file=sys.stderr, flush=True)


def print_columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows with aligned columns; cells may hold text from outside."""
    rows = [[clean(cell, MAX_LINE) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def show(*parts: "RenderableType") -> None:
    """Print Rich tables and texts on standard output, or plainly into a pipe."""
    from rich.console import Console

    from molora_fed.reporting.cells import as_text

    width = None if sys.stdout.isatty() else PIPE_WIDTH
    # No markup: names and messages of others are in what is shown.
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    lines = [as_text(part, limit=MAX_LINE) if isinstance(part, str) else part for part in parts]
    console.print(*lines, sep="\n")


def show_outgoing(outgoing: "Outgoing") -> None:
    """Show what a contributor sends, and what can be told from it."""
    from molora_fed.reporting.summary import build_outgoing_table

    show(build_outgoing_table(outgoing.rows), "What can be told from it:")
    show(*(f"- {line}" for line in outgoing.told))


def build_corpus_table(report: "CorpusReport") -> "RenderableType":
    """What a prepared corpus holds, and how much of each split occurs in train."""
    from rich.table import Table

    from molora_fed.reporting.cells import as_text
    from molora_fed.types import Split

    table = Table(
        title=as_text(
            f"Corpus '{report.domain}': {report.documents} documents in {report.clusters} "
            f"clusters, blocks of {report.block_size} tokens"
        ),
        title_justify="left",
        caption=None
        if report.qualifies
        else "Held-out is small (below 20 clusters or 64 blocks): its figures will be rough.",
        caption_justify="left",
    )
    table.add_column("split")
    for name in ("documents", "clusters", "tokens", "blocks", "8-grams in train"):
        table.add_column(name, justify="right")
    for name in Split:
        split = report.splits[name]
        found = "-" if name == "train" else f"{100 * split.contamination:.2f} %"
        counts = (split.documents, split.clusters, split.tokens, split.blocks)
        table.add_row(name, *(f"{count:,}" for count in counts), found)
    return table


def build_text_tables(files: Mapping[str, Any] | None) -> "list[RenderableType]":
    """What was read of a contributor's files, and what was left out and why.

    Args:
        files: Of a corpus report; None shows nothing.
    """
    from rich.table import Table

    from molora_fed.reporting.cells import as_text

    if files is None:
        return []
    read = Table(title="Text that was read", title_justify="left")
    for name in ("kind", "files", "documents", "characters", "other than UTF-8", "first names"):
        read.add_column(name, justify="right" if name in _COUNTS else "left")
    for row in files["read"]:
        # With a question mark: a guess.
        encodings = ", ".join(f"{name}: {count:,}" for name, count in row["encodings"].items())
        counts = (f"{row[name]:,}" for name in _COUNTS)
        names = ", ".join(row["names"])
        read.add_row(as_text(row["kind"]), *counts, as_text(encodings or "-"), as_text(names))
    left_out = Table(title="Left out", title_justify="left")
    for name in ("reason", "files", "first names"):
        left_out.add_column(name, justify="right" if name in _COUNTS else "left")
    for row in files["left_out"]:
        names = ", ".join(row["names"])
        left_out.add_row(as_text(row["reason"]), f"{row['files']:,}", as_text(names))
    guessed = any(name.endswith("?") for row in files["read"] for name in row["encodings"])
    if guessed:
        read.caption = "A question mark: the encoding was guessed. Look at these texts."
        read.caption_justify = "left"
    return [read, *([left_out] if files["left_out"] else [])]


_COUNTS = ("files", "documents", "characters")
