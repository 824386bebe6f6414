"""The live table of a server or a contributor, from the events its supervisor reports."""

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from molora_fed.storage.untrusted import clean

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

    from molora_fed.federation.status import FederationEvent

__all__ = ["Board", "format_progress", "watching"]

PLAIN_SECONDS = 10.0
"""Least time between two plain lines that differ in figures only."""
SHOWN_MESSAGES = 4
MAX_NAME = 63
MAX_MESSAGE = 500
_STOPPED = "STOPPED"
_SERVER = "server"


class Board(Protocol):
    """Shows events."""

    def __call__(self, event: "FederationEvent") -> None:
        """Take in one event."""

    def paused(self) -> AbstractContextManager[None]:
        """Leave the terminal alone inside, e.g. to ask something."""


def _clean(event: "FederationEvent") -> "FederationEvent":
    """The same with nothing that a terminal obeys: what it says came from others."""
    return replace(
        event,
        contributor=clean(event.contributor, MAX_NAME),
        phase=clean(event.phase, MAX_NAME),
        state=clean(event.state, MAX_NAME),
        message=clean(event.message, MAX_MESSAGE),
    )


def _format_step(event: "FederationEvent") -> str:
    return "" if event.step is None else f"{event.step}/{event.total}"


def _format_eta(event: "FederationEvent") -> str:
    if event.eta_seconds is None:
        return ""
    minutes, seconds = divmod(round(event.eta_seconds), 60)
    return f"{minutes}:{seconds:02d}"


def _format_loss(event: "FederationEvent") -> str:
    return "" if event.loss is None else f"{event.loss:.3f}"


def format_progress(event: "FederationEvent") -> str:
    """Phase, state in the ledger, steps, loss, time left and message, as far as they are known."""
    event = _clean(event)
    loss, eta = _format_loss(event), _format_eta(event)
    parts = [
        event.phase,
        event.state if event.state != event.phase else "",
        _format_step(event),
        loss and f"loss {loss}",
        eta and f"ETA {eta}",
        event.message,
    ]
    return " · ".join(part for part in parts if part)


class _Plain:
    """A line for each change; figures alone at most every ten seconds."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[str, str, str]] = {}
        self._printed: dict[str, float] = {}

    def __call__(self, event: "FederationEvent") -> None:
        if event.phase == _STOPPED:
            return  # why it stopped, the command says itself
        event = _clean(event)
        who = event.contributor or _SERVER
        key, now = (event.phase, event.state, event.message), time.monotonic()
        is_new = self._last.get(event.contributor) != key
        if not is_new and now - self._printed.get(event.contributor, 0.0) < PLAIN_SECONDS:
            return
        self._last[event.contributor], self._printed[event.contributor] = key, now
        print(f"{who}: {format_progress(event)}", flush=True)

    def paused(self) -> AbstractContextManager[None]:
        return nullcontext()


class _Table:
    """One row for the server and for each contributor, and the last messages below."""

    def __init__(self, title: str, live: "Live") -> None:
        self._title = title
        self._live = live
        self._events: dict[str, FederationEvent] = {}
        self._problems: list[str] = []

    def __call__(self, event: "FederationEvent") -> None:
        if event.phase == _STOPPED:
            return
        event = _clean(event)
        if event.problem:
            who = event.contributor or _SERVER
            line = f"{time.strftime('%H:%M:%S')} {who}: {event.message}"
            self._problems = [*self._problems, line][-SHOWN_MESSAGES:]
        # By what it says of itself: a contributor named "server" has a row of its own.
        self._events[event.contributor] = event
        self._live.update(self._build())

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._live.stop()
        try:
            yield
        finally:
            self._live.start(refresh=True)

    def _build(self) -> "Table":
        from rich.table import Table
        from rich.text import Text

        # `Text` everywhere: a plain string would be read for markup, and "[/x]" end the display.
        caption = Text("\n".join(self._problems), style="yellow") if self._problems else None
        table = Table(
            title=Text(clean(self._title, MAX_MESSAGE)),
            title_justify="left",
            caption=caption,
            caption_justify="left",
        )
        for name in ("who", "phase", "ledger"):
            table.add_column(name, no_wrap=True)
        for name in ("progress", "loss", "ETA"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("message", overflow="fold")
        for who, event in sorted(self._events.items()):  # the server, which is "", first
            cells = (
                who or _SERVER,
                event.phase,
                event.state,
                _format_step(event),
                _format_loss(event),
                _format_eta(event),
            )
            message = Text(event.message, style="yellow" if event.problem else "")
            table.add_row(*map(Text, cells), message)
        return table


@contextmanager
def watching(title: str) -> Iterator[Board]:
    """Show events on standard output while the work inside goes on.

    Args:
        title: Of the table.
    """
    if not sys.stdout.isatty():
        yield _Plain()
        return
    from rich.live import Live

    with Live(refresh_per_second=4) as live:
        yield _Table(title, live)
