"""Content-addressed files: a blob's name is the SHA-256 of its bytes, so it can never change.

One process writes at a time (the holder of the ledger); any number read.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from molora_fed.errors import AdapterError, StorageError
from molora_fed.storage.files import (
    canonical_json,
    hash_bytes,
    make_folder,
    replace_folder,
    storage_errors,
    write_bytes,
    write_pieces,
)

__all__ = ["BlobStore"]

PIECE_BYTES = 2**20
_SHA = re.compile(r"[0-9a-f]{64}")
_LEFTOVER = re.compile(r"\..*\.(tmp|old)")


class BlobStore:
    """Files and folders of files by their hash.

    Attributes:
        root: Folder of the store; `<sha>` are files, `folders/<sha>` are folders of files.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, sha: str) -> Path:
        """Where the blob of a hash is, or would be.

        Raises:
            AdapterError: If `sha` is not a SHA-256 in lower-case hex.
        """
        if not _SHA.fullmatch(sha):
            raise AdapterError(
                f"Cannot look up blob '{sha[:80]}': expected 64 lower-case hex digits, "
                f"got {len(sha)} characters. Use the hash that the manifest states."
            )
        return self.root / sha

    def has(self, sha: str) -> bool:
        """Whether the blob is there; what is there is whole."""
        return self.path(sha).is_file()

    def put_bytes(self, data: bytes) -> str:
        """Store bytes.

        Returns:
            Their SHA-256, lower-case hex.

        Raises:
            StorageError: On I/O errors; nothing is left behind.
        """
        sha = hash_bytes(data)
        if not self.has(sha):
            write_bytes(self.path(sha), data, mode=0o444)
        return sha

    def put_file(self, path: Path, *, expected: str, max_bytes: int, what: str) -> None:
        """Store a copy of a file if it is the one expected.

        Hashing and copying happen in one reading, so a file that changes meanwhile is refused.

        Args:
            path: File to copy.
            expected: SHA-256 it must have, lower-case hex.
            max_bytes: Reading stops and the file is refused above this size.
            what: Name of the file in errors.

        Raises:
            AdapterError: If it has another hash or is larger; nothing is left behind.
            StorageError: On I/O errors; nothing is left behind.
        """
        target = self.path(expected)
        if not target.is_file():
            pieces = _read_checked(path, expected=expected, max_bytes=max_bytes, what=what)
            write_pieces(target, pieces, mode=0o444)

    def folder(self, files: Mapping[str, str]) -> Path:
        """Where `put_folder` lays these files out, or would."""
        return self.root / "folders" / hash_bytes(canonical_json(dict(files)))

    def put_folder(self, files: Mapping[str, str]) -> Path:
        """Lay stored blobs out as a folder, under their names.

        Args:
            files: Hash of each file by its path inside the folder, '/'-separated. The caller
                chooses the paths; never pass one that came from outside.

        Returns:
            The folder, complete and on disk; the same for the same files.

        Raises:
            StorageError: If a blob is missing, or on I/O errors; no folder is left behind.
        """
        folder = self.folder(files)
        if folder.is_dir():
            return folder
        with replace_folder(folder) as temporary:
            for name, sha in sorted(files.items()):
                target = temporary / name
                make_folder(target.parent)
                try:
                    os.link(self.path(sha), target)
                except FileNotFoundError as error:
                    raise StorageError(
                        f"Cannot lay out '{name}': expected blob {sha[:16]} in '{self.root}', "
                        "got nothing there. Restore the folder from a backup."
                    ) from error
                except OSError:  # A file system without hard links.
                    shutil.copyfile(self.path(sha), target)
        return folder

    def discard(self, files: Mapping[str, str], *, keep: Collection[str] = ()) -> int:
        """Delete files that were laid out as a folder, and the folder; done again, it goes on.

        Args:
            files: As given to `put_folder`.
            keep: Hashes of blobs that something else still needs.

        Returns:
            Bytes of the blobs that are gone now.

        Raises:
            StorageError: On I/O errors.
        """
        freed = 0
        with storage_errors(self.root):
            # The folder first: its links would keep the bytes of deleted blobs.
            if self.folder(files).is_dir():
                shutil.rmtree(self.folder(files))
            for path in [self.path(sha) for sha in sorted(set(files.values()) - set(keep))]:
                if path.is_file():
                    freed += path.stat().st_size
                    path.unlink()
        return freed

    def remove_leftovers(self) -> None:
        """Delete what a killed writer left half-written; call it only as the one writer."""
        for folder in (self.root, self.root / "folders"):
            for path in folder.iterdir() if folder.is_dir() else ():
                if _LEFTOVER.fullmatch(path.name):
                    if path.is_dir():
                        shutil.rmtree(path)
                    else:
                        path.unlink()


def _read_checked(path: Path, *, expected: str, max_bytes: int, what: str) -> Iterator[bytes]:
    """Yield a file's bytes; raise at the end unless they hash to `expected`."""
    digest = hashlib.sha256()
    total = 0
    try:
        # No link is followed: a link could make the coordinator store one of its own files.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise AdapterError(
            f"Cannot read {what}: expected a readable plain file, got {error.strerror}. "
            "Send the file again."
        ) from error
    with os.fdopen(descriptor, "rb") as file:
        while piece := file.read(PIECE_BYTES):
            total += len(piece)
            if total > max_bytes:
                raise AdapterError(
                    f"Cannot store {what}: expected at most {max_bytes} bytes, got more. "
                    "Send the file that was signed."
                )
            digest.update(piece)
            yield piece
    if digest.hexdigest() != expected:
        raise AdapterError(
            f"Cannot store {what}: expected SHA-256 {expected[:16]}…, "
            f"got {digest.hexdigest()[:16]}…. Send the file that was signed."
        )
