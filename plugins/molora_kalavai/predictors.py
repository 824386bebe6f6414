"""Forecasts of the fusion gain from a loss matrix, with intervals from the published runs.

The intervals rest on seven published groups (a condition with its seeds; one residual a group,
never one a seed), leaving out the run whose router collapsed. docs/forecasts.md has the algebra,
the residuals and what the levels do not promise.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from statistics import fmean

from molora_fed.forecasting.divergence import best_own_losses, compute_divergences, compute_gains
from molora_fed.forecasting.intervals import compute_interval, fit_line, leave_one_out_residuals
from molora_fed.types import Forecast, LossMatrix

__all__ = [
    "COLLAPSED",
    "PublishedRun",
    "group_means",
    "load_published_runs",
    "predict_kalavai_law",
    "predict_own_loss",
    "predict_own_loss_bracket",
]

LAW_SLOPE = 0.82
LAW_OFFSET_PERCENT = -2.72

COLLAPSED = ("phase2-cross_lingual", 42)
"""Group and seed of the published run whose router sent one language to another's expert."""

BRACKET_LEVEL = 18 / 21
"""Share of the published runs whose domain-oracle gain lies in the bracket (tested)."""


@dataclass(frozen=True)
class PublishedRun:
    """One published run.

    Attributes:
        group: The condition without its seed.
        seed: Seed.
        losses: Losses of base and specialists, nats per token; a specialist has its domain's name.
        fused: Loss of the fused model by domain, nats per token.
    """

    group: str
    seed: int
    losses: LossMatrix
    fused: Mapping[str, float]


@cache
def load_published_runs() -> tuple[PublishedRun, ...]:
    """The 21 published runs, in the order of the table.

    Source: published.json beside this file, from arXiv 2603.22755's result files.
    """
    table = json.loads(files("molora_kalavai").joinpath("published.json").read_text("utf-8"))
    runs = []
    for run in table["runs"]:
        domains = tuple(run["domains"])
        specialists = {
            name: dict(zip(domains, row, strict=True))
            for name, row in zip(domains, run["specialists"], strict=True)
        }
        base = dict(zip(domains, run["base"], strict=True))
        matrix = LossMatrix(domains, base, specialists, {name: name for name in domains})
        fused = dict(zip(domains, run["fused"], strict=True))
        runs.append(PublishedRun(run["group"], run["seed"], matrix, fused))
    return tuple(runs)


def group_means(value: Callable[[PublishedRun], float]) -> list[float]:
    """A figure of every run, averaged over the seeds of each group, without the collapsed run.

    Returns:
        One number for each of the seven groups, sorted by the group's name.
    """
    by_group: dict[str, list[float]] = {}
    for run in load_published_runs():
        if (run.group, run.seed) != COLLAPSED:
            by_group.setdefault(run.group, []).append(value(run))
    return [fmean(by_group[name]) for name in sorted(by_group)]


def _gain_on_best_specialist(run: PublishedRun) -> float:
    return compute_gains(run.losses, run.fused)["best_specialist"]


def _mean_divergence(matrix: LossMatrix) -> float:
    return fmean(compute_divergences(matrix).values())


def _own_loss_gain(matrix: LossMatrix) -> float:
    """Percent; see `predict_own_loss`."""
    own = best_own_losses(matrix)
    drops = [matrix.base[d] - own[d] for d in matrix.domains]
    base = sum(matrix.base[d] for d in matrix.domains)
    return 100.0 * (sum(drops) - max(drops)) / (base - max(drops))


def _ceiling_gain(matrix: LossMatrix) -> float:
    """Percent by which every domain's own specialist beats the base, equal weight."""
    own = best_own_losses(matrix)
    base = sum(matrix.base[d] for d in matrix.domains)
    return 100.0 * (base - sum(own.values())) / base


def _is_applicable(matrix: LossMatrix) -> bool:
    """Whether specialists of two or more domains can complement each other."""
    return len(set(matrix.own_domain.values())) >= 2


@cache
def _law_residuals() -> tuple[float, ...]:
    """Residuals of a line refitted without each group; the published line has seen most of them."""
    divergences = group_means(lambda run: _mean_divergence(run.losses))
    gains = group_means(_gain_on_best_specialist)
    return tuple(leave_one_out_residuals(divergences, gains, fit_line))


@cache
def _own_loss_residuals() -> tuple[float, ...]:
    """Nothing is fitted, so every group is left out already."""
    return tuple(group_means(lambda r: _gain_on_best_specialist(r) - _own_loss_gain(r.losses)))


def predict_kalavai_law(matrix: LossMatrix) -> Forecast | None:
    """Predict the gain over the best specialist from the mean divergence.

    Args:
        matrix: Losses; of several specialists of a domain the best counts.

    Returns:
        `0.82 * mean divergence - 2.72` percent; None with specialists of fewer than two domains.

    Source: arXiv 2603.22755, abstract. Deviation: the interval is ours.
    """
    if not _is_applicable(matrix):
        return None
    point = LAW_SLOPE * _mean_divergence(matrix) + LAW_OFFSET_PERCENT
    interval = compute_interval(point, _law_residuals())
    note = (
        f"Largest residual of {len(_law_residuals())} published groups, each under a line "
        "refitted without it; nominal if this cooperative resembles them."
    )
    return Forecast("best_specialist", point, interval.low, interval.high, interval.level, note)


def predict_own_loss(matrix: LossMatrix) -> Forecast | None:
    """Predict the gain over the best specialist from own-domain losses, with no constant.

    With `D_d = L_base,d - L_own,d`, own experts perfectly routed, and specialists equal to the
    base off their domains: the best specialist has the loss `sum L_base - max D`, the fused model
    `sum L_base - sum D`, so the gain is `(sum D - max D) / (sum L_base - max D)`.

    Args:
        matrix: Losses; of several specialists of a domain the best counts.

    Returns:
        The gain in percent; None with specialists of fewer than two domains.

    Source: own derivation, see docs/forecasts.md.
    """
    if not _is_applicable(matrix):
        return None
    point = _own_loss_gain(matrix)
    interval = compute_interval(point, _own_loss_residuals())
    note = (
        f"Largest residual of {len(_own_loss_residuals())} published groups, nothing fitted; "
        "nominal if this cooperative resembles them."
    )
    return Forecast("best_specialist", point, interval.low, interval.high, interval.level, note)


def predict_own_loss_bracket(matrix: LossMatrix) -> Forecast | None:
    """Bracket the gain over the best anyone has alone, from own-domain losses.

    Low end: `predict_own_loss`, where specialists forget nothing. High end:
    `sum D / sum L_base`, where every specialist forgets so much that the base is the best alone.

    Args:
        matrix: Losses; of several specialists of a domain the best counts.

    Returns:
        The bracket without a point; None with specialists of fewer than two domains.

    Source: own derivation, see docs/forecasts.md.
    """
    if not _is_applicable(matrix):
        return None
    note = (
        "Level counted, not derived: the domain oracle's gain lay in the bracket on 18 of the 21 "
        "published runs, in 6 of 7 groups."
    )
    low, high = _own_loss_gain(matrix), _ceiling_gain(matrix)
    return Forecast("best_alone", None, min(low, high), max(low, high), BRACKET_LEVEL, note)
