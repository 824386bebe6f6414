"""What a worker's process costs: seconds of processor time by stage, and its largest memory.

Kept in a file beside the worker's state, summed over restarts; what a killed process did since it
last wrote is lost.
"""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from molora_fed.federation.mailbox import read_json
from molora_fed.storage.files import write_json

__all__ = ["UsageFile", "measure_peak_bytes"]

_WORTH_WRITING_SECONDS = 0.05


def measure_peak_bytes() -> int:
    """Largest resident memory of this process so far, bytes."""
    try:
        # A program's own peak; `getrusage` also counts what its parent held before it started.
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class UsageFile:
    """Sums up a worker's stages.

    Args:
        path: The file; what it holds already is added to.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        kept = read_json(path) or {}
        self._seconds: dict[str, float] = dict(kept.get("seconds", {}))
        self._peak = int(kept.get("peak_bytes", 0))
        self._unwritten = 0.0
        self._inside = 0.0

    def add(self, name: str, seconds: float) -> None:
        """Add processor time to a stage; small sums are written with the next ones.

        Raises:
            StorageError: If the disk refuses.
        """
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        self._peak = max(self._peak, measure_peak_bytes())
        self._unwritten += seconds
        if self._unwritten >= _WORTH_WRITING_SECONDS:
            write_json(self._path, {"seconds": self._seconds, "peak_bytes": self._peak})
            self._unwritten = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the processor time of a block, all threads together, to a stage.

        Stages inside the block have their own share, which does not count twice.

        Raises:
            StorageError: If the disk refuses.
        """
        outside, self._inside = self._inside, 0.0
        start = time.process_time()
        try:
            yield
        finally:
            spent, inside = time.process_time() - start, self._inside
            self._inside = outside + spent
        self.add(name, spent - inside)
