"""What a worker reports of itself while it works: a small file, written at most twice a second."""

import math
import time
from pathlib import Path
from typing import Any

from molora_fed.storage.files import write_json

__all__ = ["StateFile"]

_INTERVAL_SECONDS = 0.5


class StateFile:
    """The state that supervisors and apps read; `progress` fits every long function.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._state: dict[str, Any] = {}
        self._written = 0.0

    def enter(self, phase: str, message: str = "") -> None:
        """Begin a phase; figures of the one before are dropped.

        Raises:
            StorageError: If the disk refuses.
        """
        self._state = {"phase": phase, "message": message}
        self._write()

    def progress(self, done: int, total: int, **fields: float | str) -> None:
        """Report progress within the phase; see `molora_fed.types.Progress`.

        Raises:
            StorageError: If the disk refuses.
        """
        self._state |= {"step": done, "total": total}
        for name in ("loss", "eta_seconds"):
            value = fields.get(name)
            if isinstance(value, int | float) and math.isfinite(value):
                self._state[name] = float(value)
        if done >= total or time.monotonic() - self._written >= _INTERVAL_SECONDS:
            self._write()

    def _write(self) -> None:
        write_json(self._path, self._state)
        self._written = time.monotonic()
