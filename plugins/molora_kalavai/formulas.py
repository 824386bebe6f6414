"""The formulas behind the gain predictors: gains in percent from a case's losses.

docs/forecasts.md derives them. None reads a specialist's loss off its own domain, but
`oracle_gain` and `measure_forgetting`, which say so.
"""

from collections.abc import Callable, Sequence
from statistics import fmean, median

from molora_fed.forecasting.divergence import (
    best_own_losses,
    compute_divergences,
    compute_gain_percent,
    compute_gains,
    compute_own_divergences,
)
from molora_fed.forecasting.intervals import fit_line
from molora_fed.forecasting.matrices import Model
from molora_fed.types import Case, LossMatrix, Outcome

__all__ = [
    "ceiling_gain",
    "fit_forgetting",
    "fit_law",
    "fit_scale",
    "forgetting_gain",
    "is_full",
    "line_gain",
    "mean_divergence",
    "mean_over_group",
    "measure_forgetting",
    "oracle_gain",
    "own_loss_gain",
]


def mean_over_group(group: Sequence[Outcome], value: Callable[[Outcome], float]) -> float:
    """A figure averaged over a group's runs."""
    return fmean(value(outcome) for outcome in group)


def mean_divergence(case: Case) -> float:
    """Mean over domains of the best own specialist's divergence, percent."""
    return fmean(compute_divergences(case.losses).values())


def line_gain(slope: float, offset: float) -> Model:
    """The law's form: slope * mean divergence + offset, percent."""
    return lambda case: slope * mean_divergence(case) + offset


def own_loss_gain(case: Case) -> float:
    """Gain over the best specialist if routing is perfect and specialists forget nothing."""
    return forgetting_gain(case, lambda name: 0.0)


def ceiling_gain(case: Case) -> float:
    """Percent by which every domain's own specialist beats the base, equal weight."""
    losses = case.losses
    own = best_own_losses(losses)
    return compute_gain_percent(sum(losses.base[d] for d in losses.domains), sum(own.values()))


def forgetting_gain(case: Case, ratio_of: Callable[[str], float]) -> float:
    """Gain over the best specialist if routing is perfect and specialists forget off-domain.

    Off its domain a specialist's loss is the base's, times 1 + ratio * divergence / 100: what it
    forgets grows with what it learnt.

    Args:
        case: Of its losses only the base's and own-domain ones are read.
        ratio_of: Relative rise off-domain per relative fall on the own domain, by specialist.
    """
    losses = case.losses
    total = sum(losses.base[d] for d in losses.domains)
    divergences = compute_own_divergences(losses)
    best = min(
        losses.specialists[name][own]
        + (total - losses.base[own]) * (1.0 + ratio_of(name) * max(divergences[name], 0.0) / 100.0)
        for name, own in losses.own_domain.items()
    )
    return compute_gain_percent(best, sum(best_own_losses(losses).values()))


def is_full(losses: LossMatrix) -> bool:
    """Whether every specialist's loss on every domain is known."""
    return all(set(losses.domains) <= set(row) for row in losses.specialists.values())


def oracle_gain(case: Case) -> float:
    """Gain over the best specialist if every domain gets its best expert; reads all losses."""
    losses = case.losses
    rows = [losses.base, *losses.specialists.values()]
    oracle = {d: min(row[d] for row in rows) for d in losses.domains}
    return compute_gains(losses, oracle)["best_specialist"]


def measure_forgetting(losses: LossMatrix, name: str) -> float | None:
    """Relative rise off-domain per relative fall on the own domain; reads all losses.

    Args:
        losses: Full losses.
        name: A specialist.

    Returns:
        Unitless; None if it learnt nothing or there is no other domain.
    """
    divergence = compute_own_divergences(losses)[name]
    others = [d for d in losses.domains if d != losses.own_domain[name]]
    if divergence <= 0 or not others:
        return None
    base = sum(losses.base[d] for d in others)
    rise = sum(losses.specialists[name][d] for d in others) - base
    return 100.0 * rise / base / divergence


def _measure_best(outcome: Outcome) -> float | None:
    """Forgetting of the specialist with the lowest equal-weight loss: gains are against it."""
    losses = outcome.case.losses
    best = min(
        losses.specialists, key=lambda n: sum(losses.specialists[n][d] for d in losses.domains)
    )
    return measure_forgetting(losses, best)


def fit_forgetting(groups: Sequence[Sequence[Outcome]]) -> Model:
    """`forgetting_gain` with ratios from a case's pilots, else the median over past groups.

    The median, so that one group's domains do not decide.
    """
    ratios = []
    for group in groups:
        measured = [_measure_best(o) for o in group if is_full(o.case.losses)]
        known = [ratio for ratio in measured if ratio is not None]
        if known:
            ratios.append(fmean(known))
    typical = median(ratios) if ratios else 0.0

    def predict(case: Case) -> float:
        def ratio_of(name: str) -> float:
            pilots = case.pilots
            if pilots is None or name not in pilots.specialists or not is_full(pilots):
                return typical
            measured = measure_forgetting(pilots, name)
            return typical if measured is None else measured

        return forgetting_gain(case, ratio_of)

    return predict


def fit_scale(groups: Sequence[Sequence[Outcome]]) -> Model:
    """One constant on `own_loss_gain`, by least squares over group means."""
    pairs = [
        (
            mean_over_group(group, lambda o: own_loss_gain(o.case)),
            mean_over_group(group, lambda o: o.gains["best_specialist"]),
        )
        for group in groups
    ]
    square = sum(x * x for x, _ in pairs)
    scale = sum(x * y for x, y in pairs) / square if square > 0 else 1.0
    return lambda case: scale * own_loss_gain(case)


def fit_law(groups: Sequence[Sequence[Outcome]]) -> Model:
    """The law's form fitted anew: gain on mean divergence over group means.

    Raises:
        ConfigError: If there are fewer than two groups of different divergence.
    """
    line = fit_line(
        [mean_over_group(group, lambda o: mean_divergence(o.case)) for group in groups],
        [mean_over_group(group, lambda o: o.gains["best_specialist"]) for group in groups],
    )
    return lambda case: line(mean_divergence(case))
