"""Forecasts as records: written before the outcome is known, scored once after it.

A record keeps the losses it was made from, so that anyone can make it again.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from molora_fed.errors import CharterError, ConfigError, PluginError
from molora_fed.forecasting.matrices import leave_out_group
from molora_fed.guard import guarded, refuse
from molora_fed.options import Choice, list_settings, open_choice
from molora_fed.plugins import Plugins, Registry
from molora_fed.types import Case, Forecast, LossMatrix, Outcome, Reference

__all__ = [
    "ForecastRecord",
    "ask_predictors",
    "make_forecasts",
    "parse_record",
    "score_forecasts",
]

CALIBRATION = "calibration"
NOT_GIVEN = "The losses it needs are not given."
"""Why a predictor that does not apply says nothing."""

FAILED = "failed: "
"""Beginning of the reason why a predictor that broke its contract says nothing."""


@dataclass(frozen=True)
class ForecastRecord:
    """One predictor's claim about one router, and what became of it.

    Attributes:
        predictor: Registered name of the gain predictor, or the label of one with options.
        origin: Distribution and version it came from.
        router: The router whose gain is predicted.
        forecast: The claim.
        losses: What it was made from; never held-out losses.
        created: When, ISO 8601 with time zone.
        group: The condition without its seed; empty in records of earlier versions.
        pilots: Losses after a small share of the steps, if it was made from these.
        stage: What was known: "pilots" before training, "contributions" before fusing, or
            "calibration" losses in a fusion before its routers are fitted.
        share: Share of the planned steps that the pilots had; None without pilots.
        actual: The gain that came out, percent against `forecast.reference`; None before.
    """

    predictor: str
    origin: str
    router: str
    forecast: Forecast
    losses: LossMatrix
    created: str
    actual: float | None = None
    group: str = ""
    pilots: LossMatrix | None = None
    stage: str = CALIBRATION
    share: float | None = None

    def score(self, actual: float) -> "ForecastRecord":
        """The record with its outcome.

        Args:
            actual: Gain in percent against the forecast's reference.

        Raises:
            ConfigError: If it has been scored before, or the outcome is not a number.
        """
        what = f"Cannot score forecast '{self.predictor}' of router '{self.router}'"
        if self.actual is not None:
            raise ConfigError(
                f"{what}: expected a forecast without an outcome, got {self.actual}. "
                "Keep the first score; make a new forecast for a new fusion."
            )
        if not math.isfinite(actual):
            raise ConfigError(
                f"{what}: expected a finite gain, got {actual}. Check the evaluation."
            )
        return replace(self, actual=float(actual))

    @property
    def is_inside(self) -> bool | None:
        """Whether the interval held; None before the outcome or without an interval."""
        low, high = self.forecast.low, self.forecast.high
        if self.actual is None or low is None or high is None:
            return None
        return low <= self.actual <= high

    def summary(self) -> dict[str, Any]:
        """The form of `report.json`: everything but the losses."""
        return {
            "reference": self.forecast.reference,
            "router": self.router,
            "point": self.forecast.point,
            "low": self.forecast.low,
            "high": self.forecast.high,
            "level": self.forecast.level,
            "actual": self.actual,
            "inside": self.is_inside,
            "floor": self.forecast.floor,
            "verdict": self.forecast.verdict,
            "stage": self.stage,
            "note": self.forecast.note,
            "created": self.created,
        }

    def to_json(self) -> dict[str, Any]:
        """JSON values that `parse_record` reads back."""
        value = asdict(self)
        for matrix in (value["losses"], value["pilots"]):
            if matrix is not None:
                matrix["domains"] = list(matrix["domains"])
        return value


def parse_record(value: Mapping[str, Any]) -> ForecastRecord:
    """Read what `ForecastRecord.to_json` wrote.

    Raises:
        ConfigError: If a field is missing, unknown or of the wrong kind.
    """
    try:
        fields = dict(value)
        matrix = _parse_matrix(fields.pop("losses"))
        pilots = fields.pop("pilots", None)
        fields["pilots"] = None if pilots is None else _parse_matrix(pilots)
        forecast = Forecast(**fields.pop("forecast"))
        record = ForecastRecord(forecast=forecast, losses=matrix, **fields)
        texts = (record.predictor, record.origin, record.router, record.created, record.stage)
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("a name that is no text")
        return record
    except ConfigError as error:
        raise ConfigError(f"Cannot read a forecast record: {error}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"Cannot read a forecast record: expected the fields of a ForecastRecord, got {error}. "
            "Make the forecast again."
        ) from error


def _parse_matrix(value: Mapping[str, Any]) -> LossMatrix:
    fields = dict(value)
    return LossMatrix(domains=tuple(fields.pop("domains")), **fields)


def ask_predictors(
    case: Case,
    past: Sequence[Outcome],
    plugins: Plugins,
    *,
    choices: Iterable[Choice] = (),
    on_missing: Callable[[str, str], None] = lambda name, why: None,
) -> dict[str, Forecast | None]:
    """What every registered gain predictor says of a case, by its name or label.

    Each gets copies of its own; one that fails takes nothing away from the others.

    Args:
        case: What to forecast.
        past: Outcomes known before; those of the case's own group are left out here.
        plugins: Where the predictors are registered.
        choices: Options of some, from a charter; one with a label is asked beside the predictor.
        on_missing: Told the name of each predictor that says nothing, and why: `NOT_GIVEN`, or
            `FAILED` and the failure in one line.

    Returns:
        Forecasts sorted by name; None from predictors that do not apply or failed.
    """
    others = leave_out_group(case, past)
    found: dict[str, Forecast | None] = {}
    for choice in list_settings(plugins.gain_predictors, choices):
        key = choice.key
        try:
            found[key] = _ask(choice, plugins.gain_predictors, case, others)
            if found[key] is None:
                on_missing(key, NOT_GIVEN)
        except (PluginError, CharterError) as error:
            found[key] = None
            on_missing(key, f"{FAILED}{error}")
    return found


def _ask(
    choice: Choice, registry: Registry, case: Case, past: Sequence[Outcome]
) -> Forecast | None:
    entry, place = registry.entry(choice.name), "forecasting"
    predict = open_choice(registry, choice, key="fusion.predictors")
    with guarded(entry, place):
        said = predict(*copy.deepcopy((case, past)))
    if said is not None and type(said) is not Forecast:
        raise refuse(entry, place, expected="a Forecast or None", got=type(said).__name__)
    return said


def make_forecasts(
    case: Case,
    router: str,
    plugins: Plugins,
    *,
    past: Sequence[Outcome] = (),
    stage: str = CALIBRATION,
    share: float | None = None,
    now: datetime | None = None,
    choices: Sequence[Choice] = (),
    on_missing: Callable[[str, str], None] = lambda name, why: None,
) -> list[ForecastRecord]:
    """Ask every registered gain predictor, before the outcome is known.

    Args:
        case: Losses from calibration data or contributors' own; never held-out.
        router: The router whose gain is predicted.
        plugins: Where the predictors are registered.
        past: Outcomes known before; those of the case's own group are left out.
        stage: What is known, see `ForecastRecord`.
        share: Share of the planned steps that the case's pilots had.
        now: Time of the forecast; the present if None.
        choices: See `ask_predictors`.
        on_missing: Told of each predictor without a forecast, see `ask_predictors`.

    Returns:
        One record for each predictor that applies, sorted by its name.
    """
    created = (now or datetime.now(UTC)).isoformat(timespec="seconds")
    registry = plugins.gain_predictors
    names = {choice.key: choice.name for choice in list_settings(registry, choices)}
    said = ask_predictors(case, past, plugins, choices=choices, on_missing=on_missing)
    return [
        ForecastRecord(
            predictor=key,
            origin=registry.entry(names[key]).origin,
            router=router,
            forecast=forecast,
            losses=case.losses,
            created=created,
            group=case.group,
            pilots=case.pilots,
            stage=stage,
            share=share,
        )
        for key, forecast in said.items()
        if forecast is not None
    ]


def score_forecasts(
    records: Iterable[ForecastRecord], gains: Mapping[str, Mapping[Reference, float]]
) -> list[ForecastRecord]:
    """Score records against measured gains.

    Args:
        records: Unscored records.
        gains: Gain in percent by router and reference.

    Raises:
        ConfigError: If a record's router was not measured, or a record has a score already.
    """
    scored = []
    for record in records:
        measured = gains.get(record.router)
        if measured is None:
            raise ConfigError(
                f"Cannot score forecast '{record.predictor}': expected a measured gain of router "
                f"'{record.router}', got {', '.join(sorted(gains)) or 'none'}. "
                "Evaluate that router."
            )
        scored.append(record.score(measured[record.forecast.reference]))
    return scored
