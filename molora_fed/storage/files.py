"""Files that are whole or not there: temporary name, fsync, rename; and the hashes over them."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
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
    "make_private",
    "replace_folder",
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


def make_private(folder: Path) -> None:
    """Make a folder, and let nobody but its owner into it.

    Raises:
        StorageError: On I/O errors.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)


@contextmanager
def stream_bytes(path: Path, *, mode: int = 0o644) -> Iterator[BinaryIO]:
    """Write a file piece by piece; it appears, whole and on disk, only if the block succeeds.

    Args:
        path: Target; its folder is made.
        mode: Permission bits.

    Yields:
        A binary file to write into.

    Raises:
        StorageError: On I/O errors; nothing is left behind.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
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
        mode: Permission bits.

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
        mode: Permission bits.

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
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        temporary.mkdir()
        try:
            yield temporary
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
