"""What workers and supervisors report: events, a worker's state, and what its process costs.

State and cost are small files beside the worker; what a killed process did since it last wrote is
lost. Imports neither torch nor flwr.
"""

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError

from molora_fed.federation.mailbox import read_json
from molora_fed.storage.files import write_json
from molora_fed.storage.settings import UntrustedModel
from molora_fed.storage.untrusted import clean

__all__ = [
    "Count",
    "FederationEvent",
    "OnEvent",
    "StateFile",
    "UsageFile",
    "WorkerState",
    "measure_peak_bytes",
    "read_worker_state",
]

_STATE_INTERVAL_SECONDS = 0.5
_WORTH_WRITING_SECONDS = 0.05


@dataclass(frozen=True)
class FederationEvent:
    """One thing that changed.

    Attributes:
        phase: Phase of the cooperative (RECRUITING, TRAINING, FUSING, PUBLISHED), or of the
            contributor's worker (JOINING, CORPUS, TRAINING, SUBMITTING, SUBMITTED, ADMITTED,
            EVOLVING, QUARANTINED, REJECTED, DONE) if `contributor` is given; STARTING before,
            STOPPED after.
        contributor: Name of the contributor it is about; empty for the server.
        state: State of the contribution in the ledger (RECEIVED to WITHDRAWN), empty before.
        step: Steps done of the current work; None if it has no steps.
        total: Steps in all; None likewise.
        loss: Last reported loss, nats per token.
        eta_seconds: Estimated seconds left of the current work.
        message: One line for people; empty if the fields say it all.
        problem: True if the message is bad news that is being retried.
        seen_by: Who reports it: the server (of a contributor, what its last message said), or
            the contributor itself.
    """

    phase: str
    contributor: str = ""
    state: str = ""
    step: int | None = None
    total: int | None = None
    loss: float | None = None
    eta_seconds: float | None = None
    message: str = ""
    problem: bool = False
    seen_by: Literal["server", "contributor"] = "server"


OnEvent = Callable[[FederationEvent], None]

MAX_MESSAGE = 300
"""Characters of a state's message."""
Message = Annotated[str, AfterValidator(lambda text: clean(text, MAX_MESSAGE))]
Count = Annotated[int, Field(ge=0, le=2**53)]
Loss = Annotated[float, Field(ge=-1e6, le=1e6)]
Seconds = Annotated[float, Field(ge=0.0, le=1e9)]
Phase = Literal[
    "STARTING", "CREATED", "RECRUITING", "TRAINING", "FUSING", "PUBLISHED", "GROWING",
    "JOINING", "CORPUS", "SUBMITTING", "SUBMITTED", "ADMITTED", "EVOLVING",
    "RECEIVED", "VERIFIED", "QUARANTINED", "REJECTED", "WITHDRAWN", "DONE",
]  # fmt: skip


class WorkerState(UntrustedModel):
    """Where a worker stands."""

    phase: Phase = "JOINING"
    message: Message = ""
    step: Count | None = None
    total: Count | None = None
    loss: Loss | None = None
    eta_seconds: Seconds | None = None

    @property
    def known(self) -> dict[str, Any]:
        """What was said, and with it the phase; nothing if nothing was."""
        names = self.model_fields_set & set(WorkerState.model_fields)
        found = {name: getattr(self, name) for name in sorted(names)}
        known = {name: value for name, value in found.items() if value is not None}
        return {"phase": self.phase, **known} if known else {}


def read_worker_state(value: Any) -> WorkerState:
    """What can be used of a worker's own state; the rest is left out: a state never fails.

    Args:
        value: Content of its file.
    """
    kept: dict[str, Any] = {}
    for name in WorkerState.model_fields:
        if isinstance(value, dict) and value.get(name) is not None:
            with suppress(ValidationError):
                kept[name] = getattr(WorkerState.model_validate({name: value[name]}), name)
    return WorkerState(**kept)


class StateFile:
    """A worker's state, written at most twice a second; `progress` fits every long function.

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
            StorageError: On I/O errors.
        """
        self._state = {"phase": phase, "message": message}
        self._write()

    def progress(self, done: int, total: int, **fields: float | str) -> None:
        """Report progress within the phase; see `molora_fed.types.Progress`.

        Raises:
            StorageError: On I/O errors.
        """
        self._state |= {"step": done, "total": total}
        for name in ("loss", "eta_seconds"):
            value = fields.get(name)
            if isinstance(value, int | float) and math.isfinite(value):
                self._state[name] = float(value)
        if done >= total or time.monotonic() - self._written >= _STATE_INTERVAL_SECONDS:
            self._write()

    def _write(self) -> None:
        write_json(self._path, self._state)
        self._written = time.monotonic()


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
    """Seconds of processor time by stage and the largest memory of a worker, over restarts.

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
            StorageError: On I/O errors.
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
            StorageError: On I/O errors.
        """
        outside, self._inside = self._inside, 0.0
        start = time.process_time()
        try:
            yield
        finally:
            spent, inside = time.process_time() - start, self._inside
            self._inside = outside + spent
        self.add(name, spent - inside)
