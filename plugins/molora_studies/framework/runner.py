"""Runs the tasks of a study in processes: longest chains first, whatever can run at once.

Finished tasks are never repeated. A task that fails takes along only what rests on it. A worker is
seen here as a process with two pipes.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol, Self, cast

from molora_studies.framework.contract import Task
from molora_studies.framework.schedule import (
    collect_tasks,
    estimate_seconds,
    find_missing,
    measure_paths,
)
from molora_studies.framework.store import TaskStore
from molora_studies.framework.worker import (
    ERROR_FILE,
    THREAD_VARIABLES,
    THREADS,
    encode_line,
    encode_task,
)

__all__ = ["Failure", "Listener", "Quiet", "Running", "State", "run_tasks"]

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


RETRY_SECONDS = 1.0
"""Until a task that another process does is looked at again."""


@dataclass
class Running:
    """A task at work.

    Attributes:
        task: The task.
        done: Units done, as its action reports.
        total: Units in all; 0 if it reported nothing yet.
        fields: Named figures it reported.
        started: Clock time of its start, `time.monotonic`.
    """

    task: Task
    done: int = 0
    total: int = 0
    fields: Mapping[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def seconds_left(self, now: float) -> float:
        """Estimate from its own progress, else from the plan's."""
        spent = now - self.started
        if self.done and self.total:
            return spent * (self.total - self.done) / self.done
        return max(0.0, self.task.seconds - spent)


@dataclass(frozen=True)
class Failure:
    """A task that failed.

    Attributes:
        task: The task.
        message: One line.
        trace: File with the whole traceback, if there is one.
    """

    task: Task
    message: str
    trace: Path | None = None


@dataclass
class State:
    """How far a run is.

    Attributes:
        tasks: All tasks by key.
        done: Keys of finished tasks.
        running: Tasks at work.
        failures: Tasks that failed.
        skipped: Keys of tasks that rest on a failed one.
        elsewhere: Keys of tasks that another process does.
        seconds_left: Estimate until the end, by the pace of this run.
    """

    tasks: Mapping[str, Task]
    done: set[str]
    running: list[Running] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    skipped: set[str] = field(default_factory=set)
    elsewhere: set[str] = field(default_factory=set)
    seconds_left: float = 0.0


class Listener(Protocol):
    """Shows a run while it goes on."""

    def started(self, task: Task) -> None:
        """A task begins."""

    def ended(self, task: Task, failure: Failure | None) -> None:
        """A task is done, or failed."""

    def update(self, state: State) -> None:
        """Anything changed; called several times a second."""


class Quiet:
    """Shows nothing."""

    def started(self, task: Task) -> None:
        """A task begins."""

    def ended(self, task: Task, failure: Failure | None) -> None:
        """A task is done, or failed."""

    def update(self, state: State) -> None:
        """Anything changed."""


class _Pool:
    """Workers, each with at most one task; they are started when there is work for them."""

    def __init__(self, cache: Path, size: int) -> None:
        self._cache = cache
        self._size = size
        self._selector = selectors.DefaultSelector()
        self._idle: list[WorkerProcess] = []
        self.jobs: dict[WorkerProcess, Running] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in (*self._idle, *self.jobs):
            worker.end()
        self._selector.close()

    @property
    def has_room(self) -> bool:
        """Whether another task can begin."""
        return len(self.jobs) < self._size

    def begin(self, task: Task) -> None:
        """Let an idle or a new worker do a task."""
        if self._idle:
            worker = self._idle.pop()
        else:
            worker = WorkerProcess(self._cache)
            self._selector.register(worker.answers, selectors.EVENT_READ, worker)
        self.jobs[worker] = Running(task)
        worker.begin(task)

    def wait(self, seconds: float) -> Sequence[tuple[Running, Mapping[str, Any]]]:
        """What workers said about their tasks within this time; a worker that ended failed."""
        said: list[tuple[Running, Mapping[str, Any]]] = []
        for key, _ in self._selector.select(seconds):
            worker: WorkerProcess = key.data
            messages = worker.read()
            if messages is None:
                self._selector.unregister(worker.answers)
                said += self._bury(worker)
                continue
            for message in messages:
                said.append((self.jobs[worker], message))
                if message["event"] != "progress":
                    del self.jobs[worker]
                    self._idle.append(worker)
        return said

    def _bury(self, worker: WorkerProcess) -> list[tuple[Running, Mapping[str, Any]]]:
        code = worker.end()
        if worker not in self.jobs:
            self._idle.remove(worker)
            return []
        if code == -signal.SIGKILL:
            message = "its process was killed; is there enough memory?"
        else:
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            message = f"its process ended with {how}; see '{worker.log}'"
        return [(self.jobs.pop(worker), {"event": "failed", "message": message})]


