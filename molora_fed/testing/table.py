"""An evolution's contributors round one table: the same questions and answers, and no network."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from molora_fed.charter import Charter
from molora_fed.plugins import Plugins
from molora_fed.population.private_member import PrivateMember
from molora_fed.population.questions import (
    Answer,
    Question,
    load_answer,
    load_question,
    save_answer,
    save_question,
)

__all__ = ["Table"]

Read = TypeVar("Read")


class Table:
    """Asks contributors of this process; see `Ask`. What is said goes through folders.

    Args:
        folder: Where questions and answers lie.
        people: Contributors by name, in the order of their contributions.
        charter: The cooperative's charter.
        plugins: Where routers are registered.

    Attributes:
        asked: The kind of every question.
        answers: Every answer, as it was read.
    """

    def __init__(
        self,
        folder: Path,
        people: Mapping[str, PrivateMember],
        charter: Charter,
        plugins: Plugins,
    ) -> None:
        self._folder = folder
        self._people = people
        self._charter = charter
        self._plugins = plugins
        self.asked: list[str] = []
        self.answers: list[Answer] = []

    def __call__(self, question: Question, read: Callable[[Answer], Read]) -> list[Read]:
        """Ask one after the other."""
        rules = self._charter.identity.adapters
        router = self._charter.amendment.population.router
        self.asked.append(question.kind)
        save_question(question, router, self._folder / "question")
        found = []
        for name, person in self._people.items():
            arrived = load_question(self._folder / "question", rules=rules, plugins=self._plugins)
            place = self._folder / "answer"
            save_answer(person.answer(arrived), router, place)
            answer = load_answer(place, contributor=name, rules=rules, plugins=self._plugins)
            self.answers.append(answer)
            found.append(read(answer))
        return found
