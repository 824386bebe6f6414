"""Verdicts on forecasts: over conditions that share no training, with every simple rival beside.

Conditions that share a trained specialist, a base's text or each other's domains are one replicate:
a family. A forecast is judged on the board that leaves its whole family out of its evidence, and
against three rivals at once: the law with its published constants, a mean of past gains, and the
law's line refitted to the same past.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from molora_kalavai.formulas import mean_divergence

from molora_fed.forecasting.matrices import group_outcomes
from molora_fed.forecasting.scoring import ScoredForecast
from molora_fed.types import Outcome
from molora_studies.framework.contract import Claim
from molora_studies.kalavai.scoreboard import INTERCEPT, LAW, LINE, OURS, Board
from molora_studies.verdicts import (
    Span,
    compute_share,
    compute_span,
    join_verdicts,
    judge_above,
    judge_below,
    name_unit,
)

__all__ = [
    "RIVALS",
    "connect",
    "drop_idle",
    "judge_errors",
    "judge_intervals",
    "merge_families",
    "name_families",
]

RIVALS: Mapping[str, str] = {LAW: "the law", INTERCEPT: "a mean", LINE: "a refitted line"}
"""What a forecast must beat, by predictor, as texts say it."""


def connect(names: Sequence[str], related: Callable[[str, str], bool]) -> dict[str, str]:
    """Family of each name, called after its first member: chains of relatives are one family.

    Args:
        names: Names in their order.
        related: Whether two of them are no independent replicates.
    """
    family: dict[str, str] = {}
    for name in names:
        joined = {family[other] for other in family if related(name, other)}
        first = next((known for known in names if known in joined), name)
        family[name] = first
        for other in family:
            if family[other] in joined:
                family[other] = first
    return family


def drop_idle(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Outcomes without groups whose specialists are all the base: they have nothing to forecast."""
    idle = {
        group[0].case.group
        for group in group_outcomes(outcomes)
        if all(mean_divergence(outcome.case) == 0 for outcome in group)
    }
    return [outcome for outcome in outcomes if outcome.case.group not in idle]


def merge_families(outcomes: Sequence[Outcome], families: Mapping[str, str]) -> list[Outcome]:
    """Outcomes whose group is their family, so that fits over groups are fits over families."""
    return [
        replace(outcome, case=replace(outcome.case, group=families[outcome.case.group]))
        for outcome in outcomes
    ]


def name_families(families: Mapping[str, str]) -> str:
    """The unit of replication of forecasts."""
    return name_unit("condition without shared specialists", len(set(families.values())))


def judge_intervals(board: Board, families: Mapping[str, str]) -> list[Claim]:
    """Whether each of our intervals holds as often as it says, and says more than its rivals.

    Args:
        board: Forecasts that leave their family out, without idle groups.
        families: Family by group.
    """
    return [_judge_intervals(board, families, name) for name in OURS]


def _judge_intervals(board: Board, families: Mapping[str, str], name: str) -> Claim:
    ours = _average(board.forecasts[name], families, _read_score)
    held = _average(board.forecasts[name], families, lambda f: float(bool(f.is_inside)))
    whole, level = sum(share == 1 for share in held.values()), board.scores[name].level or 0.0
    coverage = compute_share(whole, len(held))
    worse = _compare(board, families, name, _read_score)
    shown = "; ".join(f"{RIVALS[rival]} {text}" for rival, (_, text) in worse.items())
    low, high = (100 * (end or 0.0) for end in (coverage.low, coverage.high))
    return Claim(
        f"Intervals of {name} hold as often as they say, and are better than those of the law, "
        "of a mean and of a refitted line",
        "none published",
        f"at {100 * level:.0f} %: all runs inside in {whole} of {len(held)} [{low:.0f}, "
        f"{high:.0f}] %; interval score {fmean(ours.values()):.2f} pp, less that of {shown}",
        join_verdicts(
            [judge_above([coverage], level), *(judge_below([span]) for span, _ in worse.values())]
        ),
        name_families(families),
        "holds if the exact interval of the coverage lies above the level, which takes 17 such "
        "conditions at 80 %, and the interval score is lower than each rival's by the interval of "
        "the difference; does not hold if one is lower by it",
    )


def judge_errors(board: Board, families: Mapping[str, str], name: str, what: str) -> Claim:
    """Whether a predictor's squared error is below that of every rival.

    Args:
        board: Forecasts that leave their family out, without idle groups.
        families: Family by group.
        name: The predictor.
        what: What it forecasts from, the beginning of the claim.
    """
    square = fmean(_average(board.forecasts[name], families, _read_square).values())
    worse = _compare(board, families, name, _read_square)
    shown = "; ".join(f"{RIVALS[rival]} {text}" for rival, (_, text) in worse.items())
    return Claim(
        f"{what}, {name} forecasts the gain better than the law, a mean and a refitted line",
        "not tried",
        f"mean squared error {square:.1f} pp2 (RMSE {square**0.5:.2f} pp), less that of {shown}",
        join_verdicts([judge_below([span]) for span, _ in worse.values()]),
        name_families(families),
        "holds if the squared error is lower than each rival's by the interval of the difference; "
        "does not hold if one is lower by it",
    )


def _read_score(forecast: ScoredForecast) -> float:
    if forecast.interval_score is None:
        raise ValueError(f"no interval was claimed for group '{forecast.group}'")
    return forecast.interval_score


def _read_square(forecast: ScoredForecast) -> float:
    if forecast.point is None:
        raise ValueError(f"no point was claimed for group '{forecast.group}'")
    return (forecast.actual - forecast.point) ** 2


def _average(
    forecasts: Sequence[ScoredForecast],
    families: Mapping[str, str],
    value: Callable[[ScoredForecast], float],
) -> dict[str, float]:
    """Mean over a group's runs, then over a family's groups, by family."""
    groups: dict[str, list[float]] = {}
    for forecast in forecasts:
        groups.setdefault(forecast.group, []).append(value(forecast))
    found: dict[str, list[float]] = {}
    for group, values in groups.items():
        found.setdefault(families[group], []).append(fmean(values))
    return {family: fmean(values) for family, values in found.items()}


def _compare(
    board: Board,
    families: Mapping[str, str],
    name: str,
    value: Callable[[ScoredForecast], float],
) -> dict[str, tuple[Span, str]]:
    """By rival: interval over families of our figure less the rival's, and its text."""
    ours = _average(board.forecasts[name], families, value)
    found = {}
    for rival in RIVALS:
        theirs = _average(board.forecasts[rival], families, value)
        differences = [ours[family] - theirs[family] for family in ours]
        span = compute_span(differences)
        found[rival] = (span, f"{fmean(differences):+.2f} {span.show()}")
    return found
