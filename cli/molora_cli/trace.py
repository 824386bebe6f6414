"""`molora trace`: look at a decision trace, and check it with nothing but a public key."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["app"]

app = typer.Typer(help="Look at decision traces and check them.", no_args_is_help=True)

Trace = Annotated[Path, typer.Argument(help="Folder of a run, or the one file of a sealed run.")]
MAX_KEY_BYTES = 4_096


@app.command()
def verify(
    path: Trace,
    key: Annotated[Path, typer.Option(help="Public key that signed the run, PEM file.")],
    root: Annotated[
        str | None, typer.Option(help="Root kept elsewhere, hex: finds a run that was put back.")
    ] = None,
) -> None:
    """Check every record of a run; exits 1 and says where, if anything is wrong."""
    from molora_fed.tracing.verifying import verify as check

    report = check(path, _read_key(key), root)
    for note in report.notes:
        print(f"note  {note}")
    for problem in report.problems:
        print(f"wrong  {problem}")
    state = "sealed" if report.sealed else "open"
    print(
        f"run {report.run or '?'}  {state}  {report.records:,} records  covered {report.covered:,}"
    )
    print(f"root {report.root}")
    if not report.ok:
        raise typer.Exit(1)


def _read_key(path: Path) -> str:
    from molora_fed.errors import SignatureError

    try:
        with path.open("rb") as file:
            return file.read(MAX_KEY_BYTES + 1).decode("ascii")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "other bytes"
        raise SignatureError(
            f"Cannot use key '{path}': expected a public key in PEM form, got {reason}. "
            "Ask the coordinator for the run's key."
        ) from error
