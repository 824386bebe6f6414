"""The headline forecast: the gain of our own routers, with residuals of our own fusions.

From the full loss matrix: the domain oracle's gain plus a shift, the median over groups of what
evidence routers gained beyond it. They mix experts within documents, which puts them below the
domain oracle's loss; that calibration blocks promise more than held-out ones give pulls the other
way. From pilots: the gain as a line in the mean divergence that they promise. Every constant is
fitted without each group in turn, see docs/forecasts.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

from molora_fed.forecasting.divergence import compute_gains, compute_reference_losses
from molora_fed.forecasting.intervals import Interval, fit_line
from molora_fed.forecasting.matrices import (
    Fit,
    Model,
    fit_and_forecast,
    group_outcomes,
    is_same_condition,
)
from molora_fed.forecasting.pilots import PUBLISHED_GROWTH, PilotRecord, extrapolate, fit_growth
from molora_fed.types import Case, Forecast, LossMatrix, Outcome, Reference
from molora_kalavai import formulas
from molora_kalavai.measured import MeasuredRun, has_learnt, list_measured_runs
from molora_kalavai.predictors import ENOUGH_GROUPS

__all__ = ["predict_measured_alone", "predict_measured_specialist"]

Groups = Sequence[Sequence[Outcome]]

_FEWEST_FOR_LINE = 3
"""A line leaves one group out and needs two others."""


def predict_measured_alone(case: Case, past: Sequence[Outcome]) -> Forecast | None:
    """Predict the gain over the best anyone has alone, with residuals of our own fusions.

    Args:
        case: Its losses, every specialist on every domain; or its pilots.
        past: Outcomes of other groups; these alone are evidence once they are four groups or more.

    Returns:
        The gain in percent; None if losses off-domain are unknown and there are no pilots, or with
        specialists of fewer than two domains.

    Source: own derivation, see docs/forecasts.md.
    """
    return _predict(case, past, "best_alone")


def predict_measured_specialist(case: Case, past: Sequence[Outcome]) -> Forecast | None:
    """Predict the gain over the best specialist, with residuals of our own fusions.

    Args:
        case: Its losses, every specialist on every domain; or its pilots.
        past: Outcomes of other groups; these alone are evidence once they are four groups or more.

    Returns:
        The gain in percent; None if losses off-domain are unknown and there are no pilots, or with
        specialists of fewer than two domains.

    Source: own derivation, see docs/forecasts.md.
    """
    return _predict(case, past, "best_specialist")


def _predict(case: Case, past: Sequence[Outcome], reference: Reference) -> Forecast | None:
    if len(set(case.losses.own_domain.values())) < 2:
        return None
    if case.is_extrapolated:
        return _predict_from_pilots(case, past, reference)
    if not formulas.is_full(case.losses):
        return None
    references = compute_reference_losses(case.losses)
    if reference == "best_alone" and references["best_alone"] == references["best_specialist"]:
        # One gain under two names gets one forecast.
        same = _predict(case, past, "best_specialist")
        return None if same is None else replace(same, reference=reference)
    known = [o for o in past if not o.case.is_extrapolated and formulas.is_full(o.case.losses)]
    shipped, own = _gather(case, known)
    groups = [*group_outcomes(run.outcome for run in shipped), *own]
    if not groups:
        point = oracle_gain(case.losses, reference)
        note = "No interval: no outcome of another group is known."
        return Forecast(reference, point, None, None, None, note, 0.0)
    point, interval = fit_and_forecast(case, groups, fit_shift(reference), reference)
    how = "the domain oracle of calibration losses, and what routers gained beyond it"
    return _build(reference, point, interval, _describe(groups, len(own), interval, how))


def _predict_from_pilots(
    case: Case, past: Sequence[Outcome], reference: Reference
) -> Forecast | None:
    known = [o for o in past if o.case.is_extrapolated and o.case.share is not None]
    shipped, own = _gather(case, known)
    records = [run.pilots for run in shipped if run.pilots is not None]
    seen = [Outcome(_look_back(record), record.outcome.gains) for record in records]
    groups = [*group_outcomes(seen), *own]
    if case.pilots is None or case.share is None or len(groups) < _FEWEST_FOR_LINE:
        return None
    by_outcome = {id(outcome): record for outcome, record in zip(seen, records, strict=True)}
    fit = fit_pilot_line(reference, by_outcome)
    point, interval = fit_and_forecast(case, groups, fit, reference)
    how = "a line in the divergence that pilots promise"
    return _build(reference, point, interval, _describe(groups, len(own), interval, how))


def _look_back(record: PilotRecord) -> Case:
    """A past run's case as it was when its pilots were all that was known."""
    return extrapolate(
        record.pilots, record.share, PUBLISHED_GROWTH, group=record.outcome.case.group
    )


