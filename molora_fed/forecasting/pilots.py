"""From pilots to final losses: forecasts before anyone trains in earnest.

A pilot is a specialist after a small share of the planned steps. Its drop on its own domain, in
log loss, is taken to grow with the steps as a power law,

    log(L_base / L_final) = log(L_base / L_pilot) * (1 / share) ** growth

with one exponent for all domains, fitted to past pilots and their final losses. docs/forecasts.md
says where the exponent without records comes from.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from molora_fed.errors import ConfigError
from molora_fed.forecasting.divergence import best_own_losses
from molora_fed.forecasting.matrices import group_outcomes, leave_out_group
from molora_fed.types import Case, LossMatrix, Outcome

__all__ = [
    "MAX_SHARE",
    "PUBLISHED_GROWTH",
    "PilotRecord",
    "build_past",
    "extrapolate",
    "fit_growth",
]

PUBLISHED_GROWTH = 0.39
"""Least squares over log steps of the published reductions at 50 to 2,000 steps without frozen
layers (4.0, 5.1, 9.2, 12.1, 15.5 %): arXiv 2603.22755, steps x freeze."""

MAX_SHARE = 0.1
"""Share of the planned steps above which a run is no pilot any more."""


@dataclass(frozen=True)
class PilotRecord:
    """A past fusion of which the pilots are known.

    Attributes:
        pilots: Losses of specialists after a share of the steps, under their final names.
        share: That share, in (0, 1).
        outcome: The final losses and what fusing gained.
    """

    pilots: LossMatrix
    share: float
    outcome: Outcome


def fit_growth(records: Sequence[PilotRecord]) -> float:
    """The exponent by which drops grow with the steps: mean over groups of their runs' mean.

    Args:
        records: Past pilots and final losses; records without a drop in both say nothing.

    Returns:
        Unitless; the published one if no record says anything.
    """
    by_outcome = {id(record.outcome): record for record in records}
    means = []
    for group in group_outcomes(record.outcome for record in records):
        measured = [_measure_growth(by_outcome[id(outcome)]) for outcome in group]
        known = [growth for growth in measured if growth is not None]
        if known:
            means.append(fmean(known))
    return fmean(means) if means else PUBLISHED_GROWTH


def _measure_growth(record: PilotRecord) -> float | None:
    drops = [
        sum(math.log(losses.base[d] / loss) for d, loss in best_own_losses(losses).items())
        for losses in (record.pilots, record.outcome.case.losses)
    ]
    if min(drops) <= 0:
        return None
    return math.log(drops[1] / drops[0]) / math.log(1.0 / record.share)


def extrapolate(pilots: LossMatrix, share: float, growth: float, *, group: str = "") -> Case:
    """A case of final losses as pilots promise them.

    Args:
        pilots: Losses of pilots; only own-domain ones are extrapolated.
        share: Share of the planned steps they had, in (0, 1).
        growth: Exponent, see `fit_growth`.
        group: The condition without its seed.

    Returns:
        Own-domain losses after all steps, with the pilots beside them. A pilot that is worse than
        the base stays as it is.

    Raises:
        ConfigError: If the share is not that of a pilot.
    """
    if not 0 < share < 1:
        raise ConfigError(
            f"Cannot extrapolate pilots: expected a share of the steps above 0 and below 1, got "
            f"{share}. Give the planned steps."
        )
    final = {}
    for name, own in pilots.own_domain.items():
        drop = math.log(pilots.base[own] / pilots.specialists[name][own])
        grown = drop * share**-growth if drop > 0 else drop
        final[name] = {own: pilots.base[own] * math.exp(-grown)}
    final_losses = replace(pilots, specialists=final)
    return Case(final_losses, group, pilots, is_extrapolated=True, share=share)


def build_past(case: Case, records: Sequence[PilotRecord]) -> list[Outcome]:
    """Past outcomes as they would have been forecast from their pilots.

    Each is extrapolated with the exponent of the other groups, so that residuals hold the error of
    extrapolation too.

    Args:
        case: What is forecast; records of its group are left out.
        records: Past pilots, final losses and gains.
    """
    by_outcome = {id(record.outcome): record for record in records}
    kept = leave_out_group(case, [record.outcome for record in records])
    groups = group_outcomes(kept)
    past = []
    for group in groups:
        others = [by_outcome[id(o)] for other in groups if other is not group for o in other]
        growth = fit_growth(others)
        for outcome in group:
            record = by_outcome[id(outcome)]
            extrapolated = extrapolate(
                record.pilots, record.share, growth, group=outcome.case.group
            )
            past.append(Outcome(extrapolated, outcome.gains))
    return past
