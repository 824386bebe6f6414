"""What a study is: a plan of tasks, and a summary of what came out of its cells.

A task is one unit of work with a durable folder, done once for all studies that need it: its key
is the hash of everything that decides its result. A cell is a task whose result the study reports.
"""

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from molora_fed.errors import StudyError
from molora_fed.storage.files import canonical_json, hash_bytes
from molora_fed.types import Progress
from molora_studies.framework.action_ids import get_hashed_name

__all__ = [
    "Cell",
    "Claim",
    "Done",
    "Figure",
    "Study",
    "StudyOptions",
    "Summary",
    "Table",
    "Task",
    "TaskContext",
    "Verdict",
]

Verdict = Literal[
    "holds", "does not hold", "differs", "not decided", "by construction", "not tuned"
]
"""Of a claim on our figures, by the interval over its unit of replication: `differs` if the
direction holds and the size does not, `not decided` if the interval allows both answers or there is
one replicate only. Two are no verdicts and are never counted as such: `by construction` if nothing
could have come out otherwise, `not tuned` if the rival had fewer tries at its recipe than ours."""


class StudyOptions(BaseModel):
    """Base of every study's options, read from its TOML file: unknown keys are refused.

    Attributes:
        seeds: Seeds of what is repeated; the first one screens.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    seeds: tuple[int, ...] = (42, 137, 2026)


@dataclass(frozen=True, eq=False)
class Task:
    """One unit of work.

    Attributes:
        name: For people, e.g. "specialist cpp seed 42".
        action: An id of `action_ids`, or "module:function" for one that never moves. Called as
            `function(settings, context)` in another process; it returns the result as JSON values
            and leaves files in `context.folder`. The same settings and needs give the same
            result: wall times go under the key "seconds".
        settings: JSON values that decide the result.
        needs: Tasks that must be done before.
        seconds: Estimate on one quiet core.
        version: Raised whenever the action's result changes for the same settings.
    """

    name: str
    action: str
    settings: Mapping[str, Any]
    needs: tuple["Task", ...] = ()
    seconds: float = 1.0
    version: int = 1

    @cached_property
    def key(self) -> str:
        """SHA-256 over action, version, settings and the keys of what it needs."""
        needs = [task.key for task in self.needs]
        action = get_hashed_name(self.action)
        return hash_bytes(canonical_json([action, self.version, dict(self.settings), needs]))

    def walk(self) -> Iterator["Task"]:
        """All tasks this one rests on, then itself; some may come more than once."""
        for task in self.needs:
            yield from task.walk()
        yield self


@dataclass(frozen=True, eq=False)
class Done:
    """A finished task.

    Attributes:
        task: The task.
        folder: Its durable folder.
        result: What its action returned.
    """

    task: Task
    folder: Path
    result: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class TaskContext:
    """What an action is given beside its settings.

    Attributes:
        folder: The task's own durable folder; a killed action finds what it left there.
        needs: The finished tasks it needs, in the task's order.
        threads: Torch threads to use.
        cache: Folder of everything that is kept between runs, e.g. bases.
        progress: Receives progress within the task.
    """

    folder: Path
    needs: tuple[Done, ...]
    threads: int
    cache: Path
    progress: Progress | None = None


@dataclass(frozen=True, eq=False)
class Cell:
    """One row of a study's result.

    Attributes:
        name: Unique in the study.
        labels: What sets it apart, JSON values, e.g. {"seed": 42, "steps": 600}.
        task: Whose result it is.
    """

    name: str
    labels: Mapping[str, Any]
    task: Task


@dataclass(frozen=True)
class Claim:
    """A published claim beside our figure.

    Attributes:
        claim: One sentence.
        published: The published figure, as text with its unit.
        measured: Ours, as text with unit, interval and number of seeds.
        verdict: What follows.
        unit: The unit of replication that the verdict is judged over, with its number, e.g.
            "training seed (3)".
        reason: One sentence on why the verdict is what it is.
    """

    claim: str
    published: str
    measured: str
    verdict: Verdict
    unit: str
    reason: str = ""

    def __post_init__(self) -> None:
        """Refuse a claim that does not say what it is judged over.

        Raises:
            StudyError: If the unit is empty.
        """
        if not self.unit.strip():
            raise StudyError(
                f"Cannot state claim '{self.claim}': expected its unit of replication, got none. "
                "Name what was done independently, and how often."
            )


@dataclass(frozen=True)
class Table:
    """A table of a summary; numbers are formatted already.

    Attributes:
        title: Title.
        columns: Headers.
        rows: Cells as text.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, eq=False)
class Figure:
    """A figure of a summary.

    Attributes:
        name: File name without ending.
        caption: One or two sentences.
        draw: Draws onto an empty matplotlib figure.
    """

    name: str
    caption: str
    draw: Callable[[Any], None]


@dataclass(frozen=True, eq=False)
class Summary:
    """What a study says.

    Attributes:
        findings: Figures others read, JSON values; deterministic.
        claims: Published claims and what became of them.
        tables: Tables, the most important first.
        figures: Figures.
        notes: Sentences on limits and surprises.
    """

    findings: Mapping[str, Any]
    claims: Sequence[Claim] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    notes: Sequence[str] = field(default_factory=tuple)


class Study(abc.ABC):
    """A study, registered as a class, see `registry`; it is never instantiated.

    Attributes:
        Options: Pydantic model of its TOML file; every key has a default.
        title: One line.
        measures: Packages it measures, beside molora_fed and its own; their code is hashed into
            its result.
    """

    Options: ClassVar[type[StudyOptions]] = StudyOptions
    title: ClassVar[str]
    measures: ClassVar[tuple[str, ...]] = ()

    @classmethod
    @abc.abstractmethod
    def plan(cls, options: Any) -> Sequence[Cell]:
        """All cells; says nothing of what is done already."""

    @classmethod
    @abc.abstractmethod
    def summarise(cls, options: Any, results: Mapping[str, Mapping[str, Any]]) -> Summary:
        """Summary of the cells' results, by cell name."""
