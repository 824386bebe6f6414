"""What an evolution asks of contributors whose texts stay with them, as folders that travel.

A question is populations with their routers, and what to do with them; an answer is figures, and
an adapted population where one was asked for. Neither holds text or token ids.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, get_args

from molora_fed.charter import AdapterRules
from molora_fed.contributions.build import MAX_FIGURES_BYTES
from molora_fed.errors import PopulationError
from molora_fed.plugins import Plugins
from molora_fed.population.evolution import POPULATION_FOLDER, ROUTER_FILE, Branch
from molora_fed.population.files import load_population, save_population
from molora_fed.population.router_files import load_router, save_router
from molora_fed.storage.files import replace_folder, write_json
from molora_fed.storage.untrusted import clean, parse_json

__all__ = [
    "Answer",
    "Ask",
    "Question",
    "QuestionKind",
    "load_answer",
    "load_question",
    "save_answer",
    "save_question",
]

QuestionKind = Literal[
    "adapt",  # one branch: train it on adaptation blocks by the charter's round, send it back
    "fitness",  # one branch: what each slot is worth, on fitness blocks
    "guard",  # lifecycle and twin: their difference, on guard blocks
    "gates",  # one branch: mean gates, on fitness blocks
    "held-out",  # the last branch and the start: losses on held-out blocks, once
]

_QUESTION_FILE = "question.json"
_ANSWER_FILE = "answer.json"
_MAX_BRANCHES = 2

Read = TypeVar("Read")


@dataclass(frozen=True, eq=False)
class Question:
    """What all contributors are asked at once.

    Attributes:
        kind: What to do.
        settings: How, JSON values.
        branches: With what.
    """

    kind: QuestionKind
    settings: Mapping[str, Any] = field(default_factory=dict)
    branches: tuple[Branch, ...] = ()


@dataclass(frozen=True, eq=False)
class Answer:
    """What one contributor answers.

    Attributes:
        contributor: Its name.
        figures: JSON values.
        branch: The adapted branch, where one was asked for.
    """

    contributor: str
    figures: Mapping[str, Any]
    branch: Branch | None = None


class Ask(Protocol):
    """Asks all contributors of an evolution."""

    def __call__(self, question: Question, read: Callable[[Answer], Read]) -> list[Read]:
        """Wait until everybody has answered.

        Args:
            question: What to ask.
            read: Makes of an answer what is wanted; a PopulationError of it refuses that answer.

        Returns:
            What was read, in the contributors' fixed order.
        """


def save_question(question: Question, router_name: str, folder: Path) -> None:
    """Write a question's folder; equal questions give equal bytes.

    Raises:
        PopulationError: If a population cannot be written.
        StorageError: On I/O errors.
    """
    with replace_folder(folder) as target:
        for number, branch in enumerate(question.branches):
            _save_branch(branch, router_name, target / f"branch-{number}")
        content = {"kind": question.kind, "settings": dict(question.settings)}
        write_json(target / _QUESTION_FILE, content)


def load_question(folder: Path, *, rules: AdapterRules, plugins: Plugins) -> Question:
    """Read a question that came from outside.

    Raises:
        PopulationError: If it is malformed, or a router is not known here.
        AdapterError: If a population is malformed, or against the charter's rules.
    """
    content = _read(folder / _QUESTION_FILE)
    kind: Any = content.get("kind")
    settings = content.get("settings")
    is_known = isinstance(kind, str) and kind in get_args(QuestionKind)
    if not is_known or not isinstance(settings, dict):
        raise _malformed(folder, f"kind '{clean(kind, 40)}'")
    places = [folder / f"branch-{number}" for number in range(_MAX_BRANCHES)]
    branches = tuple(_load_branch(p, rules, plugins) for p in places if p.is_dir())
    if len(branches) != (2 if kind in ("guard", "held-out") else 1):
        raise _malformed(folder, f"{len(branches)} populations for '{kind}'")
    return Question(kind, settings, branches)


def save_answer(answer: Answer, router_name: str, folder: Path) -> None:
    """Write an answer's folder; its contributor is told by who sends it.

    Raises:
        PopulationError: If a population cannot be written.
        StorageError: On I/O errors.
    """
    with replace_folder(folder) as target:
        if answer.branch is not None:
            _save_branch(answer.branch, router_name, target / "branch-0")
        write_json(target / _ANSWER_FILE, dict(answer.figures))


def load_answer(folder: Path, *, contributor: str, rules: AdapterRules, plugins: Plugins) -> Answer:
    """Read an answer that came from outside.

    Raises:
        PopulationError: If it is malformed, or its router is not known here.
        AdapterError: If its population is malformed, or against the charter's rules.
    """
    figures = _read(folder / _ANSWER_FILE)
    place = folder / "branch-0"
    branch = _load_branch(place, rules, plugins) if place.is_dir() else None
    return Answer(contributor, figures, branch)


def _save_branch(branch: Branch, router_name: str, folder: Path) -> None:
    save_population(branch.population, folder / POPULATION_FOLDER)
    save_router(branch.router, router_name, folder / ROUTER_FILE)


def _load_branch(folder: Path, rules: AdapterRules, plugins: Plugins) -> Branch:
    population = load_population(folder / POPULATION_FOLDER, rules=rules)
    return Branch(population, load_router(folder / ROUTER_FILE, plugins))


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_FIGURES_BYTES:
            raise _malformed(path, f"more than {MAX_FIGURES_BYTES} bytes")
        content = parse_json(path.read_bytes(), max_bytes=MAX_FIGURES_BYTES)
    except (OSError, ValueError) as error:
        raise _malformed(path, clean(error, 100)) from error
    if not isinstance(content, dict):
        raise _malformed(path, type(content).__name__)
    return content


def _malformed(path: Path, got: str) -> PopulationError:
    return PopulationError(
        f"Cannot read '{path}': expected a question or an answer of an evolution, got {got}. "
        "Run the same molora-fed version on both sides."
    )
