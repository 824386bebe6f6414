"""Fingerprints of a checkpoint's files: read in pieces, and kept until a file changes.

What was found of a large checkpoint lies in the user's cache folder, beside what tells whether a
file is still the one that was read: device, inode, size and the times of its last change, of which
nobody but the system sets one (`ctime`). An entry counts only if it is this user's own and nobody
else can write it. What came from elsewhere a moment ago is a new file, and is always read.
"""

import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError, safe_open

from molora_fed.errors import BaseCheckpointError, StorageError
from molora_fed.models.base_files import find_file, find_weight_files, list_checkpoint_files
from molora_fed.storage.files import canonical_json, hash_bytes, hash_file, make_home, write_bytes
from molora_fed.storage.untrusted import clean, parse_json
from molora_fed.storage.values import find_cache_folder
from molora_fed.types import TOKENIZER_FILES, Progress

__all__ = [
    "Fingerprints",
    "count_tensors",
    "fingerprint_checkpoint",
    "fingerprint_tensors",
    "fingerprint_tokenizer",
    "fingerprint_weights",
]

FORMAT_VERSION = 1
KEPT_FROM_BYTES = 2**24
"""Smaller checkpoints are read each time: that takes milliseconds."""
_PIECE_BYTES = 2**22
_MEGABYTE = 10**6
_SETTLED_SECONDS = 2.0  # a file changed later than this may change again within the same tick
_MAX_ENTRY_BYTES = 2**20
_MAX_ENTRIES = 100
_FOLDER = "fingerprints"
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True)
class Fingerprints:
    """What a checkpoint is known by.

    Attributes:
        weights: See `fingerprint_weights`.
        files: SHA-256 of every file of the checkpoint by name, lower-case hex.
    """

    weights: str
    files: Mapping[str, str]


