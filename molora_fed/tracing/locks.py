"""Who may write a run: its writers together, or the one who seals it.

The kernel drops a lock when its process ends, however it ends; nothing is ever stale.
"""

import fcntl
import os
from io import FileIO
from pathlib import Path

from molora_fed.errors import TraceError
from molora_fed.storage.files import storage_errors
from molora_fed.storage.locks import LOCK_MODE

__all__ = ["lock_run", "lock_writer"]


def lock_run(folder: Path, *, shared: bool) -> FileIO:
    """Take part in writing a run, or take it for oneself, until the result is closed.

    Raises:
        TraceError: If that cannot be, because of who has it.
        StorageError: On I/O errors.
    """
    operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    who = "is being sealed" if shared else "still has open writers"
    return _lock(folder / ".run.lock", operation, f"'{folder}'", who)


def lock_writer(folder: Path, writer: str) -> FileIO:
    """Take a writer's name in a run, until the result is closed.

    Raises:
        TraceError: If another process has it.
        StorageError: On I/O errors.
    """
    path = folder / f".{writer}.writer.lock"
    return _lock(path, fcntl.LOCK_EX, f"'{folder}' as '{writer}'", "has a writer of this name")


def _lock(path: Path, operation: int, what: str, who: str) -> FileIO:
    with storage_errors(path):
        lock = FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, LOCK_MODE), "r+")
    try:
        fcntl.flock(lock, operation | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise TraceError(
            f"Cannot write trace {what}: expected it to be free, got a run that {who}. "
            "Wait for that process, or stop it."
        ) from error
    return lock
