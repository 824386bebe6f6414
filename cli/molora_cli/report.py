"""`molora report`: draw a report again."""

from pathlib import Path
from typing import Annotated

import typer

from molora_cli.output import show


def report(
    folder: Annotated[
        Path, typer.Argument(help="Folder with report.json, or one whose report/ has it.")
    ],
) -> None:
    """Draw the page and figures of a report again, from its report.json."""
    from molora_fed.reporting.report import find_report, load_report, read_metrics, write_report
    from molora_fed.reporting.summary import build_summary

    path = find_report(folder)
    result = load_report(path)
    page = write_report(result, read_metrics(path.parent), path.parent)
    show(build_summary(result))
    print(f"report  {page}")
