"""Conformance checks of gain predictors, on made-up losses whose outcome is known.

`check_gain_predictor_conformance(predict)` is the whole test a predictor needs; it measures whether
intervals cover as often as they say.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, get_args

import numpy as np

from molora_fed.forecasting.divergence import compute_gains, keep_own_losses
from molora_fed.testing.findings import (
    CheckResult,
    Remark,
    describe_raised,
    examine,
    refuse_broken,
)
from molora_fed.testing.targets import open_target, other_chance
from molora_fed.types import Case, Forecast, LossMatrix, Outcome, Reference

__all__ = [
    "build_case",
    "build_outcome",
    "build_past",
    "check_gain_predictor_conformance",
    "examine_gain_predictor",
]

NUM_DRAWS = 60
"""Cases that coverage is measured on, each with a past of its own."""

NUM_PAST = 7
"""Groups of a past: enough for an interval of level 0.8."""

SURE = 1e-3
"""How rarely an honest predictor is refused for bad luck; draws are fixed, so once for all."""

PILOT_SHARE = 0.1


def build_case(
    num_domains: int = 3,
    *,
    seed: int = 0,
    specialists: int = 1,
    with_pilots: bool = False,
    is_extrapolated: bool = False,
    is_full: bool = True,
    group: str = "case",
) -> Case:
    """Make up what a gain is forecast from.

    Args:
        num_domains: Domains, each with specialists of its own.
        seed: Of all losses.
        specialists: Specialists of a domain.
        with_pilots: Whether there are losses after a tenth of the steps.
        is_extrapolated: Whether the losses count as extrapolated from the pilots.
        is_full: Whether specialists' losses off their own domains are known.
        group: The condition, see `molora_fed.types.Case`.

    Returns:
        Losses in nats per token: base 3 to 5, specialists 4 to 18 percent lower on their own
        domains, and up to 6 percent higher elsewhere.
    """
    draw = np.random.default_rng([seed, num_domains, specialists])
    domains = tuple(f"domain-{index}" for index in range(num_domains))
    base = {domain: float(draw.uniform(3, 5)) for domain in domains}
    own_domain = {f"{d}-{copy_}": d for d in domains for copy_ in range(specialists)}
    learnt = {
        name: {
            domain: float(draw.uniform(-0.18, -0.04) if domain == own else draw.uniform(0, 0.06))
            for domain in domains
        }
        for name, own in own_domain.items()
    }

    def scale(share: float) -> LossMatrix:
        losses = {
            name: {domain: base[domain] * (1 + share * row[domain]) for domain in domains}
            for name, row in learnt.items()
        }
        return LossMatrix(domains, dict(base), losses, dict(own_domain))

    full = scale(1.0)
    return Case(
        losses=full if is_full else keep_own_losses(full),
        group=group,
        pilots=scale(0.4) if with_pilots else None,
        is_extrapolated=is_extrapolated,
        share=PILOT_SHARE if with_pilots else None,
    )


def build_outcome(case: Case, *, seed: int = 0) -> Outcome:
    """Make up how a case came out: about what the best expert of every domain gives.

    Args:
        case: Its losses, all of them.
        seed: Of what the router lost or gained beyond that, half a percent of the loss about.
    """
    draw = np.random.default_rng([seed, 1])
    rows = [case.losses.base, *case.losses.specialists.values()]
    fused = {
        domain: min(row[domain] for row in rows) * (1 + float(draw.normal(0, 0.005)))
        for domain in case.losses.domains
    }
    return Outcome(case, compute_gains(case.losses, fused))


def build_past(num_groups: int = NUM_PAST, *, seed: int = 0, **shape: Any) -> tuple[Outcome, ...]:
    """Make up past outcomes, each of a group of its own.

    Args:
        num_groups: How many.
        seed: Of losses and outcomes.
        shape: What the cases are like, see `build_case`.
    """
    seeds = [10_000 * (seed + 1) + index for index in range(num_groups)]
    cases = [build_case(seed=each, group=f"group-{each}", **shape) for each in seeds]
    return tuple(build_outcome(case, seed=each) for case, each in zip(cases, seeds, strict=True))


def check_gain_predictor_conformance(target: Any, options: Any = None) -> None:
    """Check a gain predictor against the whole contract, on made-up losses.

    Args:
        target: What is registered: a function, or a class with options.
        options: Options of the class; its defaults if None.

    Raises:
        PluginError: Naming every rule that is broken, with what was found.
    """
    title = f"Gain predictor '{getattr(target, '__name__', target)}'"
    refuse_broken(
        title, examine_gain_predictor(target, options), page="docs/hooks/gain-predictors.md"
    )


def examine_gain_predictor(target: Any, options: Any = None) -> tuple[CheckResult, ...]:
    """What `check_gain_predictor_conformance` finds, one result a check.

    Args:
        target: What is registered: a function, or a class with options.
        options: Options of the class; its defaults if None.
    """
    name = "forecasts a usual case"
    try:
        predictor = open_target(target, options)
        fault = _find_forecast_fault(predictor(build_case(), build_past()))
    except (Exception, SystemExit) as error:
        fault = f"expected a Forecast or None, got {describe_raised(error)}"
    if fault is not None:  # nothing else can be asked of it
        return (CheckResult(name, fault),)
    return (CheckResult(name), *examine(_CHECKS, _Subject(predictor)))


@dataclass(frozen=True)
class _Subject:
    predict: Callable[[Case, Sequence[Outcome]], Any]


def _gives_a_forecast_or_none(subject: _Subject) -> str | None:
    for what, case, past in _list_situations():
        fault = _find_forecast_fault(subject.predict(case, past))
        if fault is not None:
            return f"{fault}, {what}"
    return None


def _find_forecast_fault(found: Any) -> str | None:
    """Describe what a predictor may not give, or None.

    What a `Forecast` claims is checked when it is made; one that was changed since is looked at.
    """
    if found is None:
        return None
    if not isinstance(found, Forecast):
        return f"expected a Forecast or None, got {type(found).__name__}"
    again = replace(found)  # refuses what cannot be claimed
    if again.reference not in get_args(Reference):
        return f"expected a known reference, got {again.reference!r}"
    return None


def _forecasts_whatever_is_missing(subject: _Subject) -> str | None:
    failed = []
    for what, case, past in _list_situations():
        try:
            subject.predict(case, past)
        except (Exception, SystemExit) as error:
            failed.append(f"{describe_raised(error)} {what}")
    if not failed:
        return None
    return f"expected None where evidence is missing, got {' and '.join(failed[:3])}"


def _list_situations() -> list[tuple[str, Case, tuple[Outcome, ...]]]:
    """Cases that a predictor meets, and how they are told of."""
    past = build_past()
    pilots: dict[str, Any] = {"with_pilots": True, "is_extrapolated": True}
    lone, one = build_case(1), build_case(2)
    only = next(iter(one.losses.specialists))
    alone = replace(
        one.losses,
        specialists={only: one.losses.specialists[only]},
        own_domain={only: one.losses.own_domain[only]},
    )
    return [
        ("with all losses known", build_case(), past),
        ("without any past", build_case(), ()),
        ("with one past outcome", build_case(), past[:1]),
        ("with a past of pilots", build_case(), build_past(**pilots)),
        ("without losses off the own domain", build_case(is_full=False), past),
        ("without any past and losses off the own domain", build_case(is_full=False), ()),
        ("from pilots", build_case(**pilots), build_past(**pilots)),
        ("from pilots without any past", build_case(**pilots), ()),
        ("from pilots with a past without pilots", build_case(**pilots), past),
        ("with one domain and one specialist", lone, ()),
        ("with one specialist of two domains", replace(one, losses=alone), past),
        ("with two specialists of one domain", build_case(1, specialists=2), past),
        ("with two specialists a domain", build_case(2, specialists=2), past),
        ("with sixteen domains", build_case(16), past),
        ("without a group", build_case(group=""), past),
    ]


def _is_deterministic(subject: _Subject) -> str | None:
    case, past = build_case(), build_past()
    first = subject.predict(case, past)
    with other_chance():
        second = subject.predict(copy.deepcopy(case), copy.deepcopy(past))
    if first == second:
        return None
    return "expected the same forecast from the same case and past, got another"


def _leaves_case_and_past_unchanged(subject: _Subject) -> str | None:
    for what, case, past in _list_situations():
        before = copy.deepcopy((case, past))
        subject.predict(case, past)
        if (case, past) != before:
            return f"expected case and past as they were, got them changed, {what}"
    return None


def _covers_as_often_as_it_says(subject: _Subject) -> str | None:
    covered, levels = 0, []
    for seed in range(NUM_DRAWS):
        case = build_case(seed=seed)
        found = subject.predict(case, build_past(seed=seed))
        if found is None or found.level is None:
            continue
        gain = build_outcome(case, seed=seed).gains[found.reference]
        low = -np.inf if found.low is None else found.low
        high = np.inf if found.high is None else found.high
        covered += bool(low <= gain <= high)
        levels.append(found.level)
    if not levels:
        return Remark("no interval was given, so none was held against outcomes")
    level = fmean(levels)
    fewest = _count_fewest(len(levels), level)
    if covered < fewest:
        return (
            f"expected intervals of level {level:.2f} to hold at least {fewest} of {len(levels)} "
            f"outcomes, got {covered}"
        )
    return Remark(f"{covered} of {len(levels)} outcomes inside intervals of level {level:.2f}")


def _count_fewest(draws: int, level: float) -> int:
    """How many of the draws an honest level covers at least, but for bad luck (binomial)."""
    below = 0.0
    for count in range(draws + 1):
        below += math.comb(draws, count) * level**count * (1 - level) ** (draws - count)
        if below > SURE:
            return count
    return draws


_CHECKS: tuple[Callable[[_Subject], str | None], ...] = (
    _gives_a_forecast_or_none,
    _forecasts_whatever_is_missing,
    _is_deterministic,
    _leaves_case_and_past_unchanged,
    _covers_as_often_as_it_says,
)
