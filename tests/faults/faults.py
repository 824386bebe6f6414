"""The kinds of faults: how they are drawn from a seed, how each is done to a run, and undone.

A fault begins some seconds after a stage of the federation was seen, so that all phases are hit. It
is a context: entered to do it, left to lift it.
"""

import contextlib
import datetime
import importlib.util
import os
import resource
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

__all__ = [
    "KINDS",
    "SAID_AFTER_SECONDS",
    "SAYS",
    "STAGES",
    "Fault",
    "build_clock_environment",
    "draw_faults",
    "find_clock_file",
    "find_faketime",
    "forget_clock",
    "is_plain",
    "write_clock",
    "write_expired",
]

STAGES = (
    "started", "joined", "training", "uploading", "admitted", "fusing", "published", "received",
)  # fmt: skip
"""What is seen of a federation, in the order in which it happens."""
SERVER = "server"
SERVER_ROLES = ("command", "link", "coordinator")
MEMBER_ROLES = ("command", "node", "letters", "worker")
SMALL_BYTES = 1_000
"""Files may not grow beyond this where there is no file system to fill."""
STEPS_SECONDS = (-7_200.0, -600.0, 600.0, 7_200.0, 100 * 86_400.0)
"""By how much a clock is off: beyond what signatures tolerate, and beyond certificates."""
LATEST_SECONDS = 2.0


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        kind: One of `KINDS`.
        side: Whose: `server`, or a member's name.
        role: Which of its processes, for kinds that are done to one; else empty.
        stage: It begins after this stage was seen,
        delay: and so many seconds.
        seconds: How long it lasts.
        amount: Seconds of delay, or by which a clock is off.
    """

    kind: str
    side: str
    role: str
    stage: str
    delay: float
    seconds: float
    amount: float = 0.0

    def describe(self):
        """In a few words."""
        who = ".".join(part for part in (self.side, self.role) if part)
        return f"{self.kind} {who}, {self.delay:.1f} s after '{self.stage}', {self.seconds:.0f} s"


def draw_faults(chance, number, members, *, kinds=None, longest_seconds=90.0, long_share=0.25):
    """Faults of one federation, in the order in which they begin.

    Args:
        chance: A `random.Random`.
        number: How many.
        members: Their names.
        kinds: Kinds to draw from; all of `KINDS` that fit one transport if None.
        longest_seconds: How long a stopped process stays so, for a share of those that are.
        long_share: That share.
    """
    if kinds is None:
        kinds = PLAIN_KINDS if chance.random() < 0.3 else TLS_KINDS
    faults = []
    for _ in range(number):
        kind = chance.choice(kinds)
        side = SERVER if kind == "certificate" else chance.choice((SERVER, *members))
        if kind in ("cut", "silence", "delay", "repeat"):
            side = chance.choice(tuple(members))
        role = ""
        if kind in ("kill", "stop"):
            role = chance.choice(SERVER_ROLES if side == SERVER else MEMBER_ROLES)
        seconds = chance.uniform(1.0, 12.0)
        if kind == "stop" and chance.random() < long_share:
            seconds = longest_seconds
        faults.append(
            Fault(
                kind, side, role, chance.choice(STAGES), chance.uniform(0.0, LATEST_SECONDS),
                0.0 if kind == "kill" else seconds, _draw_amount(chance, kind),
            )
        )  # fmt: skip
    return sorted(faults, key=lambda fault: (STAGES.index(fault.stage), fault.delay))


def _draw_amount(chance, kind):
    if kind == "clock":
        return chance.choice(STEPS_SECONDS)
    return chance.uniform(0.2, 1.0) if kind == "delay" else 0.0


def is_plain(faults):
    """Whether these need a server without TLS: only there can a relay read requests."""
    return any(fault.kind == "repeat" for fault in faults)


def find_faketime():
    """The library that gives a process another clock, or None if it is not installed."""
    found = importlib.util.find_spec("libfaketime")
    if found is None or found.origin is None:
        return None
    return next(Path(found.origin).parent.rglob("libfaketime.so.1"), None)


def _find_victim(run, fault):
    """The process a fault is done to; if it is not there, another of its side, or the server's.

    Returns:
        Side, role and process; the process is None if nothing is there.
    """
    roles = {SERVER: SERVER_ROLES, fault.side: (SERVER_ROLES, MEMBER_ROLES)[fault.side != SERVER]}
    places = [(fault.side, fault.role)]
    places += [(side, role) for side in (fault.side, SERVER) for role in reversed(roles[side])]
    for side, role in places:
        process = run.commands[side].find_process(role)
        if process is not None:
            return side, role, process
    return fault.side, fault.role, None


@contextlib.contextmanager
def _kill(run, fault):
    side, role, process = _find_victim(run, fault)
    if process is not None:
        if role == "command":
            run.commands[side].note_killed()
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    yield f"{side}.{role}" if process is not None else ""


@contextlib.contextmanager
def _stop(run, fault):
    side, role, process = _find_victim(run, fault)
    try:
        if process is not None:
            process.suspend()
        yield f"{side}.{role}" if process is not None else ""
    finally:
        with contextlib.suppress(psutil.NoSuchProcess, AttributeError):
            process.resume()


@contextlib.contextmanager
def _disturb_line(run, fault):
    others = [name for name in run.relays if name != fault.side]
    lively = [n for n in (fault.side, *others) if not run.commands[n].is_done]
    side = lively[0] if lively else fault.side
    relay = run.relays[side]
    disturb = {
        "cut": relay.cut,
        "silence": relay.silence,
        "delay": lambda: relay.slow_down(fault.amount),
        "repeat": relay.repeat,
    }
    disturb[fault.kind]()
    try:
        yield side if lively else ""
    finally:
        relay.restore()


@contextlib.contextmanager
def _fill_disk(run, fault):
    """No byte more for a whole home, or, where none can be mounted, for its processes' files."""
    mount = run.mounts.get(fault.side)
    command = run.commands[fault.side]
    if mount is not None:
        mount.fill()
    else:
        for process in command.list_processes():
            _limit(process, SMALL_BYTES)
    try:
        yield fault.side if command.is_running else ""
    finally:
        if mount is not None:
            mount.empty()
        _lift_limits(command)


