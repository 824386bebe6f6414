"""Forecasts as records: written before the outcome is known, scored once after it.

A record keeps the losses it was made from, so that anyone can make it again.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, get_args

from molora_fed.errors import ConfigError
from molora_fed.plugins import Plugins
from molora_fed.types import Forecast, LossMatrix, Reference

__all__ = ["ForecastRecord", "make_forecasts", "parse_record", "score_forecasts"]


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
        actual: The gain that came out, percent against `forecast.reference`; None before.
    """

    predictor: str
    origin: str
    router: str
    forecast: Forecast
    losses: LossMatrix
    created: str
    actual: float | None = None

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
            "note": self.forecast.note,
            "created": self.created,
        }

    def to_json(self) -> dict[str, Any]:
        """JSON values that `parse_record` reads back."""
        value = asdict(self)
        value["losses"]["domains"] = list(self.losses.domains)
        return value


def parse_record(value: Mapping[str, Any]) -> ForecastRecord:
    """Read what `ForecastRecord.to_json` wrote.

    Raises:
        ConfigError: If a field is missing, unknown or of the wrong kind.
    """
    try:
        fields = dict(value)
        losses = dict(fields.pop("losses"))
        matrix = LossMatrix(domains=tuple(losses.pop("domains")), **losses)
        forecast = Forecast(**fields.pop("forecast"))
        if forecast.reference not in get_args(Reference):
            raise ValueError(f"reference {forecast.reference!r}")
        return ForecastRecord(forecast=forecast, losses=matrix, **fields)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"Cannot read a forecast record: expected the fields of a ForecastRecord, got {error}. "
            "Make the forecast again."
        ) from error


def make_forecasts(
    matrix: LossMatrix, router: str, plugins: Plugins, *, now: datetime | None = None
) -> list[ForecastRecord]:
    """Ask every registered gain predictor, before the outcome is known.

    Args:
        matrix: Losses from calibration data or contributors' own; never held-out.
        router: The router whose gain is predicted.
        plugins: Where the predictors are registered.
        now: Time of the forecast; the present if None.

    Returns:
        One record for each predictor that applies, sorted by its name.

    Raises:
        PluginError: If a predictor breaks its contract.
    """
    created = (now or datetime.now(UTC)).isoformat(timespec="seconds")
    records = []
    for entry in plugins.gain_predictors:
        forecast = plugins.gain_predictors.resolve(entry.name)(matrix)
        if forecast is not None:
            records.append(
                ForecastRecord(entry.name, entry.origin, router, forecast, matrix, created)
            )
    return records


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
