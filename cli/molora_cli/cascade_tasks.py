"""`molora cascade tasks`: tasks with known answers, from the registered families."""

from pathlib import Path
from typing import Annotated

import typer

from molora_cli.output import show


def tasks(
    out: Annotated[Path, typer.Option(help="Tasks file to write, one JSON object a line.")],
    families: Annotated[
        str, typer.Option(help="Families, separated by commas; all if not given.")
    ] = "",
    levels: Annotated[str, typer.Option(help="Levels, separated by commas.")] = "1,2",
    count: Annotated[int, typer.Option(min=1, help="Tasks of each family and level.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the tasks.")] = 42,
    split: Annotated[
        str, typer.Option(help="test, calibration, validation or train; never share a prompt.")
    ] = "test",
) -> None:
    """Write tasks with known answers; the same options write the same file."""
    from molora_fed.cascade.contract import draw_tasks, parse_levels
    from molora_fed.cascade.task_files import save_tasks
    from molora_fed.plugins import get_plugins

    plugins = get_plugins()
    names = [name.strip() for name in families.split(",") if name.strip()]
    drawn = draw_tasks(
        names or plugins.task_families.names(),
        parse_levels(levels),
        count=count,
        seed=seed,
        split=split,
        plugins=plugins,
    )
    save_tasks(drawn, out)
    show(f"wrote {len(drawn)} tasks to {out}")
