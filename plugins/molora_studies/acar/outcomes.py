"""What every configuration of the study `acar` makes of the answers in its table.

Everything is decided by `molora_fed.cascade.escalation.decide`, as a cascade decides; nothing is
sampled again. The order of members and the calibrated policy are chosen on calibration tasks,
results are on test tasks.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
from molora_acar.calibration import Observation, fit_calibration
from molora_acar.calibration_table import Calibration
from molora_acar.policies import AlwaysPolicy

from molora_fed.cascade.attribution import compute_entropy, compute_similarities, decide_without
from molora_fed.cascade.contract import MODES
from molora_fed.cascade.escalation import Decision, Lineup
from molora_studies.acar.cases import JUDGES, SIGMA, Case, open_case
from molora_studies.acar.measures import pack_numbers, unpack_numbers
from molora_studies.framework.contract import TaskContext

__all__ = ["BUDGETS", "decide_all"]

BUDGETS = 25
"""Points of the calibrated policy's frontier."""

_PROBE = "probe"


_ALWAYS = {mode: AlwaysPolicy(AlwaysPolicy.Options(mode=mode)) for mode in MODES}


Outcome = dict[str, Any]
"""Of one configuration on all tasks, as texts: `correct` and `mode` with a digit a task, and
`cost`; of a policy of the cascade `mode` alone, since the other two are those of that mode."""


def _settle(decisions: Sequence[Decision]) -> Outcome:
    return {
        "correct": _join(int(bool(one.correct)) for one in decisions),
        "cost": pack_numbers(one.cost.flops for one in decisions),
        "mode": _join(MODES.index(one.mode) for one in decisions),
    }


def _join(digits: Iterable[int]) -> str:
    return "".join(map(str, digits))


def _order_members(cases: Sequence[Case]) -> tuple[tuple[str, ...], dict[str, float]]:
    """Members from the best on calibration tasks to the worst, and their accuracies."""
    names = sorted(cases[0].members)
    share = {
        name: float(
            np.mean([one.decide(Lineup(None, (name,)), "majority").correct for one in cases])
        )
        for name in names
    }
    return tuple(sorted(names, key=lambda name: (-share[name], name))), share


def _compare_judges(cases: Sequence[Case], lineup: Lineup) -> dict[str, float]:
    """How often all members are right on calibration tasks, by judge."""
    arena = replace(lineup, probe=None)
    return {
        name: float(np.mean([bool(one.decide(arena, name).correct) for one in cases]))
        for name in JUDGES
    }


def _observe(cases: Sequence[Case], lineup: Lineup, judge: str) -> list[Observation]:
    """What became of tasks in every mode."""
    observed = []
    for one in cases:
        found = {mode: one.decide(lineup, judge, policy) for mode, policy in _ALWAYS.items()}
        observed.append(
            Observation(
                one.find_evidence(),
                {mode: bool(decision.correct) for mode, decision in found.items()},
                {mode: decision.cost.flops for mode, decision in found.items()},
            )
        )
    return observed


def _hide_families(observed: Sequence[Observation]) -> list[Observation]:
    """The same without what a task is of, as the plain rule sees it."""
    hidden = []
    for one in observed:
        task = replace(one.evidence.task, family="")
        hidden.append(replace(one, evidence=replace(one.evidence, task=task)))
    return hidden


def _trace_calibrated(
    calibration: Calibration, observed: Sequence[Observation]
) -> dict[str, list[str]]:
    """Modes of test tasks at the plain rule's budget, and from the least budget to none at all."""

    def choose(rate: float) -> str:
        return _join(MODES.index(calibration.choose(one.evidence, rate)) for one in observed)

    rates = [one.rate for one in calibration.frontier]
    places = np.unique(np.linspace(0, len(rates) - 1, BUDGETS).round().astype(int))
    return {
        "at the rule's budget": [choose(calibration.rate())],
        "frontier": [choose(rates[at]) for at in places[::-1]],
    }


def _find_oracle(found: Mapping[str, Outcome], names: Sequence[str]) -> Outcome:
    """Right where any of these is, at the price of the cheapest that is; else the cheapest."""
    correct = np.array([[int(digit) for digit in found[name]["correct"]] for name in names])
    cost = np.stack([unpack_numbers(found[name]["cost"]) for name in names])
    best = np.where(correct.astype(bool), cost, cost + cost.max() * 2).argmin(axis=0)
    every = np.arange(correct.shape[1])
    return {
        "correct": _join(correct[best, every].tolist()),
        "cost": pack_numbers(cost[best, every]),
        "mode": "0" * correct.shape[1],
    }


