"""Runs code nobody trusts: a process of its own that can compute and say what it computed.

The kernel lets it use memory up to a limit and look at the clock; anything else, be it a socket, a
process, a thread or a file, reaches the watching process as a notice, and the program is killed.
Linux only, no rights needed: seccomp with a listener, resource limits, a wall clock. Where the
kernel cannot do that, nothing is run.
"""

import contextlib
import fcntl
import hashlib
import json
import marshal
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from molora_acar.sandbox_child import OUT_OF_MEMORY
from molora_acar.sandbox_filter import Machine, build_filter, describe_call, find_machine
from molora_fed.errors import ConfigError
from molora_fed.storage.untrusted import writable

__all__ = ["MODULES", "Limits", "Report", "check_sandbox", "run_function"]

_MODULES = (
    "array bisect cmath collections collections.abc copy ctypes dataclasses datetime decimal enum "
    "fractions functools heapq io itertools json math numbers operator os random re shutil signal "
    "socket statistics string subprocess sys tempfile textwrap threading time typing unicodedata"
)
MODULES = tuple(_MODULES.split())
"""Modules an answer may import; what they would do outside the process stops it."""

_ALWAYS = ("encodings.ascii", "encodings.latin_1")
_IMPLIED = {"datetime": "_strptime", "socket": "encodings.idna"}  # imported on first use

