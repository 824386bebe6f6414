"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere.

On standard output, so that standard error has errors only.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from molora_fed.storage.untrusted import clean

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

__all__ = ["Reporter", "format_fields", "reporting"]

PLAIN_SECONDS = 10.0
"""Least time between two plain lines of one phase."""


class Reporter(Protocol):
    """Receives the phases of long work and the progress within each."""

    def phase(self, name: str) -> None:
        """Begin a phase."""

    def __call__(self, done: int, total: int, **fields: float | str) -> None:
        """Report `done` of `total` units of the phase; see `molora_fed.types.Progress`."""


def format_fields(fields: dict[str, float | str]) -> str:
    """The figures people look at, in one order: losses, speed, time left."""
    parts = []
    for name, label in (("loss", "loss"), ("validation_loss", "validation")):
        value = fields.get(name)
        if isinstance(value, float | int) and value == value:  # no validation yet is NaN
            parts.append(f"{label} {value:.3f}")
    speed = fields.get("tokens_per_second")
    if isinstance(speed, float | int):
        parts.append(f"{speed:,.0f} tokens/s")
    left = fields.get("eta_seconds")
    if isinstance(left, float | int) and left == left:
        minutes, seconds = divmod(round(left), 60)
        parts.append(f"ETA {minutes}:{seconds:02d}")
    parts += [clean(fields[name]) for name in ("expert", "router") if name in fields]
    return " · ".join(parts)


class _Plain:
    """One line when a phase begins, and one every ten seconds within it."""

    def __init__(self) -> None:
        self._name = ""
        self._printed = 0.0

    def phase(self, name: str) -> None:
        self._name = clean(name)
        self._printed = time.monotonic()
        print(self._name, flush=True)

    def __call__(self, done: int, total: int, **fields: float | str) -> None:
        now = time.monotonic()
        if now - self._printed < PLAIN_SECONDS:
            return
        self._printed = now
        figures = format_fields(fields)
        tail = f" · {figures}" if figures else ""
        print(f"{self._name} {done}/{total}{tail}", flush=True)


class _Silent:
    """Nothing."""

    def phase(self, name: str) -> None:
        pass

    def __call__(self, done: int, total: int, **fields: float | str) -> None:
        pass


class _Bars:
    """One bar for each phase; those that are over stay."""

    def __init__(self, bars: "RichProgress") -> None:
        self._bars = bars
        self._task: TaskID | None = None

    def phase(self, name: str) -> None:
        self.end()
        self._task = self._bars.add_task(clean(name), total=None, figures="")

    def __call__(self, done: int, total: int, **fields: float | str) -> None:
        if self._task is None:
            self._task = self._bars.add_task("working", total=None, figures="")
        self._bars.update(
            self._task, completed=done, total=total, figures=format_fields(dict(fields))
        )

    def end(self) -> None:
        """Stop the running bar's clock; a phase that reported nothing is shown as done."""
        if self._task is None:
            return
        task = next(t for t in self._bars.tasks if t.id == self._task)
        total = task.total or 1
        self._bars.update(self._task, completed=total, total=total)
        self._task = None


@contextmanager
def reporting(first: str = "", *, transient: bool = False) -> Iterator[Reporter]:
    """Show progress while the work inside goes on.

    Args:
        first: Name of the first phase; empty if the work names it.
        transient: Leave nothing on the screen, and print nothing into a pipe.
    """
    if not sys.stdout.isatty():
        plain: Reporter = _Silent() if transient else _Plain()
        if first:
            plain.phase(first)
        yield plain
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
    )
    with Progress(*columns, transient=transient) as progress:
        bars = _Bars(progress)
        if first:
            bars.phase(first)
        yield bars
        bars.end()
