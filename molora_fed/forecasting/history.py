"""Forecasts that were recorded or made of whole runs, and how good they were.

Records lie in the ledgers of cooperatives and in the `forecasts.json` that every fusion writes.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from molora_fed.charter import FusionRules
from molora_fed.contributions.reading import LedgerReader
from molora_fed.errors import ConfigError
from molora_fed.forecasting.divergence import compute_reference_losses
from molora_fed.forecasting.headline import choose_headline
from molora_fed.forecasting.matrices import MatrixRun
from molora_fed.forecasting.pilots import PilotRecord
from molora_fed.forecasting.records import CALIBRATION, ForecastRecord, ask_predictors, parse_record
from molora_fed.forecasting.scoring import Score, ScoredForecast, score_all
from molora_fed.plugins import Plugins
from molora_fed.types import Case, Forecast, LossMatrix, Outcome, Reference

__all__ = [
    "History",
    "build_history",
    "collect_outcomes",
    "collect_pilot_records",
    "describe_forecast",
    "find_records",
    "forecast_runs",
    "restate_against_best_specialist",
]


LEDGER_FILE = "ledger.db"
RECORDS_FILE = "forecasts.json"
MAX_BYTES = 64 * 2**20
_DEPTH = 4


@dataclass(frozen=True)
class History:
    """What became of recorded forecasts.

    Attributes:
        scored: Forecasts with an outcome, by predictor and stage.
        scores: Their scores, by the same.
        waiting: Number of forecasts without an outcome.
    """

    scored: dict[tuple[str, str], list[ScoredForecast]]
    scores: dict[tuple[str, str], Score]
    waiting: int

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "predictors": [
                {"predictor": name, "stage": stage, **score.to_json()}
                for (name, stage), score in self.scores.items()
            ],
            "waiting": self.waiting,
        }


def find_records(paths: Iterable[Path]) -> list[ForecastRecord]:
    """Read all recorded forecasts, in the order in which they were made.

    Args:
        paths: Cooperatives, folders of fusions, or folders that hold such, up to four levels deep.

    Returns:
        Records with their outcome where there is one; one found twice is read once.

    Raises:
        ConfigError: If a path does not exist or holds none, or a record is malformed.
        LedgerError: If a ledger cannot be read.
    """
    found: dict[str, ForecastRecord] = {}
    for path in paths:
        records = [record for source in _find_sources(path) for record in _read(source)]
        if not records:
            raise ConfigError(
                f"Cannot read forecasts of '{path}': expected a cooperative, a fusion's folder or "
                "a folder with such in it, got no recorded forecast there. Check the path."
            )
        for record in records:
            key = json.dumps(replace(record, actual=None).to_json(), sort_keys=True)
            if key not in found or found[key].actual is None:
                found[key] = record
    return sorted(found.values(), key=lambda record: (record.created, record.predictor))


def _find_sources(path: Path) -> list[Path]:
    patterns = ["/".join(["*"] * depth) for depth in range(1, _DEPTH + 1)]
    folders = [path, *(inner for p in patterns for inner in sorted(path.glob(p)))]
    files = [folder / name for folder in folders for name in (LEDGER_FILE, RECORDS_FILE)]
    return [file for file in files if file.is_file()]


def _read(source: Path) -> list[ForecastRecord]:
    if source.name == LEDGER_FILE:
        with LedgerReader(source) as ledger:
            records, identity = ledger.records("forecast"), ledger.identity_hash
        read = []
        for record in records:
            parsed = parse_record(record.data)
            group = parsed.group or identity
            outcome = record.outcome
            actual = None if outcome is None else outcome.get("actual")
            read.append(replace(parsed, group=group, actual=actual))
        return read
    try:
        if source.stat().st_size > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        values = json.loads(source.read_bytes())
        if not isinstance(values, list):
            raise ValueError(type(values).__name__)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"Cannot read forecasts of '{source}': expected a JSON list of records, got {error}. "
            "Fuse again, or leave the folder out."
        ) from error
    # An earlier version kept no group: the folder stands for its cooperative.
    parsed_all = [parse_record(value) for value in values]
    return [replace(r, group=r.group or str(source.parent.resolve())) for r in parsed_all]


def build_history(records: Sequence[ForecastRecord]) -> History:
    """Score recorded forecasts by predictor and stage.

    Of one predictor's forecasts at one stage from the same losses, made again by an interrupted
    run, the first counts.
    """
    scored: dict[tuple[str, str], list[ScoredForecast]] = {}
    seen = set()
    for record in records:
        if record.actual is None:
            continue
        repeated = json.dumps(
            [record.predictor, record.stage, record.router, record.group,
             record.to_json()["losses"], record.actual],
            sort_keys=True,
        )  # fmt: skip
        if repeated in seen:
            continue
        seen.add(repeated)
        forecast = record.forecast
        scored.setdefault((record.predictor, record.stage), []).append(
            ScoredForecast(
                record.group, forecast.point, forecast.low, forecast.high, forecast.level,
                record.actual,
            )
        )  # fmt: skip
    ordered = dict(sorted(scored.items()))
    return History(
        scored=ordered,
        scores={key: score_all(found) for key, found in ordered.items()},
        waiting=sum(record.actual is None for record in records),
    )


def collect_outcomes(records: Sequence[ForecastRecord]) -> list[Outcome]:
    """Past outcomes that the scored records of fusions tell of, as evidence for new forecasts."""
    return [outcome for _, outcome in _collect(records, CALIBRATION)]


def collect_pilot_records(records: Sequence[ForecastRecord]) -> list[PilotRecord]:
    """Past pilots with the final losses and the gain of their cooperative's fusion.

    Only cooperatives whose pilots, final losses and gain were all recorded tell of it.
    """
    finals = {outcome.case.group: outcome for _, outcome in _collect(records, CALIBRATION)}
    latest = {record.group: record for record, _ in _collect(records, "pilots")}
    return [
        PilotRecord(record.pilots, record.share, finals[group])
        for group, record in latest.items()
        if record.pilots is not None and record.share is not None and group in finals
    ]


def _collect(records: Sequence[ForecastRecord], stage: str) -> list[tuple[ForecastRecord, Outcome]]:
    """Scored cases of a stage, each with one of its records; final ones with both gains."""
    gains: dict[str, dict[Reference, float]] = {}
    cases: dict[str, ForecastRecord] = {}
    for record in records:
        if record.actual is None or record.stage != stage:
            continue
        key = json.dumps([record.group, record.router, record.to_json()["losses"]], sort_keys=True)
        cases[key] = record
        gains.setdefault(key, {})[record.forecast.reference] = record.actual
    return [
        (cases[key], Outcome(Case(cases[key].losses, cases[key].group), found))
        for key, found in gains.items()
        if stage != CALIBRATION or set(found) >= {"best_alone", "best_specialist"}
    ]


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
    runs: Sequence[MatrixRun],
    plugins: Plugins,
    *,
    past: Sequence[Outcome] = (),
    headline: Sequence[str] = FusionRules().headline,
) -> dict[str, Any]:
    """What every registered predictor says of every run, in percent against the best specialist.

    Args:
        runs: Runs; their fused losses are not read.
        plugins: Where the predictors are registered.
        past: Outcomes known before; those of a run's own group are never used for it.
        headline: Predictors of the headline; what a charter means that names none.

    Returns:
        `{"runs": [{"condition": ..., "headline": {...}, "forecasts": {predictor: {...}}}]}`; the
        headline's `claims` are against each predictor's own reference.
    """
    found = []
    for run in runs:
        said = ask_predictors(run.case, past, plugins)
        forecasts = {
            name: describe_forecast(
                None
                if forecast is None
                else restate_against_best_specialist(forecast, run.case.losses)
            )
            for name, forecast in said.items()
        }
        chosen = choose_headline(headline, said, run.case, plugins)
        claims = {name: describe_forecast(said[name]) for name in chosen.predictors}
        found.append(
            {
                "condition": run.condition,
                "headline": {**chosen.to_json(), "claims": claims},
                "forecasts": forecasts,
            }
        )
    return {"runs": found}