def _build(reference: Reference, point: float, interval: Interval, note: str) -> Forecast:
    return Forecast(reference, point, interval.low, interval.high, interval.level, note, 0.0)


def _gather(case: Case, past: Sequence[Outcome]) -> tuple[list[MeasuredRun], list[list[Outcome]]]:
    """Runs of ours and groups of the caller's that a forecast of the case may rest on."""
    own = group_outcomes(o for o in past if has_learnt(o.case.losses))
    if len(own) >= ENOUGH_GROUPS:
        return [], own
    runs = list_measured_runs()
    names = {run.outcome.case.group for run in runs}
    # Where names cannot tell, losses do; and a group shares specialists, so that it goes whole.
    left = (
        {case.group}
        if case.group in names
        else {
            run.outcome.case.group
            for run in runs
            if is_same_condition(case.losses, run.outcome.case.losses)
        }
    )
    return [run for run in runs if run.outcome.case.group not in left], own


def _describe(groups: Groups, num_own: int, interval: Interval, how: str) -> str:
    kinds = [f"{len(groups) - num_own} measured", f"{num_own} own"]
    counted = " and ".join(kind for kind in kinds if not kind.startswith("0 "))
    return (
        f"{100 * interval.level:.0f} % if this case is like the {counted} groups of fusions with "
        f"an evidence router, each left out in turn; {how}."
    )


def oracle_gain(losses: LossMatrix, reference: Reference) -> float:
    """Gain in percent if every domain gets its best expert or the base; reads all losses."""
    rows = [losses.base, *losses.specialists.values()]
    return compute_gains(losses, {d: min(row[d] for row in rows) for d in losses.domains})[
        reference
    ]


def fit_shift(reference: Reference) -> Fit:
    """The domain oracle's gain plus a constant: median over groups of their mean residual.

    The median, so that one group's domains do not decide.
    """

    def fit(groups: Groups) -> Model:
        residuals = [
            formulas.mean_over_group(
                group, lambda o: o.gains[reference] - oracle_gain(o.case.losses, reference)
            )
            for group in groups
        ]
        # Leaving one group out of one leaves none: nothing is known of the shift.
        shift = median(residuals) if residuals else 0.0
        return lambda case: oracle_gain(case.losses, reference) + shift

    return fit


def fit_pilot_line(reference: Reference, records: Mapping[int, PilotRecord]) -> Fit:
    """The gain as a line in the mean divergence that pilots promise.

    Args:
        reference: What gains are against.
        records: Past pilots with their final losses, by the id of an outcome that groups may hold:
            they say how drops grow with the steps.
    """

    def fit(groups: Groups) -> Model:
        growth = fit_growth([records[id(o)] for g in groups for o in g if id(o) in records])

        def promise(case: Case) -> float:
            if case.pilots is None or case.share is None:
                return formulas.mean_divergence(case)
            return formulas.mean_divergence(extrapolate(case.pilots, case.share, growth))

        line = fit_line(
            [formulas.mean_over_group(group, lambda o: promise(o.case)) for group in groups],
            [formulas.mean_over_group(group, lambda o: o.gains[reference]) for group in groups],
        )
        return lambda case: line(promise(case))

    return fit
