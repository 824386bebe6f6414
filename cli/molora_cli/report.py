"""`molora report`: draw a report again."""

from pathlib import Path
from typing import Annotated

import typer

from molora_cli.output import show


def report(
    folder: Annotated[
        Path,
        typer.Argument(help="Folder of an evolution, or with report.json in it or in its report/."),
    ],
) -> None:
    """Draw the page and figures of a fusion, or of an evolution, again."""
    from molora_fed.reporting.population import find_evolution, write_population_report

    evolution = find_evolution(folder)
    if evolution is not None:
        print(f"report  {write_population_report(evolution)}")
    if evolution is None or _has_fusion(folder):
        _draw_fusion(folder)


def _has_fusion(folder: Path) -> bool:
    from molora_fed.errors import ConfigError
    from molora_fed.reporting.report import find_report

    try:
        find_report(folder)
    except ConfigError:
        return False
    return True


def _draw_fusion(folder: Path) -> None:
    from molora_fed.reporting.report import find_report, load_report, read_metrics, write_report
    from molora_fed.reporting.summary import build_summary

    path = find_report(folder)
    result = load_report(path)
    page = write_report(result, read_metrics(path.parent), path.parent)
    show(build_summary(result))
    print(f"report  {page}")
