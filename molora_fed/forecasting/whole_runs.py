"""Forecasts of loss matrices that someone else measured, all against the best specialist."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from molora_fed.forecasting.divergence import compute_reference_losses
from molora_fed.forecasting.matrices import MatrixRun
from molora_fed.forecasting.records import ask_predictors
from molora_fed.plugins import Plugins
from molora_fed.types import Forecast, LossMatrix, Outcome

__all__ = ["describe_forecast", "forecast_runs", "restate_against_best_specialist"]

_NO_FORECAST: Mapping[str, Any] = {"point": None, "low": None, "high": None, "level": None}


def restate_against_best_specialist(forecast: Forecast, losses: LossMatrix) -> Forecast:
    """A forecast in percent against the best specialist.

    Exact where the losses of specialists off their domains are known. Else the best specialist is
    taken to be no worse than the base, as in every published run, and the note says so.
    """
    if forecast.reference == "best_specialist":
        return forecast
    known = all(set(losses.domains) <= set(row) for row in losses.specialists.values())
    note = f"{forecast.note} Taken as if the best specialist were no worse than the base."
    ratio = 1.0
    if known:
        references = compute_reference_losses(losses)
        ratio = references["best_alone"] / references["best_specialist"]
        note = forecast.note
    ends = {
        name: None if value is None else 100.0 - (100.0 - value) * ratio
        for name, value in (
            ("point", forecast.point),
            ("low", forecast.low),
            ("high", forecast.high),
        )
    }
    return replace(forecast, reference="best_specialist", note=note, **ends)


def describe_forecast(forecast: Forecast | None) -> dict[str, Any]:
    """JSON values of a forecast; nulls where a predictor does not apply."""
    if forecast is None:
        note = "The losses it needs are not given."
        return {**_NO_FORECAST, "reference": None, "floor": None, "verdict": None, "note": note}
    return {
        "point": forecast.point,
        "low": forecast.low,
        "high": forecast.high,
        "level": forecast.level,
        "reference": forecast.reference,
        "floor": forecast.floor,
        "verdict": forecast.verdict,
        "note": forecast.note,
    }


def forecast_runs(
    runs: Sequence[MatrixRun], plugins: Plugins, *, past: Sequence[Outcome] = ()
) -> dict[str, Any]:
    """What every registered predictor says of every run, in percent against the best specialist.

    Args:
        runs: Runs; their fused losses are not read.
        plugins: Where the predictors are registered.
        past: Outcomes known before; those of a run's own group are never used for it.

    Returns:
        `{"runs": [{"condition": ..., "forecasts": {predictor: {...}}}]}`.
    """
    found = []
    for run in runs:
        forecasts = {
            name: describe_forecast(
                None
                if forecast is None
                else restate_against_best_specialist(forecast, run.case.losses)
            )
            for name, forecast in ask_predictors(run.case, past, plugins).items()
        }
        found.append({"condition": run.condition, "forecasts": forecasts})
    return {"runs": found}
