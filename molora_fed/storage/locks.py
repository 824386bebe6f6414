"""Locks that one process holds at a time.

The kernel drops a lock when its process ends, however it ends; nothing is ever stale. Lock files
stay where they are: to delete one would let two processes lock two files of one name. Only their
owner can open them (mode 0600): whoever can open a file can hold its lock.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from molora_fed.errors import MoloraError, TrainingError
from molora_fed.storage.files import make_folder, storage_errors

__all__ = ["LOCK_MODE", "hold_lock", "is_held", "lock_folder", "read_holder", "try_lock"]

LOCK_MODE = 0o600


def try_lock(path: Path) -> BaseFileLock | None:
    """Take a lock until it is released or the process ends.

    Args:
        path: Lock file, made if absent; its folder exists. It gets the process number, which is
            only for messages: the lock itself is the kernel's.

    Returns:
        The lock, to `release()`; None if it is held, be it by this process.

    Raises:
        StorageError: On I/O errors.
    """
    lock = FileLock(path, timeout=0, mode=LOCK_MODE)
    with storage_errors(path):
        if path.exists() and stat.S_IMODE(path.stat().st_mode) != LOCK_MODE:
            path.chmod(LOCK_MODE)  # of an earlier version
        try:
            lock.acquire()
        except Timeout:
            return None
        try:
            path.write_text(str(os.getpid()), encoding="ascii")
        except OSError:
            lock.release()
            raise
    return lock


def read_holder(path: Path) -> str:
    """Number of the process that holds a lock, for messages; "unknown" if the file has none."""
    try:
        return path.read_bytes()[:32].decode("ascii", "replace").strip() or "unknown"
    except OSError:
        return "unknown"


def is_held(path: Path) -> bool:
    """Whether a process holds a lock; only whoever may open its file can tell."""
    if not path.exists():
        return False
    lock = FileLock(path, timeout=0, mode=LOCK_MODE)
    try:
        lock.acquire()
    except Timeout:
        return True
    except OSError:
        return False
    lock.release()
    return False


@contextmanager
def hold_lock(path: Path, busy: MoloraError) -> Iterator[None]:
    """Hold a lock for the block.

    Args:
        path: Lock file; its folder is made if absent.
        busy: Raised if another process holds it.

    Raises:
        StorageError: On I/O errors.
    """
    with storage_errors(path):
        make_folder(path.parent)
    lock = try_lock(path)
    if lock is None:
        raise busy
    try:
        yield
    finally:
        lock.release()


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold a folder of a training run; what a killed process left half-written is removed.

    Raises:
        TrainingError: If another process holds it.
        StorageError: On I/O errors.
    """
    busy = TrainingError(
        f"Cannot train in '{folder}': expected no other process there, got one at work. "
        "Wait for it, or choose another folder."
    )
    with hold_lock(folder / ".lock", busy):
        for left_over in folder.glob(".*.tmp"):
            if left_over.is_file():
                left_over.unlink()
        yield
