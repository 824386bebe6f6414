"""What was read of a contributor's files, what was left out, and why; counted by kind of file."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from molora_fed.storage.untrusted import clean
from molora_fed.types import Document

__all__ = ["Inventory"]

MAX_NAMES = 3
"""Names that stand for a row's files."""
MAX_REASONS = 30
_OTHER = "other reasons"
_MAX_REASON = 200
_MAX_NAME = 120


@dataclass
class _Row:
    """Files that are counted together."""

    files: int = 0
    names: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        self.files += 1
        if len(self.names) < MAX_NAMES:
            self.names.append(clean(name, _MAX_NAME))

    def describe(self) -> str:
        more = self.files - len(self.names)
        shown = ", ".join(f"'{name}'" for name in self.names)
        return f"{shown} and {more:,} more" if more else shown


@dataclass
class _Kind(_Row):
    """Files of one kind that were read."""

    documents: int = 0
    characters: int = 0
    encodings: dict[str, int] = field(default_factory=dict)


class Inventory:
    """What was read and what was left out; filled while documents are read.

    A file is read whole or left out whole.
    """

    def __init__(self) -> None:
        self._read: dict[str, _Kind] = {}
        self._left_out: dict[str, _Row] = {}

    def add(self, kind: str, name: str, documents: Sequence[Document], encoding: str = "") -> None:
        """Count a file that was read.

        Args:
            kind: Kind of file.
            name: The file.
            documents: What it holds.
            encoding: Empty for UTF-8; ends in "?" where it was guessed.
        """
        row = self._read.setdefault(kind, _Kind())
        row.add(name)
        row.documents += len(documents)
        row.characters += sum(len(document.text) for document in documents)
        if encoding:
            row.encodings[encoding] = row.encodings.get(encoding, 0) + 1

    def leave_out(self, name: str, reason: str) -> None:
        """Count a file that was left out; reasons beyond the first 30 are counted together."""
        reason = clean(reason, _MAX_REASON)
        if reason not in self._left_out and len(self._left_out) >= MAX_REASONS:
            reason = _OTHER
        self._left_out.setdefault(reason, _Row()).add(name)

    def describe_left_out(self, most: int = 3) -> str:
        """The commonest reasons with their files, in one line; empty if nothing was left out."""
        rows = self._sort_left_out()
        shown = [f"{reason}: {row.describe()}" for reason, row in rows[:most]]
        rest = sum(row.files for _, row in rows[most:])
        return "; ".join([*shown, *([f"{rest:,} more for other reasons"] if rest else [])])

    def _sort_left_out(self) -> list[tuple[str, _Row]]:
        return sorted(self._left_out.items(), key=lambda item: (-item[1].files, item[0]))

    def to_json(self) -> dict[str, Any]:
        """The table as JSON values: rows by kind, and by reason, the commonest first."""
        return {
            "read": [
                {
                    "kind": kind,
                    "files": row.files,
                    "documents": row.documents,
                    "characters": row.characters,
                    "encodings": dict(sorted(row.encodings.items())),
                    "names": row.names,
                }
                for kind, row in sorted(self._read.items())
            ],
            "left_out": [
                {"reason": reason, "files": row.files, "names": row.names}
                for reason, row in self._sort_left_out()
            ],
        }