def _lift_limits(command):
    """Let a command's processes write files of any size."""
    for process in command.list_processes():
        _limit(process, resource.RLIM_INFINITY)


def _limit(process, num_bytes):
    with contextlib.suppress(OSError):
        _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (num_bytes, hard))


@contextlib.contextmanager
def _step_clock(run, fault):
    run.set_clock(fault.side, fault.amount)
    try:
        yield fault.side if run.commands[fault.side].is_running else ""
    finally:
        run.set_clock(fault.side, 0.0)


@contextlib.contextmanager
def _expire(run, fault):
    """The server's certificate ran out: while it was away, or while none could be written."""
    command = run.commands[SERVER]
    is_away = fault.seconds > 6.0
    if is_away:
        command.is_held = True
        code = command.tell_to_end()
        if code != 128 + signal.SIGTERM:
            run.problems.append(f"told to end, the server ended with {code}")
    write_expired(command.home)
    if not is_away and (link := command.find_process("link")) is not None:
        link.kill()  # what runs has the former one in memory
    try:
        yield SERVER
    finally:
        command.is_held = False


def write_expired(home):
    """Replace the server's certificate by one of the same authority, names and key of last year."""
    path = home / "tls" / "server.pem"
    chain = x509.load_pem_x509_certificates(path.read_bytes())
    key = serialization.load_pem_private_key((home / "keys/authority.pem").read_bytes(), None)
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(chain[0].subject)
        .issuer_name(chain[0].issuer)
        .public_key(chain[0].public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=91))
        .not_valid_after(now - datetime.timedelta(days=1))
    )
    for extension in chain[0].extensions:
        builder = builder.add_extension(extension.value, critical=extension.critical)
    expired = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    path.write_bytes(expired + chain[1].public_bytes(serialization.Encoding.PEM))


def write_clock(path, seconds):
    """Tell processes that read their clock's error from this file what it is."""
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_text(f"{seconds:+.0f}\n", encoding="ascii")
    temporary.replace(path)


def build_clock_environment(library, path):
    """Environment of processes whose clock is off by what a file says, looked up every second."""
    return {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(path),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",
    }


def find_clock_file(name):
    """Where such a file may lie: confined processes read their environment's folder."""
    return Path(sys.prefix) / f".clock-{os.getpid()}-{time.monotonic_ns()}-{name}"


def forget_clock(pid):
    """Delete what the library shares among the processes of one that was killed."""
    for name in (f"faketime_shm_{pid}", f"sem.faketime_sem_{pid}"):
        Path("/dev/shm", name).unlink(missing_ok=True)


KINDS = {
    "kill": _kill,
    "stop": _stop,
    "cut": _disturb_line,
    "silence": _disturb_line,
    "delay": _disturb_line,
    "repeat": _disturb_line,
    "disk": _fill_disk,
    "clock": _step_clock,
    "certificate": _expire,
}
"""Each kind with what does it: gives what it met, or nothing."""
SAYS = {
    "cut": "does not answer",
    "silence": "does not answer",
    "disk": "Free some space",
    "clock": "clock",
}
"""Words with which a command says that it waits for the end of a fault."""
SAID_AFTER_SECONDS = 10.0
"""How soon a line that is cut is noticed: every two seconds a command asks for five."""
_COMMON = ("kill", "kill", "kill", "stop", "stop", "cut", "silence", "delay", "disk")
TLS_KINDS = (*_COMMON, "certificate", *(("clock",) if find_faketime() else ()))
PLAIN_KINDS = (*_COMMON, "repeat", "repeat", "repeat", *(("clock",) if find_faketime() else ()))
