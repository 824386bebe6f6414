"""Forecasts as records: written before the outcome is known, scored once after it.

A record keeps the losses it was made from, so that anyone can make it again.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, get_args

from molora_fed.errors import ConfigError
from molora_fed.forecasting.matrices import leave_out_group
from molora_fed.plugins import Plugins
from molora_fed.types import Case, Forecast, LossMatrix, Outcome, Reference

__all__ = [
    "ForecastRecord",
    "ask_predictors",
    "make_forecasts",
    "parse_record",
    "score_forecasts",
]

CALIBRATION = "calibration"


@dataclass(frozen=True)
class ForecastRecord:
    """One predictor's claim about one router, and what became of it.

    Attributes:
        predictor: Registered name of the gain predictor.
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
        if forecast.reference not in get_args(Reference):
            raise ValueError(f"reference {forecast.reference!r}")
        return ForecastRecord(forecast=forecast, losses=matrix, **fields)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"Cannot read a forecast record: expected the fields of a ForecastRecord, got {error}. "
            "Make the forecast again."
        ) from error


def _parse_matrix(value: Mapping[str, Any]) -> LossMatrix:
    fields = dict(value)
    return LossMatrix(domains=tuple(fields.pop("domains")), **fields)


def ask_predictors(
    case: Case, past: Sequence[Outcome], plugins: Plugins
) -> dict[str, Forecast | None]:
    """What every registered gain predictor says of a case, by its name.

    Args:
        case: What to forecast.
        past: Outcomes known before; those of the case's own group are left out here.
        plugins: Where the predictors are registered.

    Returns:
        Forecasts sorted by name; None from predictors that do not apply.

    Raises:
        PluginError: If a predictor breaks its contract.
    """
    others = leave_out_group(case, past)
    return {
        entry.name: plugins.gain_predictors.resolve(entry.name)(case, others)
        for entry in plugins.gain_predictors
    }


def make_forecasts(
    case: Case,
    router: str,
    plugins: Plugins,
    *,
    past: Sequence[Outcome] = (),
    stage: str = CALIBRATION,
    share: float | None = None,
    now: datetime | None = None,
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

    Returns:
        One record for each predictor that applies, sorted by its name.

    Raises:
        PluginError: If a predictor breaks its contract.
    """
    created = (now or datetime.now(UTC)).isoformat(timespec="seconds")
    return [
        ForecastRecord(
            predictor=name,
            origin=plugins.gain_predictors.entry(name).origin,
            router=router,
            forecast=forecast,
            losses=case.losses,
            created=created,
            group=case.group,
            pilots=case.pilots,
            stage=stage,
            share=share,
        )
        for name, forecast in ask_predictors(case, past, plugins).items()
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
