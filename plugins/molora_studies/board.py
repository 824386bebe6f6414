"""Progress of a study: a table of running tasks on a terminal, a line for each task elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from molora_cli.progress import PLAIN_SECONDS, format_fields

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

    from molora_studies.framework.contract import Task
    from molora_studies.framework.runner import Failure, Listener, Running, State

__all__ = ["format_minutes", "watching_study"]


def format_minutes(seconds: float) -> str:
    """A time estimate: seconds below two minutes, minutes above."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _format_head(state: "State") -> str:
    parts = [f"{len(state.done)}/{len(state.tasks)} tasks"]
    if state.failures:
        parts.append(f"{len(state.failures)} failed, {len(state.skipped)} left out")
    if state.elsewhere:
        parts.append(f"{len(state.elsewhere)} done by another study")
    parts.append(f"ETA {format_minutes(state.seconds_left)}")
    return " · ".join(parts)


class _Plain:
    """A line when a task begins or ends, and the whole now and then."""

    def __init__(self) -> None:
        self._printed = time.monotonic()

    def started(self, task: "Task") -> None:
        print(f"started  {task.name}", flush=True)

    def ended(self, task: "Task", failure: "Failure | None") -> None:
        tail = f": {failure.message}" if failure else ""
        print(f"{'failed ' if failure else 'done   '}  {task.name}{tail}", flush=True)

    def update(self, state: "State") -> None:
        now = time.monotonic()
        if now - self._printed >= PLAIN_SECONDS:
            self._printed = now
            print(_format_head(state), flush=True)


class _Table:
    """Running tasks with their own progress under one line for the whole."""

    def __init__(self, title: str, live: "Live") -> None:
        self._title = title
        self._live = live

    def started(self, task: "Task") -> None:
        pass

    def ended(self, task: "Task", failure: "Failure | None") -> None:
        if failure:
            self._live.console.print(f"failed  {task.name}: {failure.message}", markup=False)

    def update(self, state: "State") -> None:
        self._live.update(self._build(state))

    def _build(self, state: "State") -> "RenderableType":
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        table.add_column("task", no_wrap=True)
        table.add_column("progress", justify="right", no_wrap=True)
        table.add_column("time", justify="right", no_wrap=True)
        table.add_column("figures", overflow="ellipsis", no_wrap=True)
        for job in state.running:
            table.add_row(
                Text(job.task.name),
                f"{job.done}/{job.total}" if job.total else "",
                _format_clock(job),
                Text(format_fields(dict(job.fields))),
            )
        return Group(Text(f"{self._title}: {_format_head(state)}"), table)


def _format_clock(job: "Running") -> str:
    minutes, seconds = divmod(int(time.monotonic() - job.started), 60)
    return f"{minutes}:{seconds:02d}"


@contextmanager
def watching_study(title: str) -> Iterator["Listener"]:
    """Show a run on standard output while it goes on.

    Args:
        title: Of the table.
    """
    if not sys.stdout.isatty():
        yield _Plain()
        return
    from rich.live import Live

    with Live(refresh_per_second=4, transient=True) as live:
        yield _Table(title, live)
