"""The right to write a ledger: a lock on `<ledger>.lock` that one process holds at a time.

The kernel drops the lock when the process ends, however it ends; nothing is ever stale.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from molora_fed.errors import LedgerError, StorageError, TrainingError

__all__ = [
    "lock_folder",
    "take_lock",
]


def take_lock(path: Path) -> FileIO:
    """Take the right to write, until the file that is returned is closed.

    Raises:
        LedgerError: If another process, or another `Ledger` of this one, has it.
        StorageError: On I/O errors.
    """
    lock_path = path.with_name(f"{path.name}.lock")
    try:
        descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except FileNotFoundError as error:
        raise LedgerError(
            f"Cannot open ledger '{path}': expected a folder '{path.parent}', got none. "
            "Make a cooperative with `molora coop create NAME`."
        ) from error
    except OSError as error:
        raise StorageError(
            f"Cannot open ledger '{path}': expected a writable folder, got {error.strerror}. "
            "Check the folder and its permissions."
        ) from error
    lock = FileIO(descriptor, "r+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = lock.read(32).decode("ascii", "replace").strip() or "unknown"
        lock.close()
        raise LedgerError(
            f"Cannot write ledger '{path}': expected to be its only writer, got process {holder} "
            "writing it already. Stop that `molora` process, or wait for it."
        ) from error
    # The process number is only for the message above: the lock itself is the kernel's.
    try:
        lock.truncate(0)
        lock.write(str(os.getpid()).encode())
    except OSError as error:
        lock.close()
        raise StorageError(
            f"Cannot open ledger '{path}': expected a writable disk, got {error.strerror}. "
            "Free some space and run the same command again."
        ) from error
    return lock


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold a folder for one process; the lock ends with the process, however it ends.

    Raises:
        TrainingError: If another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TrainingError(
                f"Cannot train in '{folder}': expected no other process there, got one at work. "
                "Wait for it, or choose another folder."
            ) from error
        for left_over in folder.glob(".*.tmp"):
            if left_over.is_file():  # a killed process could not remove these
                left_over.unlink()
        yield
    finally:
        os.close(descriptor)
