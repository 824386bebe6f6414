"""Files that travel between a server and a contributor: shipments and the parts of files.

Files travel as a `Shipment` (names, sizes and hashes) and its parts (at most 64 MB each, named by
hash and offset), so a transfer resumes where it stopped. Imports neither torch nor flwr.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molora_fed.errors import FederationError
from molora_fed.storage.files import canonical_json, hash_bytes, hash_file
from molora_fed.storage.untrusted import clean
from molora_fed.types import CONFIG_FILES, TOKENIZER_FILES, WEIGHTS_INDEX

__all__ = [
    "MAX_BATCH_BYTES",
    "MAX_FILE_BYTES",
    "MAX_LETTERS_BYTES",
    "MAX_PART_BYTES",
    "FileEntry",
    "Part",
    "PartName",
    "Shipment",
    "describe_folder",
    "parse_part_name",
    "parse_shipment",
    "plan_parts",
]

MAX_PART_BYTES = 64 * 2**20
"""Largest part of a file; Flower holds 3 to 4 copies of a message in memory."""
MAX_BATCH_BYTES = 64 * 2**20
"""Largest sum of the parts in one envelope."""
MAX_LETTERS_BYTES = 900_000
"""Largest JSON of the letters in one envelope; Flower does not chunk these."""
MAX_FILES = 4_096
MAX_FILE_BYTES = 2**40

_PART = re.compile(r"([0-9a-f]{64})-([0-9]{1,13})-([0-9]{1,8})")
_HASH = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}(/[A-Za-z0-9_][A-Za-z0-9._-]{0,127}){0,5}")


def _malformed(what: str, *, expected: str, got: object) -> FederationError:
    return FederationError(
        f"Cannot read {what}: expected {expected}, got '{clean(got, 120)}'. "
        "Run the same molora-fed version on both sides."
    )


@dataclass(frozen=True, order=True)
class PartName:
    """Which bytes of which file: `length` bytes at `offset` of the file with this SHA-256."""

    sha256: str
    offset: int
    length: int

    def __str__(self) -> str:
        return f"{self.sha256}-{self.offset}-{self.length}"


@dataclass(frozen=True)
class Part:
    """A part with its bytes."""

    name: PartName
    data: bytes


@dataclass(frozen=True, order=True)
class FileEntry:
    """One file of a shipment: relative name, SHA-256 and size."""

    name: str
    sha256: str
    num_bytes: int


@dataclass(frozen=True)
class Shipment:
    """A folder's files by name, hash and size, in the order of their names."""

    files: tuple[FileEntry, ...]

    @property
    def id(self) -> str:
        """SHA-256 over names, hashes and sizes: equal content, equal id."""
        return hash_bytes(canonical_json(self.to_json()))

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(entry.num_bytes for entry in self.files)

    def to_json(self) -> list[dict[str, Any]]:
        """The form that `parse_shipment` reads."""
        return [
            {"name": entry.name, "sha256": entry.sha256, "num_bytes": entry.num_bytes}
            for entry in self.files
        ]


def parse_shipment(value: Any, *, max_bytes: int = MAX_FILE_BYTES) -> Shipment:
    """Read a shipment from outside.

    Args:
        value: JSON value.
        max_bytes: Largest sum of the files' sizes.

    Raises:
        FederationError: If it is malformed, a name leaves its folder, or it is too large.
    """
    what = "a list of files"
    if not isinstance(value, list) or len(value) > MAX_FILES:
        raise _malformed(what, expected=f"a list of at most {MAX_FILES}", got=value)
    entries = []
    for item in value:
        if not isinstance(item, dict) or set(item) != {"name", "sha256", "num_bytes"}:
            raise _malformed(what, expected="name, sha256 and num_bytes", got=item)
        name, sha256, size = item["name"], item["sha256"], item["num_bytes"]
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise _malformed(what, expected="a plain relative file name", got=name)
        if not isinstance(sha256, str) or not _HASH.fullmatch(sha256):
            raise _malformed(what, expected="a SHA-256", got=sha256)
        if type(size) is not int or not 0 <= size <= MAX_FILE_BYTES:
            raise _malformed(what, expected=f"a size up to {MAX_FILE_BYTES} bytes", got=size)
        entries.append(FileEntry(name, sha256, size))
    names = [entry.name for entry in entries]
    folders = {str(parent) for name in names for parent in Path(name).parents}
    if len(set(names)) != len(names) or folders & set(names):
        raise _malformed(what, expected="each name once", got=names)
    shipment = Shipment(tuple(sorted(entries)))
    if shipment.num_bytes > max_bytes:
        raise _malformed(what, expected=f"at most {max_bytes} bytes", got=shipment.num_bytes)
    return shipment


def is_weights_file(name: str) -> bool:
    """Whether a file of a base holds weights, or says where they are."""
    return name == WEIGHTS_INDEX or name.endswith(".safetensors")


def list_describing(base: Shipment) -> Shipment:
    """What of a base's files says something about it, and is no part of the checkpoint."""
    parts = {*CONFIG_FILES, *TOKENIZER_FILES}
    return Shipment(
        tuple(
            entry
            for entry in base.files
            if entry.name not in parts and not is_weights_file(entry.name)
        )
    )


def describe_folder(folder: Path) -> Shipment:
    """The shipment of all files of a folder; names that start with a dot are left out.

    Raises:
        FederationError: If a file's name could not be received.
    """
    entries = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not any(part.startswith(".") for part in name.split("/")):
            entries.append(FileEntry(name, hash_file(path), path.stat().st_size))
    return parse_shipment(Shipment(tuple(entries)).to_json())


def plan_parts(shipment: Shipment, *, part_bytes: int = MAX_PART_BYTES) -> list[PartName]:
    """The parts of all files of a shipment; files with equal content are sent once."""
    sizes = {entry.sha256: entry.num_bytes for entry in shipment.files}
    return [
        PartName(sha256, offset, min(part_bytes, size - offset))
        for sha256, size in sizes.items()
        for offset in range(0, size, part_bytes)
    ]


def parse_part_name(value: Any) -> PartName:
    """Read a part name written by `str(PartName)`.

    Raises:
        FederationError: If it is not hash-offset-length, or too long.
    """
    what = "a part's name"
    found = _PART.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise _malformed(what, expected="hash-offset-length", got=value)
    name = PartName(found[1], int(found[2]), int(found[3]))
    if not 0 < name.length <= MAX_PART_BYTES or name.offset > MAX_FILE_BYTES:
        raise _malformed(what, expected=f"1 to {MAX_PART_BYTES} bytes", got=value)
    return name
