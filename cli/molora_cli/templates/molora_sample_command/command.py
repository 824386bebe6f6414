"""The command: its arguments are the function's, as in any Typer program."""

from pathlib import Path
from typing import Annotated

import typer


def run(
    cooperative: Annotated[Path, typer.Argument(help="A cooperative's folder.")],
    upper: Annotated[bool, typer.Option(help="In capital letters.")] = False,
) -> None:
    """Show the domains of a cooperative: the one function to fill in.

    An error that derives from `molora_fed.MoloraError` ends the command with one line.

    See docs/hooks/commands.md.
    """
    # Imported here, so that `--help` stays fast.
    from molora_fed.charter import load_charter

    for domain in load_charter(cooperative).amendment.domains:
        print(domain.upper() if upper else domain)
