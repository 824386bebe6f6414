"""Supervision of processes: start, watch, and end whole trees with nothing left behind.

Logs go to files, never to pipes: Flower's children inherit them and outlive their parents for
seconds. A tree's processes are recorded while it lives, because Flower starts some detached.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

import psutil

from molora_fed import errors
from molora_fed.errors import FederationError, MoloraError
from molora_fed.federation.logs import log, shorten_log
from molora_fed.federation.mailbox import read_json
from molora_fed.storage.files import write_bytes, write_json
from molora_fed.storage.untrusted import clean

__all__ = [
    "ProcessGroup",
    "Restarts",
    "build_flower_environment",
    "is_running",
    "parse_answer",
    "raise_recorded",
    "record_errors",
    "sigterm_as_interrupt",
]

GRACE_SECONDS = 4.0
PARENT_SECONDS = 3.0
MAX_RESTARTS = 5
RESTARTS_FORGOTTEN_SECONDS = 300.0
OBSERVE_SECONDS = 1.0
_PROBE_BYTES = 4_096
MAX_ERROR = 8_000
"""Characters of an error that a worker leaves."""

# Ends the program with its supervisor however that one dies; a supervisor that is killed cannot
# stop anything itself. Linux only; elsewhere the next start does it (`end_leftovers`).
_LAUNCH = (
    "import ctypes,os,signal,sys;"
    "ctypes.CDLL(None).prctl(1,signal.SIGTERM);"
    "os.getppid()==int(sys.argv[1]) or sys.exit(1);"
    "os.execvp(sys.argv[2],sys.argv[2:])"
)


def build_flower_environment(home: Path, **extra: str) -> dict[str, str]:
    """Environment of processes that use Flower: private home, no outbound calls.

    Args:
        home: Home folder of the coordinator or contributor; Flower's own files go below it.
        extra: Further variables.
    """
    return {
        **os.environ,
        "FLWR_HOME": str(home / "flower"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        **extra,
    }


def is_running(pid: int) -> bool:
    """Whether a process of that number runs."""
    try:
        return _is_alive(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return False


@dataclass
class Restarts:
    """Counts failures that follow each other closely.

    Attributes:
        count: Failures so far.
        last: When the last was, monotonic seconds.
    """

    count: int = 0
    last: float = 0.0

    def note(self, what: str, log: Path) -> None:
        """Note one.

        Raises:
            FederationError: If there were too many.
        """
        now = time.monotonic()
        if now - self.last > RESTARTS_FORGOTTEN_SECONDS:
            self.count = 0
        self.count, self.last = self.count + 1, now
        if self.count > MAX_RESTARTS:
            raise FederationError(
                f"Cannot keep {what} running: expected it to stay up, got {self.count} failures "
                f"in a row. See {log}."
            )


class ProcessGroup:
    """Named processes with all of their descendants.

    Args:
        logs: Folder of their logs, `<name>.log` each.
        record: File in which running processes are noted, so that the next start can end what a
            killed supervisor left.
    """

    def __init__(self, logs: Path, record: Path) -> None:
        self._logs = logs
        self._record = record
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._family: dict[str, dict[int, psutil.Process]] = {}
        self._spent: dict[str, dict[psutil.Process, float]] = {}
        self._observed = 0.0

    def start(self, name: str, command: Sequence[str], env: Mapping[str, str]) -> None:
        """Start a process under a name; an ended one of that name is forgotten."""
        self._logs.mkdir(parents=True, exist_ok=True)
        if sys.platform == "linux":
            launch = [sys.executable, "-S", "-E", "-c", _LAUNCH, str(os.getpid())]
            command = [*launch, *command]
        with (self._logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        self._running[name] = process
        self._family.setdefault(name, {})
        self.observe()

    def exit_code(self, name: str) -> int | None:
        """How a process ended (negative: the signal), or None while it runs."""
        return self._running[name].poll()

    def pid(self, name: str) -> int:
        """Process id of a started process."""
        return self._running[name].pid

    def log(self, name: str) -> Path:
        """Log file of a process."""
        return self._logs / f"{name}.log"

    def descendants(self, name: str) -> list[psutil.Process]:
        """The living descendants of a process, its own included."""
        return [process for process in self._family.get(name, {}).values() if _is_alive(process)]

    def has_descendant(self, name: str, word: str) -> bool:
        """Whether a living descendant of a process has a word in its command line."""
        for process in self.descendants(name):
            with contextlib.suppress(psutil.Error):  # it may end between two calls
                if any(word in argument for argument in process.cmdline()):
                    return True
        return False

    def measure_seconds(self, name: str) -> float:
        """Processor seconds of a process and all its descendants, also those that ended.

        Of an ended one, what it had spent when this was last called.
        """
        spent = self._spent.setdefault(name, {})
        for process in self.descendants(name):
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                spent[process] = times.user + times.system
        return sum(spent.values())

    def poll(self) -> None:
        """`observe`, if the last time is a second ago: it walks over all of the machine's."""
        if time.monotonic() - self._observed >= OBSERVE_SECONDS:
            self.observe()
            for name in self._running:
                with contextlib.suppress(OSError):
                    shorten_log(self.log(name))

    def observe(self) -> None:
        """Note the descendants of all processes while their parents can still be asked."""
        self._observed = time.monotonic()
        changed = False
        for name, process in self._running.items():
            family = self._family[name]
            with contextlib.suppress(psutil.NoSuchProcess):
                parent = psutil.Process(process.pid)
                for member in (parent, *parent.children(recursive=True)):
                    if family.get(member.pid) != member:
                        family[member.pid] = member
                        changed = True
        if changed:
            members = [m for family in self._family.values() for m in family.values()]
            with contextlib.suppress(errors.StorageError):
                write_json(self._record, [_describe(m) for m in members if _is_alive(m)])

    def end_leftovers(self, *, grace_seconds: float = GRACE_SECONDS) -> None:
        """End what an earlier supervisor of this record left running when it was killed."""
        left = []
        for entry in read_json(self._record) or []:
            with contextlib.suppress(psutil.NoSuchProcess, KeyError, TypeError):
                process = psutil.Process(entry["pid"])
                if process.create_time() == entry["created"]:
                    left.append(process)
        _end(left, grace_seconds)
        self._record.unlink(missing_ok=True)

    def stop(self, *names: str, grace_seconds: float = GRACE_SECONDS) -> None:
        """End processes and all of their descendants: SIGTERM, wait, SIGTERM, then SIGKILL."""
        self.observe()
        started = [self._running[name] for name in names if name in self._running]
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        members = [m for name in names for m in self._family.get(name, {}).values()]
        # Parents first and by themselves: a node says goodbye to its server in this time.
        psutil.wait_procs(
            [m for m in members if _is_alive(m) and any(m.pid == p.pid for p in started)],
            timeout=min(PARENT_SECONDS, grace_seconds),
        )
        _end(members, grace_seconds)
        for process in started:
            process.wait()
        for name in names:
            self._running.pop(name, None)
            self._family.pop(name, None)

    def stop_all(self) -> None:
        """End everything, in the order of starting."""
        self.stop(*list(self._running))
        self._record.unlink(missing_ok=True)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _describe(process: psutil.Process) -> dict[str, Any]:
    try:
        return {"pid": process.pid, "created": process.create_time()}
    except psutil.NoSuchProcess:
        return {"pid": process.pid, "created": 0.0}


