"""Forecasts that were recorded or made of whole runs, and how good they were.

Records lie in the ledgers of cooperatives and in the `forecasts.json` that every fusion writes.
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from molora_fed.charter import FusionRules
from molora_fed.contributions.ledger import Ledger
from molora_fed.contributions.reading import LedgerReader, LedgerRecord
from molora_fed.errors import ConfigError
from molora_fed.forecasting.divergence import compute_reference_losses
from molora_fed.forecasting.headline import choose_headline
from molora_fed.forecasting.matrices import MatrixRun
from molora_fed.forecasting.pilots import PilotRecord
from molora_fed.forecasting.records import (
    CALIBRATION,
    NOT_GIVEN,
    ForecastRecord,
    ask_predictors,
    parse_record,
)
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
    "read_forecasts",
    "restate_against_best_specialist",
    "retract_malformed",
]

_LOG = logging.getLogger(__name__)


LEDGER_FILE = "ledger.db"
RECORDS_FILE = "forecasts.json"
MAX_BYTES = 64 * 2**20
FORECAST, RETRACTION = "forecast", "retraction"
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
        ConfigError: If a path does not exist or holds none.
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
            records, identity = read_forecasts(ledger), ledger.identity_hash
        read = []
        for record, parsed in records:
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
    group = str(source.parent.resolve())
    parsed_all = []
    for number, value in enumerate(values, start=1):
        try:
            parsed = parse_record(value)
            parsed_all.append(replace(parsed, group=parsed.group or group))
        except ConfigError as error:
            _LOG.warning("Left out record %d of '%s': %s Fuse again.", number, source, error)
    return parsed_all


def read_forecasts(ledger: LedgerReader) -> list[tuple[LedgerRecord, ForecastRecord]]:
    """Forecasts of a ledger in the order in which they were made, those that can be read.

    One that cannot be read, of an earlier version, is left out with a warning that names its
    number; once it is retracted, without one. A retraction takes back no readable forecast.
    """
    read, malformed = _read_forecasts(ledger)
    for number, reason in malformed.items():
        _LOG.warning(
            "Left out forecast record %d of ledger '%s': %s Retract it with `molora coop repair`.",
            number, ledger.path, reason,
        )  # fmt: skip
    return read


def retract_malformed(ledger: Ledger, *, actor: str) -> dict[int, str]:
    """Add a retraction for each forecast that cannot be read; nothing is changed or deleted.

    Args:
        ledger: Open for writing.
        actor: Who does this, for the history.

    Returns:
        Why each could not be read, by the number of its record; empty if there was none.
    """
    malformed = _read_forecasts(ledger)[1]
    for number, reason in malformed.items():
        ledger.add_record(RETRACTION, {"record": number, "reason": reason}, actor=actor)
    return malformed


def _read_forecasts(
    ledger: LedgerReader,
) -> tuple[list[tuple[LedgerRecord, ForecastRecord]], dict[int, str]]:
    """What can be read, and why the others cannot, by number, unless they are retracted."""
    retracted = {record.data.get("record") for record in ledger.records(RETRACTION)}
    read, malformed = [], {}
    for record in ledger.records(FORECAST):
        try:
            read.append((record, parse_record(record.data)))
        except ConfigError as error:
            if record.number not in retracted:
                malformed[record.number] = str(error)
    return read, malformed


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


def describe_forecast(forecast: Forecast | None, why: str = NOT_GIVEN) -> dict[str, Any]:
    """JSON values of a forecast; nulls where there is none.

    Args:
        forecast: What a predictor said.
        why: Why it said nothing, see `molora_fed.forecasting.records.ask_predictors`.
    """
    if forecast is None:
        return {**_NO_FORECAST, "reference": None, "floor": None, "verdict": None, "note": why}
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
        missing: dict[str, str] = {}
        said = ask_predictors(run.case, past, plugins, on_missing=missing.__setitem__)
        forecasts = {
            name: describe_forecast(None, missing[name])
            if forecast is None
            else describe_forecast(restate_against_best_specialist(forecast, run.case.losses))
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
