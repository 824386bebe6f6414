"""A whole federation on this machine: one server and several contributors at once.

The same `serve` and `join` as across machines, so a demo is the deployment in small.
"""

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molora_fed.cooperative.known_text import write_known_text
from molora_fed.errors import FederationError
from molora_fed.federation.contributor import join
from molora_fed.federation.homes import ContributorHome
from molora_fed.federation.join_settings import JoinSettings
from molora_fed.federation.server import serve
from molora_fed.federation.status import FederationEvent, OnEvent
from molora_fed.federation.supervise import sigterm_as_interrupt
from molora_fed.serving.addresses import find_free_port
from molora_fed.storage.compute import Compute

__all__ = ["LocalContributor", "note_known_text", "run_local"]

LOOK_SECONDS = 0.2
START_SECONDS = 60.0
HOST = "127.0.0.1"


@dataclass(frozen=True)
class LocalContributor:
    """One contributor of a local federation.

    Attributes:
        home: Its home folder.
        settings: What it joins with; its name is unique among all.
    """

    home: Path
    settings: JoinSettings

    def take_part(self, server: str, on_event: OnEvent, stop: threading.Event) -> dict[str, Any]:
        """`join` with these settings; returns the acknowledgement.

        Nothing leaves this machine, so it agrees to whatever the charter asks for.
        """
        return join(
            server,
            self.settings,
            self.home,
            on_event,
            consent=lambda charter: True,
            wait_seconds=START_SECONDS,
            stop=stop,
        )


def note_known_text(cooperative: Path, contributors: Iterable[LocalContributor]) -> None:
    """Tell a cooperative's fusions where its contributors' text lies on this machine.

    Args:
        cooperative: The coordinator's home.
        contributors: All who take part, those who join later included.

    Raises:
        StorageError: On I/O errors.
    """
    write_known_text(
        cooperative, {one.settings.name: ContributorHome(one.home).corpus for one in contributors}
    )


def run_local(
    cooperative: Path,
    contributors: Sequence[LocalContributor],
    on_event: OnEvent = lambda event: None,
    *,
    port: int | None = None,
    threads: int | None = None,
    compute: Compute | None = None,
    stop: threading.Event | None = None,
) -> dict[str, dict[str, Any]]:
    """Run a server and its contributors until every contributor has the fused model.

    Safe to interrupt; call again to resume. Ctrl-C ends it and leaves no
    process behind, and so does SIGTERM.

    Args:
        cooperative: The coordinator's home, made by `create_cooperative`.
        contributors: Who takes part; each with a home of its own.
        on_event: Receives what changes; called from several threads, one at a time.
        port: Port of the server; None takes a free one.
        threads: Threads of the coordinator's worker; None takes all cores.
        compute: Where the coordinator's models run; its home's settings where it says nothing.
        stop: Set it to end early.

    Returns:
        The coordinator's acknowledgement by contributor's name.

    Raises:
        FederationError: If it was stopped before the end, or processes keep failing.
        MoloraError: The first error of server or contributors; all others are stopped then.
    """
    stop = stop or threading.Event()
    stop_server, stop_members = threading.Event(), threading.Event()
    port = find_free_port(HOST) if port is None else port
    lock = threading.Lock()

    def emit(event: FederationEvent) -> None:
        """Hand on one event at a time; of a contributor, what it says itself."""
        if event.contributor and event.seen_by == "server" and not event.problem:
            return  # older news of the same
        with lock:
            on_event(event)

    # Each thread lives as long as the processes it started: on Linux a process is told to end
    # when the thread that started it does.
    with sigterm_as_interrupt(), ThreadPoolExecutor(len(contributors) + 1) as pool:
        server = pool.submit(
            serve,
            cooperative,
            port,
            emit,
            host=HOST,
            threads=threads,
            compute=compute,
            stop=stop_server,
        )
        members = {
            one.settings.name: pool.submit(one.take_part, f"{HOST}:{port}", emit, stop_members)
            for one in contributors
        }
        running: list[Future[Any]] = [server, *members.values()]
        try:
            while not (failed := _list_errors(running)) and not stop.wait(LOOK_SECONDS):
                if all(member.done() for member in members.values()):
                    break
        finally:
            stop_members.set()
            wait(members.values())
            stop_server.set()
            wait([server])
    failed = failed or _list_errors(running)
    if failed:
        raise failed[0]
    acknowledgements = {name: member.result() for name, member in members.items()}
    if stop.is_set():
        raise FederationError(
            f"Stopped before the end: expected {len(contributors)} contributors to finish, got "
            f"{sum(map(bool, acknowledgements.values()))}. Run the same command again to resume."
        )
    return acknowledgements


def _list_errors(running: Sequence[Future[Any]]) -> list[BaseException]:
    """The errors of what has ended, the server's first."""
    ended = [one.exception() for one in running if one.done()]
    return [error for error in ended if error is not None]
