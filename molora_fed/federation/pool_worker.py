"""One of a pool of workers that do the work of simulated contributors.

`python -m molora_fed.federation.pool_worker PARTITIONS`. Each contributor is one worker's at a
time, under the lock of its home; a worker that is killed leaves its contributors to the others.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from molora_fed.errors import FederationError
from molora_fed.federation.fleet import read_partitions
from molora_fed.federation.homes import ContributorHome
from molora_fed.federation.logs import start_logging
from molora_fed.federation.mailbox import hold_lock
from molora_fed.federation.supervise import record_errors
from molora_fed.federation.worker import ContributorWorker
from molora_fed.federation.worker_mail import (
    LOOK_SECONDS,
)
from molora_fed.plugins import Plugins, get_plugins

__all__ = ["PoolWorker", "main"]


@dataclass(frozen=True, eq=False)
class _TakenContributor:
    """A contributor that this worker has taken."""

    home: ContributorHome
    lock: AbstractContextManager[None]
    steps: Iterator[None]


class PoolWorker:
    """Takes contributors that have a task, and advances those it has.

    Args:
        partitions: File with the contributors' homes; some may be added while this works.
        plugins: Where domains and adapter kinds are registered.
    """

    def __init__(self, partitions: Path, plugins: Plugins) -> None:
        self._partitions = partitions
        self._plugins = plugins
        self._held: dict[Path, _TakenContributor] = {}

    def look(self) -> None:
        """Advance everyone it has as far as what has arrived allows, then take one more.

        A contributor is taken only while none of this worker's has its contribution still ahead,
        so that the work goes to whoever is free.
        """
        for held in list(self._held.values()):
            self._advance(held)
        if all(held.home.offer_file.exists() for held in self._held.values()):
            taken = self._take()
            if taken is not None:
                self._advance(taken)

    def _take(self) -> _TakenContributor | None:
        """The first contributor with a task whom nobody has, None if there is none."""
        for home in map(ContributorHome, read_partitions(self._partitions)):
            if home.root in self._held or not _has_work(home):
                continue
            lock = hold_lock(home.root / "worker.lock", what="a contributor's worker")
            try:
                lock.__enter__()
            except FederationError:
                continue  # another worker has it
            if not _has_work(home):
                lock.__exit__(None, None, None)  # that one has just ended
                continue
            held = _TakenContributor(home, lock, ContributorWorker(home, self._plugins).steps())
            self._held[home.root] = held
            return held
        return None

    def _advance(self, held: _TakenContributor) -> None:
        """Do what can be done for one contributor; bad news of one is kept in its home."""
        ended = object()
        try:
            with record_errors(held.home.error_file):
                found = next(held.steps, ended)
        except SystemExit:
            found = ended
        if found is ended:
            del self._held[held.home.root]
            held.lock.__exit__(None, None, None)


def _has_work(home: ContributorHome) -> bool:
    """Whether a task has arrived that has neither come to its end nor failed."""
    is_over = home.read_state().get("phase") == "DONE" or home.error_file.exists()
    return bool(home.list_tasks()) and not is_over


def main(arguments: list[str]) -> None:
    """Work for as long as the process lives."""
    start_logging("pool worker")
    worker = PoolWorker(Path(arguments[0]), get_plugins())
    while True:
        worker.look()
        time.sleep(LOOK_SECONDS)


if __name__ == "__main__":
    main(sys.argv[1:])