def _end(processes: Iterable[psutil.Process], grace_seconds: float) -> None:
    """SIGTERM, wait, SIGKILL."""
    alive = [process for process in processes if _is_alive(process)]
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(alive, timeout=grace_seconds)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=grace_seconds)


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """In the main thread, let SIGTERM end the block like Ctrl-C, so that it cleans up.

    A program that handles SIGTERM itself, as the command line does, is left alone.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def record_errors(path: Path) -> Iterator[None]:
    """In a worker: leave an error for people in a file, then end with its exit code.

    Raises:
        SystemExit: With the error's exit code.
    """
    path.unlink(missing_ok=True)
    try:
        yield
    except MoloraError as error:
        message = clean(error, MAX_ERROR)  # it may quote what came from outside
        log("ended by an error", "error", type=type(error).__name__, reason=message)
        record = {"type": type(error).__name__, "message": message, "code": error.exit_code}
        with contextlib.suppress(errors.StorageError):
            write_json(path, record)
        raise SystemExit(error.exit_code) from error


def raise_recorded(path: Path, *, otherwise: str, code: int = 1) -> None:
    """In a supervisor: raise the error that a worker left.

    Args:
        path: File written by `record_errors`.
        otherwise: Message if the worker left none.
        code: The worker's exit status.

    Raises:
        MoloraError: Of the type that the worker met; a StorageError if nothing can be written.
    """
    record = read_json(path)
    if record is None and code == errors.StorageError.exit_code:
        raise errors.StorageError(
            f"Cannot write in '{path.parent}': expected a writable disk, got one that took not "
            "even the reason. Free some space and run the same command again."
        )
    if record is None:
        write_bytes(path, b" " * _PROBE_BYTES)  # where no reason can be left, this is it
        path.unlink()
        raise FederationError(otherwise)
    kind = getattr(errors, str(record["type"]), MoloraError)
    if not (isinstance(kind, type) and issubclass(kind, MoloraError)):
        kind = MoloraError
    if isinstance(kind.__init__, FunctionType):
        kind = MoloraError  # takes other arguments than a message
    error = kind(record["message"])
    error.exit_code = int(record["code"])
    raise error


def parse_answer(text: str) -> dict[str, Any]:
    """The JSON object in the output of `flwr ... --format json`; empty if there is none."""
    start, end = text.find("{"), text.rfind("}")
    try:
        value = json.loads(text[start : end + 1])
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
