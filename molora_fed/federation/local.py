"""A whole federation on this machine: one server and several contributors at once.

The same `serve` and `join` as across machines, so a demo is the deployment in small.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molora_fed.errors import FederationError
from molora_fed.federation.contributor import join
from molora_fed.federation.events import FederationEvent, OnEvent
from molora_fed.federation.join_settings import JoinSettings
from molora_fed.federation.server import serve
from molora_fed.federation.supervise import find_free_port, sigterm_as_interrupt

__all__ = ["LocalContributor", "run_local"]

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


def run_local(
    cooperative: Path,
    contributors: Sequence[LocalContributor],
    on_event: OnEvent = lambda event: None,
    *,
    port: int | None = None,
    threads: int | None = None,
    stop: threading.Event | None = None,
) -> dict[str, dict[str, Any]]:
    """Run a server and its contributors until every contributor has the fused model.

    Called again after it was stopped, it goes on where it was. Ctrl-C ends it and leaves no
    process behind, and so does SIGTERM.

    Args:
        cooperative: The coordinator's home, made by `create_cooperative`.
        contributors: Who takes part; each with a home of its own.
        on_event: Receives what changes; called from several threads, one at a time.
        port: Port of the server; None takes a free one.
        threads: Threads of the coordinator's worker; None takes all cores.
        stop: Set it to end early.

    Returns:
        The coordinator's acknowledgement by contributor's name.

    Raises:
        FederationError: If it was stopped before the end, or processes keep failing.
        MoloraError: The first error of server or contributors; all others are stopped then.
    """
    stop = stop or threading.Event()
    crew = _Crew(on_event)
    chosen = find_free_port(HOST) if port is None else port
    acknowledgements: dict[str, dict[str, Any]] = {}

    def run_member(member: LocalContributor) -> None:
        answer = member.take_part(f"{HOST}:{chosen}", crew.emit, crew.stop_members)
        acknowledgements[member.settings.name] = answer

    with sigterm_as_interrupt(), crew:
        crew.start_server(
            lambda: serve(
                cooperative, chosen, crew.emit, host=HOST, threads=threads, stop=crew.stop_server
            )
        )
        for member in contributors:
            crew.start_member(lambda member=member: run_member(member))  # type: ignore[misc]
        while crew.is_working and not stop.wait(LOOK_SECONDS):
            pass
    if crew.failures:
        raise crew.failures[0]
    if stop.is_set():
        raise FederationError(
            f"Stopped before the end: expected {len(contributors)} contributors to finish, got "
            f"{len(acknowledgements)}. Run the same command again to go on."
        )
    return acknowledgements


class _Crew:
    """Threads of a server and its members, each alive for as long as the processes it started.

    On Linux a process is told to end when the thread that started it does.
    """

    def __init__(self, on_event: OnEvent) -> None:
        self.failures: list[BaseException] = []
        self.stop_server = threading.Event()
        self.stop_members = threading.Event()
        self._on_event = on_event
        self._lock = threading.Lock()
        self._server: threading.Thread | None = None
        self._members: list[threading.Thread] = []

    def __enter__(self) -> "_Crew":
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()

    def emit(self, event: FederationEvent) -> None:
        """Hand on one event at a time; of a contributor, what it says itself."""
        if event.contributor and event.seen_by == "server" and not event.problem:
            return  # older news of the same
        with self._lock:
            self._on_event(event)

    def start_server(self, work: Callable[[], None]) -> None:
        """Start the server's thread."""
        self._server = self._start(work)

    def start_member(self, work: Callable[[], None]) -> None:
        """Start a contributor's thread."""
        self._members.append(self._start(work))

    def _start(self, work: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                self.failures.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    @property
    def is_working(self) -> bool:
        """Whether contributors still work and nothing has failed."""
        return not self.failures and any(thread.is_alive() for thread in self._members)

    def end(self) -> None:
        """Stop the members, then the server, and wait for their processes to be gone."""
        self.stop_members.set()
        for thread in self._members:
            thread.join()
        self.stop_server.set()
        if self._server is not None:
            self._server.join()
