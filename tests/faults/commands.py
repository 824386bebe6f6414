"""`molora serve` and `molora join` as an operator runs them: started again whenever they end."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

__all__ = [
    "ROLES",
    "Command",
    "build_environment",
    "list_join_arguments",
    "list_serve_arguments",
]

MOLORA = Path(sys.executable).parent / "molora"
MESSAGE_BYTES = 100_000
"""A part of a contribution: an upload takes several messages."""
HOLD_SECONDS = 5
"""How long members hold an answer back without news; less than usual, to be done sooner."""
ROLES = {
    "link": "molora_fed.federation.flower.link",
    "coordinator": "molora_fed.federation.coordinator",
    "node": "molora_fed.federation.flower.node",
    "letters": "molora_fed.federation.pipes",
    "worker": "molora_fed.federation.worker",
}
"""What the processes below a command run. `command` is the command itself."""
PAUSE_SECONDS = 2.0
MOST_ENDS = 8
"""Ends by itself after which a command counts as broken for good."""


def build_environment(**more):
    """Environment of every command."""
    own = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "MOLORA_MESSAGE_BYTES": str(MESSAGE_BYTES),
        "MOLORA_HOLD_SECONDS": str(HOLD_SECONDS),
    }
    return {**os.environ, **own, **more}


def list_serve_arguments(home, port, *more):
    """The command of a server on one thread."""
    return [str(MOLORA), "serve", str(home), "--port", str(port), "--threads", "1", *more]


def list_join_arguments(home, texts, *more):
    """The command of a contributor on one thread."""
    own = ["--home", str(home), "--data", str(texts), "--threads", "1", "--yes"]
    return [str(MOLORA), "join", *own, *more]


class Command:
    """A command that an operator keeps running until it has done its work.

    Attributes:
        name: Whose it is: `server`, or a member.
        home: The folder it works in.
        is_done: Whether it ended well.
        pids: Of its processes, one for each start.
        ends: The line it ended with, each time that it ended by itself before it was done.
        problems: What was not as it should be.
    """

    def __init__(self, name, home, arguments, environment, logs):
        self.name = name
        self.home = home
        self.is_done = False
        self.pids = []
        self.ends = []
        self.problems = []
        self.is_held = False
        self._arguments = arguments
        self._environment = environment
        self._out, self._err = logs / f"{name}.out", logs / f"{name}.err"
        self._process = None
        self._was_killed = self._was_seen = False
        self._not_before = 0.0
        self._err_read = 0

    def start(self):
        """Start it."""
        with self._out.open("ab") as out, self._err.open("ab") as err:
            self._process = subprocess.Popen(
                self._arguments, env=self._environment, stdin=subprocess.DEVNULL, stdout=out,
                stderr=err, start_new_session=True,
            )  # fmt: skip
        self._was_killed = self._was_seen = False
        self.pids.append(self._process.pid)

    @property
    def is_running(self):
        return self._process is not None and self._process.poll() is None

    def find_process(self, role):
        """A living process of it by what it runs, or None."""
        if not self.is_running:
            return None
        with contextlib.suppress(psutil.Error):
            own = psutil.Process(self._process.pid)
            if role == "command":
                return own
            for process in own.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if ROLES[role] in process.cmdline():
                        return process
        return None

    def list_processes(self):
        """All its living processes."""
        if not self.is_running:
            return []
        with contextlib.suppress(psutil.Error):
            own = psutil.Process(self._process.pid)
            return [own, *own.children(recursive=True)]
        return []

    def note_killed(self):
        """Say that its own process is being killed: that is no end by itself."""
        self._was_killed = True

    def watch(self):
        """Start it again if it ended before it was done, as an operator would."""
        if self._process is None or (code := self._process.poll()) is None:
            return
        if not self._was_seen:
            self._was_seen = True
            self._note_end(code)
        is_broken = len(self.ends) > MOST_ENDS
        if not (self.is_done or self.is_held or is_broken) and time.monotonic() >= self._not_before:
            self.start()

    def _note_end(self, code):
        lines = self.read_new_errors()
        if self._was_killed:
            return
        if code == 0:
            self.is_done = True
            return
        self._not_before = time.monotonic() + PAUSE_SECONDS
        self.ends.append(lines[-1] if lines else f"exit status {code}")
        if len(lines) != 1 or not lines[0].startswith("error: "):
            text = " / ".join(lines[-6:])
            self.problems.append(f"{self.name} ended with {code} and not one line: {text[:2_000]}")
        if len(self.ends) > MOST_ENDS:
            self.problems.append(f"{self.name} ended by itself {len(self.ends)} times")

    def read_new_errors(self):
        """Lines on standard error since the last look."""
        with self._err.open("rb") as file:
            file.seek(self._err_read)
            data = file.read()
        self._err_read += len(data)
        return data.decode(errors="replace").splitlines()

    def read_said(self):
        """All it said so far, on standard output and in the lines it ended with."""
        texts = (path.read_text("utf-8", "replace") for path in (self._out, self._err))
        return "".join(texts)

    def tell_to_end(self, *, seconds=120.0):
        """SIGTERM, and wait for the end; the exit status."""
        if not self.is_running:
            return self._process.returncode
        self._was_killed = True
        self._process.send_signal(signal.SIGTERM)
        self._process.send_signal(signal.SIGCONT)  # as systemd does: one that is stopped hears it
        try:
            return self._process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.problems.append(f"{self.name} did not end within {seconds:.0f} s of SIGTERM")
            self._process.kill()
            return self._process.wait()
