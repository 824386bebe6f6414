"""Files of tasks: one JSON object a line, read with limits before anything is kept."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from molora_fed.cascade.contract import CascadeTask
from molora_fed.cascade.retrieval import Example
from molora_fed.errors import CascadeError
from molora_fed.storage.files import canonical_json, hash_bytes, write_bytes
from molora_fed.storage.settings import describe_offenders
from molora_fed.storage.untrusted import parse_json

__all__ = ["hash_tasks", "load_examples", "load_tasks", "save_tasks"]

MAX_FILE_BYTES = 256 * 2**20
MAX_LINE_BYTES = 256 * 2**10
MAX_TASKS = 1_000_000

_Name = Annotated[str, Field(min_length=1, max_length=200)]


class _TaskLine(BaseModel):
    """One line of a file of tasks."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: _Name
    family: _Name
    prompt: str = Field(max_length=65_536)
    extractor: _Name
    answer: str | None = Field(default=None, max_length=65_536)
    level: int = Field(default=1, ge=1, le=1_000)
    details: dict[str, Any] = {}


class _ExampleLine(BaseModel):
    """One line of a file of solved tasks; a file of tasks with answers is one too."""

    model_config = ConfigDict(extra="ignore", strict=True)

    id: _Name
    prompt: str = Field(max_length=65_536)
    answer: str = Field(max_length=65_536)


def _read_lines(path: Path) -> list[tuple[int, Any]]:
    """JSON values with the numbers of their lines; empty lines are left out."""
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise ValueError(f"{size} bytes, expected at most {MAX_FILE_BYTES}")
        found = []
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if len(line) > MAX_LINE_BYTES:
                    raise ValueError(f"line {number} of more than {MAX_LINE_BYTES} bytes")
                if line.strip():
                    found.append((number, _parse(line, number)))
                if len(found) > MAX_TASKS:
                    raise ValueError(f"more than {MAX_TASKS} lines")
        return found
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CascadeError(
            f"Cannot read tasks '{path}': expected one JSON object a line, got {reason}. "
            "Make such a file with `molora cascade tasks`."
        ) from error


def _parse(line: bytes, number: int) -> Any:
    try:
        return parse_json(line, max_bytes=MAX_LINE_BYTES)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from error


def load_tasks(path: Path) -> list[CascadeTask]:
    """Read tasks.

    Args:
        path: JSON lines with id, family, prompt, extractor, and optionally answer, level, details.

    Raises:
        CascadeError: If the file is missing, too large or malformed, holds no task, or an id twice.
    """
    tasks: dict[str, CascadeTask] = {}
    for number, value in _read_lines(path):
        try:
            task = CascadeTask(**_TaskLine.model_validate(value).model_dump())
        except ValidationError as error:
            raise CascadeError(
                f"Cannot read tasks '{path}': expected a task on line {number}, got "
                f"{describe_offenders(error, whole='line')}. Correct that line."
            ) from error
        if task.id in tasks:
            raise CascadeError(
                f"Cannot read tasks '{path}': expected every id once, got '{task.id}' again on "
                f"line {number}. Seeds follow from ids; rename one."
            )
        tasks[task.id] = task
    if not tasks:
        raise CascadeError(f"Cannot read tasks '{path}': expected at least one task, got none.")
    return list(tasks.values())


def load_examples(path: Path) -> list[Example]:
    """Read solved tasks for retrieval; lines without an answer are left out.

    Args:
        path: JSON lines with at least id, prompt and answer.

    Raises:
        CascadeError: If the file is missing, too large or malformed.
    """
    found = []
    for number, value in _read_lines(path):
        if isinstance(value, dict) and value.get("answer") is None:
            continue
        try:
            found.append(Example(**_ExampleLine.model_validate(value).model_dump()))
        except ValidationError as error:
            raise CascadeError(
                f"Cannot read examples '{path}': expected a solved task on line {number}, got "
                f"{describe_offenders(error, whole='line')}. Correct that line."
            ) from error
    return found


def _describe(task: CascadeTask) -> dict[str, Any]:
    plain = vars(task) | {"details": dict(task.details)}
    if task.answer is None:
        del plain["answer"]
    return plain


def save_tasks(tasks: Iterable[CascadeTask], path: Path) -> None:
    """Write tasks, one JSON object a line.

    Args:
        tasks: The tasks.
        path: Target, replaced.

    Raises:
        StorageError: On I/O errors.
    """
    write_bytes(path, b"".join(canonical_json(_describe(task)) + b"\n" for task in tasks))


def hash_tasks(tasks: Sequence[CascadeTask]) -> str:
    """SHA-256 over tasks in their order, right answers included; lower-case hex."""
    return hash_bytes(canonical_json([_describe(task) for task in tasks]))
