"""Where finished tasks live: one folder each under the cache, shared by all studies.

`result.json` is written last and whole, so a task is done if and only if the file is there. A task
is held by one process at a time; the lock ends with the process, however it ends.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molora_fed.errors import StudyError
from molora_fed.storage.files import canonical_json, write_json
from molora_fed.storage.locks import try_lock
from molora_studies.framework.action_ids import get_hashed_name
from molora_studies.framework.contract import Done, Task

__all__ = ["RESULT_FILE", "TaskStore"]

FORMAT_VERSION = 1
RESULT_FILE = "result.json"
"""Reserved in a task's folder: an action must not write it."""

MAX_RESULT_BYTES = 8 * 2**20
"""Of one task's result; larger things belong into files of the task's folder."""


@dataclass(frozen=True)
class TaskStore:
    """Finished and unfinished tasks.

    Attributes:
        root: Folder with one folder for each task, named by its key.
    """

    root: Path

    @classmethod
    def in_cache(cls, cache: Path) -> "TaskStore":
        """The store of a cache folder; see `molora_fed.storage.values.find_cache_folder`."""
        return cls(cache / "studies" / "tasks")

    def folder(self, task: Task) -> Path:
        """The task's durable folder; it may not exist yet."""
        return self.root / task.key

    def is_done(self, task: Task) -> bool:
        """Whether the task is finished."""
        return (self.folder(task) / RESULT_FILE).is_file()

    def read(self, task: Task) -> tuple[Done, float]:
        """A finished task, and the wall-clock seconds it took.

        Raises:
            StudyError: If it is not finished, or its file is malformed.
        """
        path = self.folder(task) / RESULT_FILE
        try:
            content = json.loads(path.read_bytes())
            if content["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format version {content['format_version']}")
            return Done(task, path.parent, content["result"]), float(content["seconds"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StudyError(
                f"Cannot read task '{task.name}': expected its result in '{path}', got {error}. "
                "Remove its folder and run the study again."
            ) from error

    def write(self, task: Task, result: Mapping[str, Any], seconds: float) -> None:
        """Finish a task.

        Args:
            task: The task.
            result: What its action returned.
            seconds: Wall-clock seconds it took.

        Raises:
            StudyError: If the result is not JSON, or too large.
            StorageError: On I/O errors.
        """
        where = f"Cannot keep the result of task '{task.name}'"
        try:
            size = len(canonical_json(result))
        except (TypeError, ValueError) as error:
            raise StudyError(
                f"{where}: expected finite JSON values, got {error}. Correct '{task.action}'."
            ) from error
        if size > MAX_RESULT_BYTES:
            raise StudyError(
                f"{where}: expected at most {MAX_RESULT_BYTES} bytes of JSON, got {size}. "
                "Leave large things in files of the task's folder."
            )
        content = {
            "format_version": FORMAT_VERSION,
            "name": task.name,
            "action": get_hashed_name(task.action),
            "version": task.version,
            "settings": dict(task.settings),
            "needs": [need.key for need in task.needs],
            "result": result,
            "seconds": round(seconds, 3),
        }
        write_json(self.folder(task) / RESULT_FILE, content)

    @contextmanager
    def hold(self, task: Task) -> Iterator[bool]:
        """Hold a task while the block runs.

        The lock lies beside the folder: what works in the folder may lock that for itself.

        Yields:
            False if another process holds it.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        lock = try_lock(self.root / f"{task.key}.lock")
        try:
            yield lock is not None
        finally:
            if lock is not None:
                lock.release()