_START_SECONDS = 60.0
_NOTICE_BYTES = 80
_RECEIVE_NOTICE = 0xC0502100  # SECCOMP_IOCTL_NOTIF_RECV
_RESULT = 1
_MAX_OUTCOME = 200


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        cpu_seconds: Of the processor, whole.
        wall_seconds: By the clock, from when it begins.
        memory_bytes: Of address space, the interpreter's about 20 MiB included.
        result_bytes: Of all results.
    """

    cpu_seconds: int = 2
    wall_seconds: float = 10.0
    memory_bytes: int = 256 * 2**20
    result_bytes: int = 2**20


@dataclass(frozen=True)
class Report:
    """What became of a program.

    Attributes:
        compiled: Whether it is a program at all.
        outcomes: One a test that was begun: the value's text, or "!" and what went wrong.
        stopped: Why it was killed: "time", "memory", "network", "processes", "files", "output",
            "system call", "crash" or "exit"; None if it answered every test.
        call: The system call it was killed for, if it was.
    """

    compiled: bool
    outcomes: tuple[str, ...]
    stopped: str | None = None
    call: str | None = None


@dataclass
class _Watch:
    """What has been seen of a running program."""

    output: bytearray = field(default_factory=bytearray)
    stopped: str | None = None
    call: str | None = None


def run_function(
    source: str, function: str, tests: Sequence[Sequence[Any]], limits: Limits | None = None
) -> Report:
    """Define a function in a locked-down process and call it once a test.

    Args:
        source: Python that defines it.
        function: Its name.
        tests: Arguments of each call: plain values.
        limits: What it may use; the defaults if None.

    Raises:
        ConfigError: If this machine cannot lock a program down: it is not run then.
    """
    check_sandbox()
    return _run(source, function, tests, limits or Limits())


@cache
def check_sandbox() -> None:
    """Make sure, once a process, that this machine stops what must be stopped.

    Raises:
        ConfigError: If it does not.
    """
    trials = (
        ("2", None, "def f():\n    return 1 + 1"),
        ("", "network", "import socket\ndef f():\n    socket.socket()"),
        ("", "processes", "import os\ndef f():\n    os.fork()"),
        ("", "files", "def f():\n    open('/dev/null', 'w')"),
    )
    for expected, stopped, source in trials:
        report = _run(source, "f", [[]], Limits())
        if (report.outcomes, report.stopped) != ((expected,) if expected else (), stopped):
            raise ConfigError(
                f"Cannot run code answers here: expected a trial to be stopped for {stopped}, got "
                f"{report}. Leave tasks with the extractor 'code-tests' out on this machine."
            )


def _run(source: str, function: str, tests: Sequence[Sequence[Any]], limits: Limits) -> Report:
    machine = find_machine()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        job = {
            "source": source,
            "function": function,
            "tests": [list(one) for one in tests],
            "modules": _list_modules(source),
            "limits": {"cpu_seconds": limits.cpu_seconds, "memory_bytes": limits.memory_bytes},
            "filter": build_filter(machine, result=_RESULT, control=theirs.fileno()),
            "seccomp": machine.calls["seccomp"],
        }
        with _started(theirs, marshal.dumps(job)) as process:
            theirs.close()
            listener = _receive_listener(ours)
            try:
                watch = _watch(process, listener, machine, limits)
            finally:
                os.close(listener)
    return _build_report(watch, len(tests), process.returncode)


def _list_modules(source: str) -> list[str]:
    """What to import before the process is locked: what the program names, nothing else."""
    named = [name for name in MODULES if name in source]
    return [*_ALWAYS, *named, *(_IMPLIED[name] for name in named if name in _IMPLIED)]


@contextlib.contextmanager
def _started(control: socket.socket, job: bytes) -> Iterator[subprocess.Popen[bytes]]:
    """The process with its job; it has ended when this ends."""
    child = Path(__file__).with_name("sandbox_child.py")
    # No isolated mode: it would take no hash seed, and sets would have another order every time.
    flags = ["-P", "-s", "-S", "-B", "-Wignore"]
    with subprocess.Popen(
        [sys.executable, *flags, str(child), str(control.fileno()), str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env={"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"},
        pass_fds=[control.fileno()],
        start_new_session=True,
    ) as process:
        try:
            if process.stdin is not None:
                with contextlib.suppress(BrokenPipeError), process.stdin:
                    process.stdin.write(job)
            yield process
        finally:
            process.kill()  # it can have started no other process


def _receive_listener(control: socket.socket) -> int:
    """The descriptor at which the kernel tells what the program asked for.

    Raises:
        ConfigError: If the process could not lock itself.
    """
    control.settimeout(_START_SECONDS)
    try:
        said, found, *_ = socket.recv_fds(control, 4096, 1, socket.MSG_CMSG_CLOEXEC)
    except TimeoutError:
        said, found = b"nothing for a minute", []
    if len(found) != 1:
        reason = said.decode(errors="replace") or "its process ended"
        raise ConfigError(
            "Cannot run code answers here: expected a kernel that locks a program down (seccomp "
            f"with a listener), got '{reason}'. Leave tasks with the extractor 'code-tests' out."
        )
    return found[0]


def _watch(
    process: subprocess.Popen[bytes], listener: int, machine: Machine, limits: Limits
) -> _Watch:
    """Wait for the end of a program, or for what it is killed for."""
    watch = _Watch()
    deadline = time.monotonic() + limits.wall_seconds
    output = process.stdout.fileno() if process.stdout is not None else -1
    ended = os.pidfd_open(process.pid)
    poll = select.poll()
    for descriptor in (output, listener, ended):
        poll.register(descriptor, select.POLLIN)
    try:
        while watch.stopped is None:
            left = deadline - time.monotonic()
            ready = dict(poll.poll(max(0.0, left) * 1000))
            if left <= 0:
                watch.stopped = "time"
            elif ready.get(listener, 0) & select.POLLIN:
                watch.stopped, watch.call = describe_call(machine, _read_notice(listener))
            elif listener in ready:
                poll.unregister(listener)
            elif output in ready:
                if not _read_output(output, watch, limits):
                    poll.unregister(output)
            elif ended in ready:
                break
        process.kill()
        process.wait()
        while watch.stopped != "output" and _read_output(output, watch, limits):
            pass
    finally:
        os.close(ended)
    return watch


def _read_notice(listener: int) -> int:
    """Number of the system call that the program waits in; -1 if it is gone."""
    notice = bytearray(_NOTICE_BYTES)
    try:
        fcntl.ioctl(listener, _RECEIVE_NOTICE, notice, True)
    except OSError:
        return -1
    return int(struct.unpack_from("=i", notice, 16)[0])


def _read_output(output: int, watch: _Watch, limits: Limits) -> bool:
    """Read what there is; whether there may be more."""
    piece = os.read(output, 65_536)
    watch.output += piece
    if len(watch.output) > limits.result_bytes:
        watch.stopped, watch.call = "output", None
        return False
    return bool(piece)


def _build_report(watch: _Watch, num_tests: int, status: int) -> Report:
    first, *lines = bytes(watch.output[: watch.output.rfind(b"\n") + 1]).split(b"\n")
    outcomes = tuple(_read_outcome(line) for line in lines[:-1][:num_tests])
    stopped = watch.stopped
    if outcomes and outcomes[-1] == OUT_OF_MEMORY:
        stopped, outcomes = "memory", outcomes[:-1]
    elif stopped is None and status == -signal.SIGXCPU:
        stopped = "time"
    elif stopped is None and first == b"false":
        return Report(False, ())
    elif stopped is None and len(outcomes) < num_tests:
        stopped = "crash" if status < 0 else "exit"
    return Report(True, outcomes, stopped, watch.call)


def _read_outcome(line: bytes) -> str:
    """An outcome, shortened to its hash where it is long; the program can write anything here."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, str):
        return "!garbled"
    if len(value) <= _MAX_OUTCOME:
        return writable(value)
    return "sha256:" + hashlib.sha256(value.encode(errors="surrogatepass")).hexdigest()
