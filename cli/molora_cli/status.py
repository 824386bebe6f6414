"""`molora status`: where a cooperative or a contributor stands, from its home's files."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from molora_cli.live import format_progress
from molora_cli.output import format_time, print_columns
from molora_fed.storage.untrusted import clean

if TYPE_CHECKING:
    from collections.abc import Callable

    from molora_fed.federation.overview import ContributorOverview, MemberRow, ServerOverview

    Overview = TypeVar("Overview", ServerOverview, ContributorOverview)

MAX_MESSAGE = 500


def status(
    home: Annotated[Path, typer.Argument(help="Folder of a cooperative or of a contributor.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="All of it as JSON, for programs.")
    ] = False,
) -> None:
    """Show members, states, bytes, when each was last seen, and what is waited for.

    Reads the folder only: it works whether or not anything runs, and disturbs nothing.
    """
    from molora_fed.federation.homes import CoordinatorHome
    from molora_fed.federation.overview import open_home, read_contributor, read_server

    opened = open_home(home)
    if isinstance(opened, CoordinatorHome):
        _show(read_server(opened), _show_server, as_json=as_json)
    else:
        _show(read_contributor(opened), _show_contributor, as_json=as_json)


def _show(overview: "Overview", show: "Callable[[Overview], None]", *, as_json: bool) -> None:
    if as_json:
        value = {
            **asdict(overview),
            "problems": overview.problems,
            "waiting_for": overview.list_awaited(),
        }
        print(json.dumps(value, default=_describe_value, indent=2, sort_keys=True))
        return
    show(overview)
    _show_list("problem", overview.problems)
    _show_list("waiting for", overview.list_awaited())


def _describe_value(value: object) -> object:
    from pydantic import BaseModel

    return value.model_dump() if isinstance(value, BaseModel) else str(value)


def _show_server(overview: "ServerOverview") -> None:
    _show_line("cooperative", f"{overview.name}, amendment {overview.amendment}")
    _show_line("identity", overview.identity)
    _show_line("privacy", overview.privacy)
    running = f"runs, {overview.nodes} connected" if overview.is_running else "not running"
    _show_line("server", f"{overview.address}, {running}")
    _show_line("phase", format_progress(overview.state))
    _show_line("disk", f"{overview.free_bytes / 1e9:.1f} GB free")
    if overview.members:
        now = time.time()
        header = ("name", "domain", "standing", "connected", "phase", "seen", "got", "sent")
        print_columns(
            header,
            [_build_row(row, now if overview.is_running else math.inf) for row in overview.members],
        )
        troubled = [row for row in overview.members if row.event and row.event.problem]
        _show_list("member", [f"{row.name}: {row.event.message}" for row in troubled if row.event])


def _build_row(row: "MemberRow", now: float) -> tuple[str, ...]:
    phase = "" if row.event is None else format_progress(row.event)
    seen = format_time(int(row.seen.last)) if row.seen.last else ""
    if row.until:
        phase = f"until {format_time(row.until)}"
    return (
        row.name,
        row.domain,
        row.standing,
        "yes" if row.is_connected(now) else "no",
        clean(phase, 80),
        seen,
        _format_bytes(row.seen.received),
        _format_bytes(row.seen.sent),
    )


def _show_contributor(overview: "ContributorOverview") -> None:
    _show_line("contributor", f"{overview.name}, domain {overview.domain}")
    _show_line("cooperative", overview.cooperative or "not known yet")
    if overview.privacy:
        _show_line("privacy", overview.privacy)
    seen = f"last heard {format_time(int(overview.seen.last))}" if overview.seen.last else ""
    _show_line("server", ", ".join(filter(None, (overview.server or "on this machine", seen))))
    _show_line("running", "yes" if overview.is_running else "no")
    _show_line("phase", format_progress(overview.state))
    if overview.contribution:
        _show_line("contribution", f"{overview.contribution}, {overview.state.state}")
    received, sent = _format_bytes(overview.seen.received), _format_bytes(overview.seen.sent)
    _show_line("files", f"{received} received, {sent} sent")
    _show_line("disk", f"{overview.free_bytes / 1e9:.1f} GB free")
    if overview.result is not None:
        _show_line("result", str(overview.result))
    _show_list("warning", overview.warnings)
    _show_list("refused", overview.refusals)


def _format_bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def _show_line(what: str, text: str) -> None:
    print(f"{what:<13}{clean(text, MAX_MESSAGE)}")


def _show_list(what: str, lines: Sequence[str]) -> None:
    for line in lines:
        _show_line(what, line)
