"""Forecasts of the fusion gain from losses, with intervals that leave whole groups out.

Evidence is the caller's past outcomes where they are of four groups or more (enough for an 80 %
interval), else the published runs and these together. docs/forecasts.md has the algebra, the
scores and what the levels do not promise.
"""

from collections.abc import Sequence
from dataclasses import replace

from molora_fed.forecasting.intervals import Interval, compute_interval
from molora_fed.forecasting.matrices import (
    Fit,
    Model,
    compute_group_residuals,
    fit_and_forecast,
    group_outcomes,
    is_same_condition,
)
from molora_fed.types import Case, Forecast, LossMatrix, Outcome
from molora_kalavai import formulas
from molora_kalavai.published import list_published_outcomes

__all__ = [
    "predict_fitted",
    "predict_forgetting",
    "predict_kalavai_law",
    "predict_kalavai_law_refit",
    "predict_loss_matrix",
    "predict_own_loss",
    "predict_own_loss_bracket",
]

LAW = (0.82, -2.72)
LAW_REFIT = (0.83, -2.80)

ENOUGH_GROUPS = 4
"""Groups of one's own from which on the published runs are no evidence any more."""

Groups = list[list[Outcome]]


def gather_evidence(case: Case, past: Sequence[Outcome]) -> Groups:
    """The groups a forecast of the case may rest on.

    Own outcomes are evidence for cases known as they were: from pilots, or from final losses.
    """
    own = group_outcomes(o for o in past if o.case.is_extrapolated == case.is_extrapolated)
    if len(own) >= ENOUGH_GROUPS:
        return own
    published = [
        outcome
        for outcome in list_published_outcomes()
        # Neither its name nor its losses: a published run may come back under another name.
        if outcome.case.group != case.group
        and not is_same_condition(case.losses, outcome.case.losses)
    ]
    return group_outcomes(published) + own


def _is_applicable(losses: LossMatrix) -> bool:
    """Whether specialists of two or more domains can complement each other."""
    return len(set(losses.own_domain.values())) >= 2


def _describe(groups: Groups, level: float, how: str) -> str:
    names = {outcome.case.group for outcome in list_published_outcomes()}
    published = sum(group[0].case.group in names for group in groups)
    kinds = [f"{published} published", f"{len(groups) - published} own"]
    counted = " and ".join(kind for kind in kinds if not kind.startswith("0 "))
    return (
        f"{100 * level:.0f} % if this case is like the {counted} groups, each left out in turn; "
        f"{how}."
    )


def _build(
    case: Case, groups: Groups, point: float | None, interval: Interval, note: str, floor: float
) -> Forecast:
    is_alike = all(o.case.is_extrapolated == case.is_extrapolated for g in groups for o in g)
    if not is_alike:
        note = "No interval: too few outcomes of pilots are known."
        return Forecast("best_specialist", point, None, None, None, note, floor)
    return Forecast(
        "best_specialist", point, interval.low, interval.high, interval.level, note, floor
    )


def _predict_fixed(case: Case, past: Sequence[Outcome], model: Model) -> Forecast | None:
    """A formula without fitted constants: every group is left out already."""
    if not _is_applicable(case.losses):
        return None
    groups = gather_evidence(case, past)
    residuals = compute_group_residuals(groups, [model] * len(groups), "best_specialist")
    point = model(case)
    interval = compute_interval(point, residuals)
    note = _describe(groups, interval.level, "nothing is fitted")
    return _build(case, groups, point, interval, note, 0.0)


def _predict_fitted(case: Case, past: Sequence[Outcome], fit: Fit, how: str) -> Forecast | None:
    if not _is_applicable(case.losses):
        return None
    groups = gather_evidence(case, past)
    point, interval = fit_and_forecast(case, groups, fit, "best_specialist")
    return _build(case, groups, point, interval, _describe(groups, interval.level, how), 0.0)


def _predict_law(case: Case, past: Sequence[Outcome], law: tuple[float, float]) -> Forecast | None:
    """A published line; it has seen the published groups, so their residuals are of refits."""
    if not _is_applicable(case.losses):
        return None
    groups = gather_evidence(case, past)
    names = {outcome.case.group for outcome in list_published_outcomes()}
    seen = [group for group in groups if group[0].case.group in names]
    line = formulas.line_gain(*law)
    models = [
        formulas.fit_law([other for other in seen if other is not group]) if group in seen else line
        for group in groups
    ]
    point = line(case)
    interval = compute_interval(point, compute_group_residuals(groups, models, "best_specialist"))
    how = "the line has seen the published ones, so their residuals are of refits without each"
    note = _describe(groups, interval.level, how)
    return _build(case, groups, point, interval, note, -law[1] / law[0])


def predict_kalavai_law(case: Case, past: Sequence[Outcome]) -> Forecast | None:
    """Predict the gain over the best specialist from the mean divergence.

    Args:
        case: Its losses; of several specialists of a domain the best counts.
        past: Outcomes of other groups.

    Returns:
        `0.82 * mean divergence - 2.72` percent; None with specialists of fewer than two domains.

    Source: arXiv 2603.22755, abstract. Deviation: the interval is ours.
    """
    return _predict_law(case, past, LAW)


