"""Forecasts scored leaving whole groups out: what the studies of forecasts share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from molora_kalavai.formulas import fit_law, mean_divergence, mean_over_group
from scipy.stats import linregress, t

from molora_fed.forecasting.intervals import fit_line
from molora_fed.forecasting.matrices import (
    Fit,
    fit_and_forecast,
    group_outcomes,
    leave_out_group,
)
from molora_fed.forecasting.scoring import Coverage, Score, ScoredForecast, score_all
from molora_fed.types import Case, Forecast, Outcome, Reference
from molora_studies.framework.contract import Figure, Table

__all__ = [
    "BASELINES",
    "Board",
    "GroupFit",
    "build_board",
    "fit_intercept",
    "fit_line_by_group",
    "show_coverage",
]

OURS = ("fitted", "forgetting")
"""Predictors from own-domain losses whose intervals are judged, both in every study."""
LAW = "kalavai-law"
INTERCEPT = "intercept only"
LINE = "line refitted"
_REFERENCE: Reference = "best_specialist"


def fit_intercept(groups: Sequence[Sequence[Outcome]]) -> Callable[[Case], float]:
    """The mean gain of past groups, whatever the case: what a forecast must beat."""
    mean = fmean(mean_over_group(group, lambda o: o.gains[_REFERENCE]) for group in groups)
    return lambda case: mean


BASELINES: Mapping[str, Fit] = {INTERCEPT: fit_intercept, LINE: fit_law}
"""Forecasts by fits that are no registered predictors: by the mean, and by the law's form."""


@dataclass(frozen=True)
class Board:
    """Scored forecasts of every predictor.

    Attributes:
        forecasts: By predictor, in the order of the outcomes that have a forecast.
        scores: By predictor.
    """

    forecasts: Mapping[str, Sequence[ScoredForecast]]
    scores: Mapping[str, Score]

    def to_json(self) -> dict[str, Any]:
        """Scores as JSON values."""
        return {name: score.to_json() for name, score in self.scores.items()}

    def build_table(self, title: str) -> Table:
        """Every predictor's scores."""
        return Table(
            title,
            (
                "predictor", "RMSE, pp", "bias, pp", "inside, runs", "inside, whole groups",
                "level", "mean width, pp", "interval score, pp",
            ),
            [
                (
                    name,
                    _show(score.rmse),
                    _show(score.bias, "+.2f"),
                    show_coverage(score.runs),
                    show_coverage(score.by_group),
                    "-" if score.level is None else f"{100 * score.level:.0f} %",
                    _show(score.width, ".1f"),
                    _show(score.interval_score),
                )
                for name, score in sorted(
                    self.scores.items(), key=lambda item: item[1].interval_score or 1e9
                )
            ],
        )  # fmt: skip

    def build_figure(self, name: str, caption: str, predictors: Sequence[str]) -> Figure:
        """Outcome against forecast with its interval, a panel a predictor."""
        return Figure(name, caption, lambda figure: _draw(figure, self.forecasts, predictors))


def build_board(
    outcomes: Sequence[Outcome],
    ask: Callable[[Outcome, Sequence[Outcome]], Mapping[str, Forecast | None]],
    choose: Callable[[Outcome], Sequence[Outcome]] | None = None,
) -> Board:
    """Score predictors and baselines on outcomes, each forecast without its own group.

    Args:
        outcomes: What came out.
        ask: What every predictor says of an outcome's case, given the evidence.
        choose: Evidence for an outcome; all outcomes of other groups by default.
    """
    forecasts: dict[str, list[ScoredForecast]] = {}
    for outcome in outcomes:
        others = choose(outcome) if choose else leave_out_group(outcome.case, outcomes)
        said = {name: f for name, f in ask(outcome, others).items() if f is not None}
        groups = group_outcomes(others)
        for name, fit in BASELINES.items():
            point, interval = fit_and_forecast(outcome.case, groups, fit, _REFERENCE)
            said[name] = Forecast(
                _REFERENCE, point, interval.low, interval.high, interval.level, name
            )
        for name, forecast in said.items():
            scored = ScoredForecast(
                outcome.case.group, forecast.point, forecast.low, forecast.high, forecast.level,
                outcome.gains[forecast.reference],
            )  # fmt: skip
            forecasts.setdefault(name, []).append(scored)
    return Board(forecasts, {name: score_all(found) for name, found in forecasts.items()})


