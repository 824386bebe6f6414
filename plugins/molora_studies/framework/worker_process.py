"""A worker as its runner sees it: a process with two pipes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, Any, cast

from molora_studies.framework.contract import Task
from molora_studies.framework.wire import encode_line, encode_task
from molora_studies.framework.worker import THREAD_VARIABLES, THREADS

__all__ = ["WorkerProcess"]

LOG_FILE = "workers.txt"


class WorkerProcess:
    """One worker process.

    Attributes:
        log: What all workers say outside their tasks, e.g. why one cannot start.
    """

    def __init__(self, cache: Path) -> None:
        environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(THREADS))}
        environment.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.log = cache / "studies" / LOG_FILE
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "molora_studies.framework.worker", str(cache)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches the runner only; one kill ends the group
                bufsize=0,
            )
        self._asked = cast("IO[bytes]", self._process.stdin)
        self._answers = cast("IO[bytes]", self._process.stdout)
        self._rest = b""

    @property
    def answers(self) -> IO[bytes]:
        """The pipe it answers over."""
        return self._answers

    def begin(self, task: Task) -> None:
        """Ask for a task."""
        with contextlib.suppress(BrokenPipeError):  # its end is seen on the other pipe
            line = memoryview(encode_line({"task": encode_task(task)}))
            while line:
                line = line[self._asked.write(line) :]

    def read(self) -> list[dict[str, Any]] | None:
        """Messages that have come, or None if it has ended."""
        piece = os.read(self.answers.fileno(), 2**16)
        if not piece:
            return None
        *lines, self._rest = (self._rest + piece).split(b"\n")
        return [json.loads(line) for line in lines]

    def end(self) -> int:
        """Kill it and what it started; returns how it ended."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        code = self._process.wait()
        self._asked.close()
        self._answers.close()
        return code