class _Run:
    """The loop: begin what is ready, take in what workers say."""

    def __init__(
        self, wanted: Sequence[Task], store: TaskStore, pool: _Pool, listener: Listener
    ) -> None:
        tasks = collect_tasks(wanted)
        self._store = store
        self._pool = pool
        self._listener = listener
        self._paths = measure_paths(tasks)
        self._retries: dict[str, float] = {}
        self._pace = _Pace()
        self.state = State(tasks, set(tasks) - find_missing(wanted, store.is_done))

    def finish(self, workers: int) -> State:
        """Run until nothing is left that can be done."""
        state = self.state
        while self._begin_ready() or self._pool.jobs or self._retries:
            for job, message in self._pool.wait(RETRY_SECONDS / 2):
                self._take(job, message)
            state.running = sorted(self._pool.jobs.values(), key=lambda job: job.started)
            state.seconds_left = self._pace.estimate(state, workers)
            self._listener.update(state)
        return state

    def _begin_ready(self) -> bool:
        """Begin what is ready while there is room; says whether anything began."""
        began = False
        state, now = self.state, time.monotonic()
        working = {job.task.key for job in self._pool.jobs.values()}
        over = state.done | state.skipped | working | {f.task.key for f in state.failures}
        ready = [
            key
            for key, task in state.tasks.items()
            if key not in over
            and self._retries.get(key, 0.0) <= now
            and all(need.key in state.done for need in task.needs)
        ]
        for key in sorted(ready, key=lambda key: (-self._paths[key], key)):
            if not self._pool.has_room:
                break
            self._pool.begin(state.tasks[key])
            if self._retries.pop(key, None) is None:
                self._listener.started(state.tasks[key])
            began = True
        return began

    def _take(self, job: Running, message: Mapping[str, Any]) -> None:
        state, task = self.state, job.task
        event = message["event"]
        if event == "progress":
            job.done, job.total, job.fields = message["done"], message["total"], message["fields"]
        elif event == "busy":
            self._retries[task.key] = time.monotonic() + RETRY_SECONDS
            state.elsewhere.add(task.key)
        elif event == "done":
            if task.key not in state.elsewhere:
                self._pace.add(task.seconds, time.monotonic() - job.started)
            state.elsewhere.discard(task.key)
            state.done.add(task.key)
            self._listener.ended(task, None)
        else:
            trace = self._store.folder(task) / ERROR_FILE
            failure = Failure(task, message["message"], trace if trace.is_file() else None)
            state.failures.append(failure)
            failed = {task.key, *state.skipped}
            for key, other in state.tasks.items():  # needs come before what needs them
                if any(need.key in failed for need in other.needs) and key not in state.done:
                    failed.add(key)
                    state.skipped.add(key)
            self._listener.ended(task, failure)


class _Pace:
    """How much longer tasks take than planned, on this machine and with what else it does."""

    def __init__(self) -> None:
        self._planned = 0.0
        self._spent = 0.0

    def add(self, planned: float, spent: float) -> None:
        """Take in a finished task."""
        self._planned += planned
        self._spent += spent

    def estimate(self, state: State, workers: int) -> float:
        """Seconds until the end of the run."""
        now = time.monotonic()
        ratio = self._spent / self._planned if self._planned else 1.0
        left = {job.task.key: job.seconds_left(now) / (ratio or 1.0) for job in state.running}
        over = state.done | state.skipped | {failure.task.key for failure in state.failures}
        return ratio * estimate_seconds(state.tasks, over, workers, left=left)


def run_tasks(
    tasks: Sequence[Task], cache: Path, *, workers: int, listener: Listener | None = None
) -> State:
    """Do these tasks and all they rest on; what is done already is not repeated.

    Args:
        tasks: What is wanted.
        cache: Folder of everything that is kept between runs.
        workers: Processes at once, one thread each.
        listener: Shows what happens.

    Returns:
        The final state; `failures` says what could not be done.

    Raises:
        StorageError: If the cache cannot be written.
    """
    with _Pool(cache, workers) as pool:
        run = _Run(tasks, TaskStore.in_cache(cache), pool, listener or Quiet())
        return run.finish(workers)
