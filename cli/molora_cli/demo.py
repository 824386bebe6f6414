"""`molora demo`: a whole federation on this machine."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    domains: Annotated[
        str, typer.Option(help="Built-in domains, separated by commas; four if not given.")
    ] = "",
    contributors: Annotated[
        int | None, typer.Option(min=2, help="Number of contributors; one a domain if not given.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps of a specialist.")
    ] = None,
    kind: Annotated[str | None, typer.Option(help="Adapter kind.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 42,
    out: Annotated[Path, typer.Option(help="Folder for everything the run makes.")] = Path("demo"),
    data: Annotated[
        list[str] | None,
        typer.Option(help="NAME=PATH: a contributor on your own files; repeatable."),
    ] = None,
) -> None:
    """Run a cooperative on this machine: server, contributors, fused model, report."""
    from molora_fed.demo import DemoOptions, run_demo

    from molora_fed.options import parse_data, parse_names

    run_demo(
        DemoOptions(
            domains=parse_names(domains) if domains else (),
            contributors=contributors,
            steps=steps,
            kind=kind,
            seed=seed,
            out=out,
            data=parse_data(data or []),
        )
    )
