"""Questions of an evolution on private texts, over the exchange of folders; see `Ask`."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from molora_fed.charter import Charter
from molora_fed.federation.exchange import Exchange
from molora_fed.federation.messages import Shipment
from molora_fed.plugins import Plugins
from molora_fed.population.questions import Answer, Question, load_answer, save_question

__all__ = ["RemoteData"]

_FIGURES_BYTES = 4 * 2**20

Read = TypeVar("Read")


class RemoteData:
    """Asks the contributors of an evolution; see `Ask`.

    Args:
        exchange: With all of them.
        names: Their names, in the order of answers.
        charter: The cooperative's charter.
        plugins: Where routers are registered.
    """

    def __init__(
        self, exchange: Exchange, names: tuple[str, ...], *, charter: Charter, plugins: Plugins
    ) -> None:
        self._exchange = exchange
        self._names = names
        self._rules = charter.identity.adapters
        self._router_name = charter.amendment.population.router
        self._plugins = plugins

    def __call__(self, question: Question, read: Callable[[Answer], Read]) -> list[Read]:
        """Ask everybody, and wait until all have given an answer that can be used.

        Raises:
            StorageError: On I/O errors.
        """
        asked = self._exchange.publish(
            lambda folder: save_question(question, self._router_name, folder)
        )
        self._forget_branches(asked)

        def load(name: str, place: Path) -> Read:
            answer = load_answer(place, contributor=name, rules=self._rules, plugins=self._plugins)
            return read(answer)

        found = self._exchange.ask(
            dict.fromkeys(self._names, asked), load, answer_bytes=asked.num_bytes + _FIGURES_BYTES
        )
        return list(found.values())

    def _forget_branches(self, asked: Shipment) -> None:
        """Delete what earlier answers brought, all but figures: it has been used."""
        for branch in self._exchange.answers.glob("*/*/branch-*"):
            if branch.parents[1].name != asked.id[:16]:
                shutil.rmtree(branch)
