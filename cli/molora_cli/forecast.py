"""`molora forecast`: what fusing will be worth, before it is done."""

import json
from pathlib import Path
from typing import Annotated

import typer

from molora_cli.output import show

app = typer.Typer(
    help="What fusing will be worth, before it is done.",
    invoke_without_command=True,
    rich_markup_mode=None,
)


@app.callback()
def forecast(
    context: typer.Context,
    matrix: Annotated[
        Path | None, typer.Option(help="JSON file of loss matrices in the published form.")
    ] = None,
    own_domain_only: Annotated[
        bool,
        typer.Option(
            "--own-domain-only", help="Read the base and each specialist on its own domain only."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Forecast the fusion gain with every registered predictor."""
    from molora_fed.errors import ConfigError
    from molora_fed.forecasting.matrices import load_runs
    from molora_fed.forecasting.whole_runs import forecast_runs
    from molora_fed.plugins import get_plugins
    from molora_fed.reporting.summary import build_run_forecast_table

    if context.invoked_subcommand is not None:
        return
    if matrix is None:
        raise ConfigError(
            "Cannot forecast: expected something to forecast from, got none. Pass --matrix FILE."
        )
    found = forecast_runs(load_runs(matrix, own_domain_only=own_domain_only), get_plugins())
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        show(*(build_run_forecast_table(run) for run in found["runs"]))
