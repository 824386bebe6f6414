"""Past outcomes by group: what may be evidence for a case, and what fits to it promise.

A group is a condition with its seeds. Seeds share base, data and domains, so they are one
observation, and no run is ever forecast with the help of its own group.
"""

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

from molora_fed.forecasting.divergence import best_own_losses
from molora_fed.forecasting.intervals import Interval, compute_interval
from molora_fed.types import Case, LossMatrix, Outcome, Reference

__all__ = [
    "Fit",
    "Model",
    "compute_group_residuals",
    "fit_and_forecast",
    "group_outcomes",
    "is_same_condition",
    "leave_out_group",
    "mean_over_group",
]

Model = Callable[[Case], float]
"""Forecasts a case's gain in percent."""

Fit = Callable[[Sequence[Sequence[Outcome]]], Model]
"""Fits a model to groups of outcomes."""

_BASE_TOLERANCE = 0.005
_OWN_TOLERANCE = 0.02


def is_same_condition(first: LossMatrix, second: LossMatrix) -> bool:
    """Whether two matrices are of one condition with different seeds, by their losses alone.

    Names and order of domains do not count: equally many domains whose base losses agree within
    0.5 % and whose own-domain losses agree within 2 %.
    """
    if len(first.domains) != len(second.domains):
        return False
    own = best_own_losses(first), best_own_losses(second)
    pairs = zip(
        sorted((first.base[d], own[0][d]) for d in first.domains),
        sorted((second.base[d], own[1][d]) for d in second.domains),
        strict=True,
    )
    return all(
        abs(a[0] - b[0]) <= _BASE_TOLERANCE * b[0] and abs(a[1] - b[1]) <= _OWN_TOLERANCE * b[1]
        for a, b in pairs
    )


def leave_out_group(case: Case, outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Outcomes that may be evidence for a case: those of other groups.

    Names of groups decide where both have one; else the losses do.
    """
    return [outcome for outcome in outcomes if not _is_same_group(case, outcome.case)]


def _is_same_group(first: Case, second: Case) -> bool:
    if first.group and second.group:
        return first.group == second.group
    return is_same_condition(first.losses, second.losses)


def group_outcomes(outcomes: Iterable[Outcome]) -> list[list[Outcome]]:
    """Outcomes by group, sorted by its name; an outcome without one is a group of its own."""
    named: dict[str, list[Outcome]] = {}
    alone = []
    for outcome in outcomes:
        if outcome.case.group:
            named.setdefault(outcome.case.group, []).append(outcome)
        else:
            alone.append([outcome])
    return [named[name] for name in sorted(named)] + alone


def mean_over_group(group: Sequence[Outcome], value: Callable[[Outcome], float]) -> float:
    """A figure averaged over a group's runs."""
    return fmean(value(outcome) for outcome in group)


def compute_group_residuals(
    groups: Sequence[Sequence[Outcome]], models: Sequence[Model], reference: Reference
) -> list[float]:
    """The residual of largest size in each group.

    The largest, so that an interval that holds for a group holds for each of its runs.

    Args:
        groups: Outcomes by group.
        models: One a group, fitted without it or not fitted at all.
        reference: What gains are against.

    Returns:
        Outcome minus forecast, percentage points, one a group.
    """
    return [
        max((o.gains[reference] - model(o.case) for o in group), key=abs)
        for group, model in zip(groups, models, strict=True)
    ]


def fit_and_forecast(
    case: Case, groups: Sequence[Sequence[Outcome]], fit: Fit, reference: Reference
) -> tuple[float, Interval]:
    """Forecast a case by a model fitted to past groups, with an interval that leaves each out.

    Args:
        case: What to forecast; of none of the groups.
        groups: Past outcomes by group.
        fit: Fits a model to any of these groups but one.
        reference: What gains are against.

    Returns:
        Point in percent, and its interval.

    Raises:
        ConfigError: If there is no group, or a fit is refused.
    """
    point = fit(groups)(case)
    models = [fit([*groups[:i], *groups[i + 1 :]]) for i in range(len(groups))]
    residuals = compute_group_residuals(groups, models, reference)
    return point, compute_interval(point, residuals, fits=[model(case) for model in models])
