"""`molora doctor`: what is wrong on this machine."""

from pathlib import Path
from typing import Annotated

import typer

from molora_cli.output import MAX_LINE
from molora_fed.storage.untrusted import clean


def doctor(
    home: Annotated[
        Path | None, typer.Argument(help="Folder of a cooperative or a contributor, if any.")
    ] = None,
) -> None:
    """Look for what is wrong: versions, plugins, disk, rights, ports, certificate, clock, server.

    Changes nothing. The exit code is 1 if there is a problem.
    """
    from molora_fed.federation.doctor import examine
    from molora_fed.federation.overview import open_home
    from molora_fed.plugins import get_plugins

    problems = 0
    for found in examine(None if home is None else open_home(home), get_plugins()):
        mark = "problem" if found.is_problem else "ok"
        print(f"{mark:<9}{found.subject:<13}{clean(found.message, MAX_LINE)}")
        problems += found.is_problem
    if problems:
        raise typer.Exit(1)