def _attribute(cases: Sequence[Case], lineup: Lineup, judge: str) -> dict[str, Any]:
    """Value of each model by counterfactual runs, and the proxies, a number a task and model."""
    arena = replace(lineup, probe=None)
    values: dict[str, list[float]] = {name: [] for name in (_PROBE, *lineup.members)}
    arenas: dict[str, list[float]] = {name: [] for name in lineup.members}
    similarity: dict[str, list[float]] = {name: [] for name in lineup.members}
    entropy: dict[str, list[float]] = {name: [] for name in lineup.members}
    for one in cases:
        whole = bool(one.decide(lineup, judge).correct)
        given = (one.task, lineup, one.probe, one.members, one.rules(SIGMA, judge))
        for name in values:
            without = decide_without(name, *given, models=one.models)
            values[name].append(whole - bool(without.correct))
        everyone = bool(one.decide(arena, judge).correct)
        answers = {name: one.answers[sample.text] for name, sample in one.members.items()}
        alike = compute_similarities({name: one.members[name].text for name in lineup.members})
        for name in lineup.members:
            left = replace(arena, members=tuple(m for m in arena.members if m != name))
            arenas[name].append(everyone - bool(one.decide(left, judge).correct))
            similarity[name].append(round(alike[name], 4))
            others = [answer for other, answer in answers.items() if other != name]
            less = compute_entropy(others) - compute_entropy(list(answers.values()))
            entropy[name].append(round(less, 4))
    every = {"cascade": values, "arena": arenas, "similarity": similarity, "entropy": entropy}
    return {
        kind: {name: pack_numbers(numbers) for name, numbers in own.items()}
        for kind, own in every.items()
    }


def _decide_configurations(
    cases: Sequence[Case], retrieved: Sequence[Case], lineup: Lineup, judge: str
) -> dict[str, Any]:
    """All fixed configurations of the paper, and the modes for every task."""
    arena = replace(lineup, probe=None)

    def settle(chosen: Sequence[Case], line: Lineup, **how: Any) -> Outcome:
        return _settle(
            [one.decide(line, how.get("judge", judge), how.get("policy", SIGMA)) for one in chosen]
        )

    found = {f"single {name}": settle(cases, Lineup(None, (name,))) for name in lineup.members}
    for first, second in combinations(lineup.members, 2):
        found[f"pair {first} {second}"] = settle(cases, Lineup(None, (first, second)))
    found["arena-3"] = settle(cases, arena)
    found["ACAR-U"] = {"mode": settle(cases, lineup)["mode"]}
    found["ACAR-UJ always"] = settle(retrieved, lineup)
    found["arena-3 with retrieval"] = settle(retrieved, arena)
    for mode, policy in _ALWAYS.items():
        found[f"probe, {mode}"] = settle(cases, lineup, policy=policy)
    for name in JUDGES:
        found[f"arena-3 by {name}"] = settle(cases, arena, judge=name)
        found[f"ACAR-U by {name}"] = settle(cases, lineup, judge=name)
    return found


def decide_all(settings: Mapping[str, Any], context: TaskContext) -> dict[str, Any]:
    """Decide all tasks in all configurations; see `recipe.plan_outcomes`.

    Returns:
        `outcomes` (by configuration, see `Outcome`), `frontiers` of the calibrated policy (modes
        at every budget), `tasks` (family, level, sigma, similarity), `attribution`, what was
        chosen on calibration tasks, and the calibration's counts.
    """
    table = context.needs[0].result
    cases = {
        split: [open_case(row, row) for row in table[split]] for split in ("calibration", "test")
    }
    tests = cases["test"]
    members, shares = _order_members(cases["calibration"])
    lineup = Lineup(_PROBE, members)
    judge = settings["judge"]
    rows = table["test"]
    retrieved = [open_case(row, row["retrieved"]) for row in rows]
    found = _decide_configurations(tests, retrieved, lineup, judge)
    found["single"] = found[f"single {members[0]}"]
    found["arena-2"] = found[f"pair {members[0]} {members[1]}"]
    similar = [row["retrieved"]["similarity"] for row in rows]
    near = [one >= settings["threshold"] for one in similar]
    found["ACAR-UJ"] = _mix(found["ACAR-UJ always"], found[f"ACAR-U by {judge}"], near)
    found["oracle"] = _find_oracle(found, [f"probe, {MODES[0]}", *(f"single {m}" for m in members)])
    known, observed = (_observe(cases[split], lineup, judge) for split in ("calibration", "test"))
    calibration, blind = fit_calibration(known), fit_calibration(_hide_families(known))
    frontiers = {
        "calibrated": _trace_calibrated(calibration, observed),
        "calibrated, families hidden": _trace_calibrated(blind, _hide_families(observed)),
    }
    for name, one in frontiers.items():
        found[name] = {"mode": one["at the rule's budget"][0]}
    return {
        "outcomes": found,
        "frontiers": {name: one["frontier"] for name, one in frontiers.items()},
        "tasks": {
            "family": " ".join(one.task.family for one in tests),
            "level": pack_numbers(one.task.level for one in tests),
            "sigma": pack_numbers(one.evidence.sigma for one in observed),
            "similarity": pack_numbers(round(one, 4) for one in similar),
        },
        "attribution": _attribute(tests, lineup, judge),
        "members": list(members),
        "judge": judge,
        "calibration": {
            "members": shares,
            "judges": _compare_judges(cases["calibration"], lineup),
            "cells": [cell.model_dump() for cell in calibration.cells],
            "strength": calibration.strength,
        },
        "parameters": table["parameters"],
    }


def _mix(there: Outcome, here: Outcome, where: Sequence[bool]) -> Outcome:
    """Outcomes of `there` where something similar was found, else of `here`."""

    def mix(a: Sequence[Any], b: Sequence[Any]) -> list[Any]:
        return [one if near else other for one, other, near in zip(a, b, where, strict=True)]

    costs = (unpack_numbers(one["cost"]) for one in (there, here))
    return {
        "correct": "".join(mix(there["correct"], here["correct"])),
        "cost": pack_numbers(mix(*(list(one) for one in costs))),
        "mode": "".join(mix(there["mode"], here["mode"])),
    }