@dataclass(frozen=True)
class GroupFit:
    """The law's form over group means.

    Attributes:
        slope: Percent of gain per percent of mean divergence.
        slope_low: Lower end of its 95 % interval (Student's t over groups).
        slope_high: Upper end.
        offset: Percent.
        r_squared: Share of the variance explained by the fit.
        q_squared: The same, each group forecast by the fit to the others.
        groups: Number of groups.
    """

    slope: float
    slope_low: float
    slope_high: float
    offset: float
    r_squared: float
    q_squared: float
    groups: int

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return dict(vars(self))

    def show(self) -> str:
        """As text."""
        return (
            f"gain = {self.slope:.2f} [{self.slope_low:.2f}, {self.slope_high:.2f}] x divergence "
            f"{self.offset:+.2f}, R2 {self.r_squared:.3f}, Q2 {self.q_squared:.3f} leaving one of "
            f"{self.groups} groups out"
        )


def fit_line_by_group(
    outcomes: Sequence[Outcome], reference: Reference = "best_specialist"
) -> GroupFit:
    """Fit gain on mean divergence over groups, and leave each group out in turn."""
    groups = group_outcomes(outcomes)
    inputs = [mean_over_group(group, lambda o: mean_divergence(o.case)) for group in groups]
    gains = [mean_over_group(group, lambda o: o.gains[reference]) for group in groups]
    found = linregress(inputs, gains)
    half = float(t.ppf(0.975, len(groups) - 2) * found.stderr)
    outside = sum(
        (gain - fit_line(_skip(inputs, i), _skip(gains, i))(inputs[i])) ** 2
        for i, gain in enumerate(gains)
    )
    total = sum((gain - fmean(gains)) ** 2 for gain in gains)
    return GroupFit(
        slope=float(found.slope),
        slope_low=float(found.slope) - half,
        slope_high=float(found.slope) + half,
        offset=float(found.intercept),
        r_squared=float(found.rvalue) ** 2,
        q_squared=1.0 - outside / total,
        groups=len(groups),
    )


def _skip(values: Sequence[float], index: int) -> list[float]:
    return [*values[:index], *values[index + 1 :]]


def show_coverage(coverage: Coverage | None) -> str:
    """As text, e.g. "6 of 7 [42, 100] %"."""
    if coverage is None:
        return "-"
    low, high = 100 * coverage.low, 100 * coverage.high
    return f"{coverage.inside} of {coverage.count} [{low:.0f}, {high:.0f}] %"


def _show(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else f"{value:{form}}"


def _draw(
    figure: Any, forecasts: Mapping[str, Sequence[ScoredForecast]], predictors: Sequence[str]
) -> None:
    figure.set_size_inches(3.4 * len(predictors), 3.6)
    panels = figure.subplots(1, len(predictors), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, predictors, strict=True):
        found = [f for f in forecasts[name] if f.low is not None and f.high is not None]
        for is_inside in (True, False):
            part = [f for f in found if f.is_inside is is_inside]
            points = [_middle(f) for f in part]
            errors = [
                [p - (f.low or 0.0) for p, f in zip(points, part, strict=True)],
                [(f.high or 0.0) - p for p, f in zip(points, part, strict=True)],
            ]
            axes.errorbar(
                [f.actual for f in part], points, yerr=errors, fmt="o" if is_inside else "x",
                markersize=4, linewidth=0.8, label="inside" if is_inside else "outside",
            )  # fmt: skip
        ends = [v for f in found for v in (f.actual, f.low or 0.0, f.high or 0.0)]
        if ends:
            axes.plot([min(ends), max(ends)], [min(ends), max(ends)], color="#999999", lw=0.8)
        axes.set_title(name)
        axes.set_xlabel("measured gain, %")
    panels[0].set_ylabel("forecast gain, %")
    panels[-1].legend()


def _middle(forecast: ScoredForecast) -> float:
    if forecast.point is not None:
        return forecast.point
    return ((forecast.low or 0.0) + (forecast.high or 0.0)) / 2
