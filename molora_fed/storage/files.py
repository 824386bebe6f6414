"""Files that are whole or not there: temporary name, fsync, rename; and the hashes over them.

Who may read them is decided here and nowhere else. A home, the folder of one user's work, is closed
to others (`make_home`, mode 0700), and what is written in a closed folder is closed, too: files
0600, folders 0700. Everywhere else the user's umask counts: exported models, and reports in a
folder that the user names, are meant for others.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from molora_fed.errors import StorageError

__all__ = [
    "canonical_json",
    "hash_bytes",
    "hash_file",
    "is_file",
    "is_folder",
    "make_folder",
    "make_home",
    "replace_folder",
    "resolve_inside",
    "storage_errors",
    "stream_bytes",
    "sync_folder",
    "write_bytes",
    "write_json",
    "write_pieces",
]


def canonical_json(value: Any) -> bytes:
    """The one byte form of a JSON value that is hashed and signed: sorted keys, no spaces, UTF-8.

    Raises:
        ValueError: If the value holds NaN or infinity, which JSON cannot carry.
    """
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def hash_bytes(data: bytes) -> str:
    """SHA-256 of bytes, lower-case hex."""
    return hashlib.sha256(data).hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, lower-case hex, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_file(path: Path) -> bool:
    """Whether a path leads to a regular file.

    A link of others may lead to a name that is longer than any: over that, `Path.is_file` and its
    like raise OSError.
    """
    return os.path.isfile(path)


def is_folder(path: Path) -> bool:
    """Whether a path leads to a folder; never raises, see `is_file`."""
    return os.path.isdir(path)


def resolve_inside(path: Path, folder: Path) -> Path | None:
    """Where a path in a folder of others leads; None if a link takes it out of that folder.

    A snapshot in a cache of the Hugging Face Hub consists of links into the `blobs` beside it:
    these count as inside.

    Args:
        path: Below `folder`; need not exist.
        folder: What it has to stay in; may itself be reached by links.
    """
    root = folder.resolve()
    try:
        target = path.resolve()
    except (OSError, RuntimeError):  # links in a circle
        return None
    roots = [root]
    if root.parent.name == "snapshots":
        blobs = root.parent.parent / "blobs"
        roots += [blobs] if blobs.resolve() == blobs else []
    return target if any(target.is_relative_to(one) for one in roots) else None


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of writing into the one-line error users see."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        fix = (
            "Free some space and run the same command again."
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            else "Check the folder and its permissions, then run the same command again."
        )
        raise StorageError(
            f"Cannot write '{path}': expected a writable disk, got {error.strerror}. {fix}"
        ) from error


_OTHERS = 0o077


def _is_closed(folder: Path) -> bool:
    return not stat.S_IMODE(folder.stat().st_mode) & _OTHERS


def make_folder(path: Path) -> None:
    """Make a folder and those above it that are missing, closed to others inside a closed one.

    Raises:
        OSError: On I/O errors.
    """
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    mode = 0o700 if missing and _is_closed(path) else 0o777
    for folder in reversed(missing):
        folder.mkdir(mode=mode, exist_ok=True)


def make_home(path: Path) -> None:
    """Make the folder of one user's work, closed to all others; one that is there is closed.

    Raises:
        StorageError: On I/O errors, and if it is somebody else's.
    """
    with storage_errors(path):
        make_folder(path)
        if not _is_closed(path):
            path.chmod(0o700)


def _close_all(folder: Path) -> None:
    """Close what others than `stream_bytes` wrote in a closed folder."""
    for inner, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(inner) / name
            found = path.lstat().st_mode
            if stat.S_IMODE(found) & _OTHERS and not stat.S_ISLNK(found):
                path.chmod(stat.S_IMODE(found) & ~_OTHERS)


@contextmanager
def stream_bytes(path: Path, *, mode: int = 0o644) -> Iterator[BinaryIO]:
    """Write a file piece by piece; it appears, whole and on disk, only if the block succeeds.

    Args:
        path: Target; its folder is made.
        mode: Permission bits; those of others are taken away in a closed folder.

    Yields:
        A binary file to write into.

    Raises:
        StorageError: On I/O errors; nothing is left behind.
    """
    with storage_errors(path):
        make_folder(path.parent)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        mode &= ~_OTHERS if _is_closed(path.parent) else ~0
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
            raise
        sync_folder(path.parent)


def write_bytes(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write a file so that it is whole or not there, and on disk when this returns.

    Args:
        path: Target; its folder is made.
        data: Whole content.
        mode: Permission bits; see `stream_bytes`.

    Raises:
        StorageError: On I/O errors; nothing is left behind.
    """
    with stream_bytes(path, mode=mode) as file:
        file.write(data)


def write_pieces(path: Path, pieces: Iterable[bytes], *, mode: int = 0o644) -> None:
    """Write a file from pieces that need not fit in memory together, like `write_bytes`.

    Args:
        path: Target; its folder is made.
        pieces: Content, in order.
        mode: Permission bits; see `stream_bytes`.

    Raises:
        StorageError: On I/O errors; nothing is left behind.
    """
    with stream_bytes(path, mode=mode) as file:
        for piece in pieces:
            file.write(piece)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value for people (indented, sorted keys), whole or not at all.

    Raises:
        StorageError: On I/O errors.
        ValueError: If the value holds NaN or infinity.
    """
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_bytes(path, (text + "\n").encode())


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Fill a folder under a temporary name; it takes `path`'s place only if the block succeeds.

    Yields:
        The temporary folder to write into.

    Raises:
        StorageError: On I/O errors; what was at `path` before stays.
    """
    with storage_errors(path):
        make_folder(path.parent)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        make_folder(temporary)
        try:
            yield temporary
            if _is_closed(temporary):
                _close_all(temporary)
            for folder, _, names in os.walk(temporary):
                for name in names:
                    descriptor = os.open(Path(folder) / name, os.O_RDONLY)
                    try:
                        os.fsync(descriptor)
                    finally:
                        os.close(descriptor)
                sync_folder(Path(folder))
            if path.exists():
                old = path.with_name(f".{path.name}.{uuid.uuid4().hex}.old")
                path.rename(old)
                temporary.rename(path)
                shutil.rmtree(old)
            else:
                temporary.rename(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_folder(path.parent)