class _Meter:
    """Tells megabytes read of all, once for each."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._done, self._told = total, 0, 0
        self._progress = progress if total >= KEPT_FROM_BYTES else None

    def __call__(self, count: int) -> None:
        self._done += count
        now = self._done // _MEGABYTE
        if self._progress is not None and now > self._told:
            self._told = now
            self._progress(now, max(self._total // _MEGABYTE, 1))


def fingerprint_checkpoint(folder: Path, progress: Progress | None = None) -> Fingerprints:
    """Fingerprints of a checkpoint, as kept if none of its files has changed since.

    Args:
        folder: Checkpoint folder.
        progress: Told the megabytes read of all, where that takes a while.

    Raises:
        BaseCheckpointError: If the weights are missing, malformed, a name occurs twice, or one of
            the files is a link that leads out of the folder.
    """
    paths = list_checkpoint_files(folder)
    marks = _mark(paths)
    entry = find_cache_folder() / _FOLDER / f"{hash_bytes(canonical_json(marks))}.json"
    kept = _read_entry(entry, marks)
    if kept is not None:
        return kept
    began = time.time()
    weights = find_weight_files(folder)
    size = sum(mark[2] for mark in marks.values())
    read = size + sum(marks[path.name][2] for path in weights)
    tell = _Meter(read, progress)
    whole, _ = _hash_tensors(folder, tell, each=False)
    try:
        files = {path.name: _hash_file(path, tell) for path in paths}
    except OSError as error:
        raise _unreadable(folder, error) from error
    found = Fingerprints(whole, files)
    latest = max(max(mark[3:]) for mark in marks.values()) / 1e9
    is_settled = abs(began - latest) > _SETTLED_SECONDS and latest < began
    if size >= KEPT_FROM_BYTES and is_settled and _mark(paths) == marks:
        _write_entry(entry, marks, found)
    return found


def _mark(paths: Iterable[Path]) -> dict[str, list[int]]:
    """By name, what tells whether a file is still the same one.

    Device, inode, size in bytes, last change of content and of anything, nanoseconds.
    """
    found = {}
    for path in paths:
        now = path.stat()
        found[path.name] = [now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns]
    return found


def _read_entry(path: Path, marks: Mapping[str, list[int]]) -> Fingerprints | None:
    """What was kept, if it is ours and of these very files; None otherwise."""
    try:
        with path.open("rb") as file:
            now = os.fstat(file.fileno())
            if now.st_uid != os.geteuid() or now.st_mode & _OTHERS_WRITE:
                return None
            found = parse_json(file.read(_MAX_ENTRY_BYTES + 1), max_bytes=_MAX_ENTRY_BYTES)
        if (found["format_version"], found["marks"]) != (FORMAT_VERSION, dict(marks)):
            return None
        files = {name: str(found["files"][name]) for name in marks}
        return Fingerprints(str(found["weights"]), files)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_entry(path: Path, marks: Mapping[str, list[int]], found: Fingerprints) -> None:
    entry = {
        "format_version": FORMAT_VERSION,
        "marks": dict(marks),
        "weights": found.weights,
        "files": dict(found.files),
    }
    with suppress(StorageError):  # it is read again the next time
        make_home(path.parent)
        write_bytes(path, canonical_json(entry), mode=0o600)
    with suppress(OSError):
        entries = sorted(path.parent.glob("*.json"), key=lambda one: one.stat().st_mtime_ns)
        for old in entries[:-_MAX_ENTRIES]:
            old.unlink(missing_ok=True)


def fingerprint_weights(folder: Path, progress: Progress | None = None) -> str:
    """SHA-256 over sorted tensor names, dtypes, shapes and bytes of a checkpoint's safetensors.

    How the tensors are spread over files does not matter.

    Args:
        folder: Checkpoint folder.
        progress: See `fingerprint_checkpoint`.

    Returns:
        Lower-case hex.

    Raises:
        BaseCheckpointError: As `fingerprint_checkpoint`.
    """
    return fingerprint_checkpoint(folder, progress).weights


def fingerprint_tensors(
    folder: Path, progress: Progress | None = None
) -> tuple[str, dict[str, str]]:
    """The fingerprint of a checkpoint's weights, and of each of its tensors by name; always read.

    Args:
        folder: Checkpoint folder.
        progress: See `fingerprint_checkpoint`.

    Returns:
        As `fingerprint_weights`, and SHA-256 over dtype, shape and bytes of each tensor.

    Raises:
        BaseCheckpointError: If the weights are missing, malformed, or a name occurs twice.
    """
    size = sum(path.stat().st_size for path in find_weight_files(folder) if path.is_file())
    return _hash_tensors(folder, _Meter(size, progress), each=True)


def count_tensors(folder: Path) -> int:
    """How many tensors the weights of a checkpoint are.

    Raises:
        BaseCheckpointError: If the weights are missing or malformed.
    """
    return len(_find_tensors(folder))


@dataclass(frozen=True)
class _Tensor:
    """Where the bytes of a tensor lie."""

    path: Path
    dtype: str
    shape: list[int]
    start: int
    end: int


def _find_tensors(folder: Path) -> dict[str, _Tensor]:
    """The place of each tensor by name."""
    places: dict[str, _Tensor] = {}
    try:
        for path in find_weight_files(folder):
            # Checks the header: parts in bounds, without gaps and overlaps.
            with safe_open(path, framework="np"):
                pass
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            twice = places.keys() & header.keys()
            if twice:
                raise BaseCheckpointError(
                    f"Cannot read base checkpoint '{folder}': expected each tensor once, got "
                    f"'{clean(min(twice))}' in two files. Fetch the base again."
                )
            for name, part in header.items():
                start, end = (8 + length + place for place in part["data_offsets"])
                places[name] = _Tensor(path, part["dtype"], part["shape"], start, end)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(folder, error) from error
    return places


def _hash_tensors(
    folder: Path, tell: Callable[[int], None], *, each: bool
) -> tuple[str, dict[str, str]]:
    """The hash over all tensors, and with `each` that of each by name."""
    whole, tensors = hashlib.sha256(), {}
    places = _find_tensors(folder)
    files: dict[Path, BinaryIO] = {}
    try:
        for name in sorted(places):
            place = places[name]
            if place.path not in files:
                files[place.path] = place.path.open("rb")
            head = canonical_json([name, place.dtype, place.shape]) + b"\n"
            whole.update(head)
            own = hashlib.sha256()
            for piece in _read(files[place.path], place.start, place.end):
                whole.update(piece)
                if each:
                    own.update(piece)
                tell(len(piece))
            if each:
                tensors[name] = hashlib.sha256(head + own.digest()).hexdigest()
    except OSError as error:
        raise _unreadable(folder, error) from error
    finally:
        for file in files.values():
            file.close()
    return whole.hexdigest(), tensors


def _read(file: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    """The bytes of a part of a file, in pieces."""
    file.seek(start)
    while start < end:
        piece = file.read(min(_PIECE_BYTES, end - start))
        if not piece:
            raise OSError("the file ends too early")
        start += len(piece)
        yield piece


def _hash_file(path: Path, tell: Callable[[int], None]) -> str:
    whole = hashlib.sha256()
    with path.open("rb") as file:
        for piece in _read(file, 0, os.fstat(file.fileno()).st_size):
            whole.update(piece)
            tell(len(piece))
    return whole.hexdigest()


def _unreadable(folder: Path, error: Exception) -> BaseCheckpointError:
    return BaseCheckpointError(
        f"Cannot read base checkpoint '{folder}': expected whole safetensors files, "
        f"got {clean(error)}. Fetch the base again."
    )


def fingerprint_tokenizer(folder: Path) -> str:
    """SHA-256 over the names and hashes of a checkpoint's tokenizer files, lower-case hex.

    Raises:
        BaseCheckpointError: If the folder holds no tokenizer.
    """
    hashes = {n: hash_file(folder / n) for n in TOKENIZER_FILES if find_file(folder, n)}
    if not hashes:
        raise BaseCheckpointError(
            f"Cannot read base checkpoint '{folder}': expected a tokenizer, got none of "
            f"{', '.join(TOKENIZER_FILES)}. Save the tokenizer beside the weights."
        )
    return hash_bytes(canonical_json(hashes))