def predict_kalavai_law_refit(case: Case, past: Sequence[Outcome]) -> Forecast | None:
    """Predict the gain over the best specialist by the law's later fit to eight conditions.

    Args:
        case: Its losses; of several specialists of a domain the best counts.
        past: Outcomes of other groups.

    Returns:
        `0.83 * mean divergence - 2.80` percent; None with specialists of fewer than two domains.

    Source: arXiv 2603.22755, later revision. Deviation: the interval is ours.
    """
    return _predict_law(case, past, LAW_REFIT)


def predict_own_loss(case: Case, past: Sequence[Outcome]) -> Forecast | None:
    """Predict the gain over the best specialist from own-domain losses, with no constant.

    With `D_d = L_base,d - L_own,d`, own experts perfectly routed, and specialists equal to the
    base off their domains: the best specialist has the loss `sum L_base - max D`, the fused model
    `sum L_base - sum D`, so the gain is `(sum D - max D) / (sum L_base - max D)`.

    Args:
        case: Its losses; of several specialists of a domain the best counts.
        past: Outcomes of other groups.

    Returns:
        The gain in percent; None with specialists of fewer than two domains.

    Source: own derivation, see docs/forecasts.md.
    """
    return _predict_fixed(case, past, formulas.own_loss_gain)


def predict_loss_matrix(case: Case, past: Sequence[Outcome]) -> Forecast | None:
    """Predict the gain over the best specialist from the full matrix: every domain's best expert.

    Args:
        case: Its losses, every specialist on every domain.
        past: Outcomes of other groups.

    Returns:
        The domain oracle's gain in percent; None if a loss is missing.

    Source: arXiv 2603.22755, domain oracle, with the base among the experts.
    """
    if not formulas.is_full(case.losses):
        return None
    known = [outcome for outcome in past if formulas.is_full(outcome.case.losses)]
    return _predict_fixed(case, known, formulas.oracle_gain)


def predict_forgetting(case: Case, past: Sequence[Outcome]) -> Forecast | None:
    """Predict the gain over the best specialist from own-domain losses and what is forgotten.

    Off its domain a specialist's relative loss rises by a ratio times its own divergence. The
    ratio is each specialist's own in pilots if there are any; else the median over past groups of
    what their best specialists forgot.

    Args:
        case: Its losses on own domains; its pilots' on all domains.
        past: Outcomes of other groups.

    Returns:
        The gain in percent; None with specialists of fewer than two domains.

    Source: own derivation, see docs/forecasts.md.
    """
    return _predict_fitted(
        case, past, formulas.fit_forgetting, "one ratio is fitted where there are no pilots"
    )


def predict_fitted(case: Case, past: Sequence[Outcome]) -> Forecast | None:
    """Predict the gain over the best specialist by a regression over past outcomes.

    One constant times `predict_own_loss`, by least squares over the groups' means. What specialists
    forget makes the gain larger, roughly in proportion.

    Args:
        case: Its losses; of several specialists of a domain the best counts.
        past: Outcomes of other groups.

    Returns:
        The gain in percent; None with specialists of fewer than two domains.

    Source: own derivation, see docs/forecasts.md.
    """
    return _predict_fitted(case, past, formulas.fit_scale, "one constant on own-loss is fitted")


def predict_own_loss_bracket(case: Case, past: Sequence[Outcome]) -> Forecast | None:
    """Bracket the gain over the best anyone has alone, from own-domain losses.

    Low end: `predict_own_loss`, where specialists forget nothing. High end:
    `sum D / sum L_base`, where every specialist forgets so much that the base is the best alone.
    The bracket is widened by how far past gains lay outside theirs.

    Args:
        case: Its losses; of several specialists of a domain the best counts.
        past: Outcomes of other groups.

    Returns:
        The bracket without a point; None with specialists of fewer than two domains, or without
        evidence.

    Source: own derivation, see docs/forecasts.md.
    """
    if not _is_applicable(case.losses):
        return None
    groups = gather_evidence(case, past)
    outside = [max(_measure_outside(outcome) for outcome in group) for group in groups]
    interval = compute_interval(_bracket(case), outside)
    note = _describe(groups, interval.level, "widened by the furthest any of them lay outside")
    found = _build(case, groups, None, interval, note, 0.0)
    return None if found.level is None else replace(found, reference="best_alone")


def _bracket(case: Case) -> tuple[float, float]:
    ends = formulas.own_loss_gain(case), formulas.ceiling_gain(case)
    return min(ends), max(ends)


def _measure_outside(outcome: Outcome) -> float:
    """Percentage points between a gain and its bracket; 0 inside."""
    low, high = _bracket(outcome.case)
    gain = outcome.gains["best_alone"]
    return max(low - gain, gain - high, 0.0)
