"""A process that does tasks, one after the other, as its runner asks over a pipe.

It ends, with everything its actions started, as soon as the pipe's other end is gone: however the
runner ends. `python -m molora_studies.framework.worker CACHE`. Runner and worker talk over
the worker's own two pipes, one JSON value a line.
"""

import contextlib
import gc
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from molora_fed.errors import MoloraError, StudyError
from molora_fed.storage.files import write_bytes
from molora_fed.types import Progress
from molora_studies.framework.action_ids import load_action
from molora_studies.framework.contract import Task, TaskContext
from molora_studies.framework.schedule import collect_tasks
from molora_studies.framework.store import TaskStore

__all__ = [
    "ERROR_FILE",
    "LOG_FILE",
    "THREAD_VARIABLES",
    "decode_task",
    "encode_line",
    "encode_task",
    "run_task",
    "serve",
]


def encode_line(value: Mapping[str, Any]) -> bytes:
    """One message; figures that JSON cannot carry become null, other things text."""
    return (json.dumps(_make_finite(value), ensure_ascii=False, default=str) + "\n").encode()


def _make_finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _make_finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_make_finite(each) for each in value]
    if isinstance(value, float) and not -float("inf") < value < float("inf"):
        return None
    return value


def encode_task(task: Task) -> list[dict[str, Any]]:
    """A task and all it rests on as JSON values, itself last."""
    tasks = collect_tasks([task])
    places = {key: index for index, key in enumerate(tasks)}
    return [
        {
            "name": each.name,
            "action": each.action,
            "settings": dict(each.settings),
            "needs": [places[need.key] for need in each.needs],
            "seconds": each.seconds,
            "version": each.version,
        }
        for each in tasks.values()
    ]


def decode_task(rows: list[dict[str, Any]]) -> Task:
    """The task that `encode_task` encoded; its key is the same."""
    tasks: list[Task] = []
    for row in rows:
        tasks.append(Task(**{**row, "needs": tuple(tasks[index] for index in row["needs"])}))
    return tasks[-1]


THREADS = 1
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""Set before a worker starts: once torch is loaded, it is too late."""

LOG_FILE = "log.txt"
ERROR_FILE = "error.txt"
PROGRESS_SECONDS = 0.5


class _Teller:
    """Passes a task's progress on, now and then."""

    def __init__(self, pipe: BinaryIO) -> None:
        self._pipe = pipe
        self._told = 0.0

    def __call__(self, done: int, total: int, **fields: float | str) -> None:
        now = time.monotonic()
        if now - self._told >= PROGRESS_SECONDS or done == total:
            self._told = now
            self.tell(
                {"event": "progress", "done": int(done), "total": int(total), "fields": fields}
            )

    def tell(self, message: Mapping[str, Any]) -> None:
        """Send a message at once."""
        self._pipe.write(encode_line(message))
        self._pipe.flush()


def run_task(task: Task, cache: Path, progress: Progress | None = None) -> bool:
    """Do one task, in this process, whose needs are done, unless it is done already.

    Args:
        task: The task.
        cache: Folder of everything that is kept between runs.
        progress: Receives progress within the task; see `molora_fed.types.Progress`.

    Returns:
        False if another process is doing it.

    Raises:
        StudyError: If the action cannot be found, or returns what cannot be kept.
        Exception: Whatever the action raises.
    """
    store = TaskStore.in_cache(cache)
    with store.hold(task) as held:
        if not held:
            return False
        if store.is_done(task):
            return True
        started = time.perf_counter()
        folder = store.folder(task)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ERROR_FILE).unlink(missing_ok=True)
        needs = tuple(store.read(need)[0] for need in task.needs)
        context = TaskContext(folder, needs, THREADS, cache, progress)
        result = _find_action(task)(dict(task.settings), context)
        if not isinstance(result, Mapping):
            raise StudyError(
                f"Cannot keep the result of task '{task.name}': expected a mapping, got "
                f"{type(result).__name__}. Correct '{task.action}'."
            )
        store.write(task, result, time.perf_counter() - started)
        return True


def _find_action(task: Task) -> Any:
    try:
        return load_action(task.action)
    except StudyError as error:
        raise StudyError(
            f"Cannot do task '{task.name}': {error}. Correct the plan of the study."
        ) from error


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """Append what anyone in this process, libraries in C included, prints meanwhile."""
    with contextlib.ExitStack() as stack:
        log = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
        stack.callback(os.close, log)
        for stream in (sys.stdout, sys.stderr):
            number = stream.fileno()
            before = os.dup(number)
            stack.callback(os.close, before)
            stack.callback(os.dup2, before, number)
            stack.callback(stream.flush)
            stream.flush()
            os.dup2(log, number)
        yield


def _describe(error: BaseException) -> str:
    if isinstance(error, MoloraError):
        return " ".join(str(error).split())
    return f"unexpected {type(error).__name__}: {' '.join(str(error).split())}"


def serve(cache: Path, asked: BinaryIO, answers: BinaryIO) -> None:
    """Do every task that is asked for, until the asking end is gone.

    Args:
        cache: Folder of everything that is kept between runs.
        asked: One task a line; its end ends this process and its children at once.
        answers: Gets progress, then done, busy (another process does it) or failed.
    """
    waiting: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def listen() -> None:
        for line in asked:
            waiting.put(line)
        # Nobody waits for this process any more. The group also holds what actions started.
        os.killpg(os.getpgrp(), signal.SIGKILL)

    teller = _Teller(answers)
    threading.Thread(target=listen, daemon=True).start()
    while True:
        task = decode_task(json.loads(waiting.get())["task"])
        folder = TaskStore.in_cache(cache).folder(task)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _logging_to(folder / LOG_FILE):
                done = run_task(task, cache, teller)
            if done:  # a task of another process is asked for again and again
                gc.collect()  # a model in a reference cycle would stay beside the next task's
            teller.tell({"event": "done" if done else "busy"})
        except Exception as error:
            write_bytes(folder / ERROR_FILE, "".join(traceback.format_exception(error)).encode())
            teller.tell({"event": "failed", "message": _describe(error)})


def main() -> None:
    """Serve over standard input and output; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    asked = os.fdopen(os.dup(sys.stdin.fileno()), "rb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, sys.stdin.fileno())
    os.close(nothing)
    serve(Path(sys.argv[1]), asked, answers)


if __name__ == "__main__":
    main()
