"""`molora forecast`: what fusing will be worth, before it is done; and how good forecasts were."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from molora_cli.output import show
from molora_cli.progress import reporting

if TYPE_CHECKING:
    from molora_fed.forecasting.records import ForecastRecord

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
    cooperative: Annotated[
        Path | None, typer.Option(help="A cooperative's folder; its ledger keeps the forecasts.")
    ] = None,
    contribution: Annotated[
        list[Path] | None,
        typer.Option(help="Folder that `molora train` wrote; repeatable; all admitted if none."),
    ] = None,
    pilot: Annotated[
        list[Path] | None,
        typer.Option(help="The same, after at most 10 % of the planned steps; repeatable."),
    ] = None,
    past: Annotated[
        list[Path] | None,
        typer.Option(help="Cooperative or fusion whose scored forecasts are evidence; repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Forecast the fusion gain with every registered predictor.

    From loss matrices (--matrix); before fusing, from what contributors state (--cooperative);
    or before training, from short pilots (--cooperative with --pilot).
    """
    if context.invoked_subcommand is not None:
        return
    from molora_fed.errors import ConfigError
    from molora_fed.forecasting.history import find_records
    from molora_fed.reporting.summary import build_run_forecast

    if (matrix is None) == (cooperative is None) or (contribution and pilot):
        got = "neither" if matrix is None and cooperative is None else "too many"
        raise ConfigError(
            "Cannot forecast: expected --matrix FILE, or --cooperative FOLDER with either "
            f"--contribution or --pilot, got {got}. See `molora forecast --help`."
        )
    records = find_records(past or ())
    found: dict[str, Any] = {"runs": []}
    if cooperative is not None:
        found = _forecast_cooperative(cooperative, contribution or [], pilot or [], records)
    elif matrix is not None:
        found = _forecast_matrices(matrix, own_domain_only, records)
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        show(*(build_run_forecast(run) for run in found["runs"]))


def _forecast_matrices(
    matrix: Path, own_domain_only: bool, records: "list[ForecastRecord]"
) -> dict[str, Any]:
    from molora_fed.forecasting.history import collect_outcomes, forecast_runs
    from molora_fed.forecasting.matrices import load_runs
    from molora_fed.plugins import get_plugins

    runs = load_runs(matrix, own_domain_only=own_domain_only)
    return forecast_runs(runs, get_plugins(), past=collect_outcomes(records))


def _forecast_cooperative(
    folder: Path,
    contributions: list[Path],
    pilots: list[Path],
    records: "list[ForecastRecord]",
) -> dict[str, Any]:
    from molora_fed.cooperative.cooperative import open_cooperative
    from molora_fed.cooperative.forecast import forecast_from_contributions, forecast_from_pilots
    from molora_fed.forecasting.history import describe_forecast

    opened = open_cooperative(folder)
    if pilots:
        with reporting("measuring the pilots") as progress:
            made = forecast_from_pilots(opened, pilots, past=records, progress=progress)
    else:
        made = forecast_from_contributions(opened, contributions, past=records)
    name = f"{opened.charter.identity.name}, from {made.basis}"
    forecasts = {who: describe_forecast(None, why) for who, why in made.missing.items()}
    forecasts |= {record.predictor: describe_forecast(record.forecast) for record in made.records}
    claims = {name: forecasts[name] for name in made.headline.predictors}
    headline = {**made.headline.to_json(), "claims": claims}
    run = {"condition": name, "headline": headline, "forecasts": dict(sorted(forecasts.items()))}
    return {"runs": [run]}


@app.command("history")
def history(
    folders: Annotated[
        list[Path], typer.Argument(help="Cooperatives, fusions, or folders that hold such.")
    ],
    figure: Annotated[Path | None, typer.Option(help="PNG file to draw.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """How good recorded forecasts were: coverage, error, bias, interval score."""
    from molora_fed.forecasting.history import build_history, find_records
    from molora_fed.reporting.summary import build_history_table
    from molora_fed.storage.files import write_bytes

    found = build_history(find_records(folders))
    if figure is not None:
        from molora_fed.reporting.figures import draw_history

        write_bytes(figure, draw_history(found))
    if as_json:
        print(json.dumps(found.to_json(), indent=2, allow_nan=False))
        return
    show(build_history_table(found.to_json()))
    if found.waiting:
        print(f"{found.waiting} forecasts wait for their outcome.")
    if figure is not None:
        print(f"figure  {figure}")
