"""Conditions of our own that forecasts are scored on: tasks of the other studies, and subsets.

Equal settings are equal tasks, so most of these are done once the studies `duration`, `freeze`,
`maturity` and `scaling` are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from molora_fed.types import Case, LossMatrix, Outcome
from molora_studies.framework.contract import Task
from molora_studies.framework.substrate import (
    BaseSettings,
    FusionSettings,
    Member,
    SpecialistSettings,
    plan_corpus,
    plan_fusion,
    plan_specialist,
)
from molora_studies.kalavai.conditions import THREE_DOMAINS, plan_aged_base, plan_condition
from molora_studies.kalavai.forecast_verdicts import connect

__all__ = [
    "CONDITIONS",
    "Condition",
    "find_families",
    "leave_relatives_out",
    "parse_matrix",
    "plan_outcome",
    "plan_pilots",
    "read_outcome",
    "share_a_specialist",
]

ROUTER = "evidence"
_PILOT_BLOCKS = 60


@dataclass(frozen=True)
class Condition:
    """One condition: a group of runs that differ in their seed only.

    Attributes:
        name: Unique.
        domains: One contributor each.
        steps: Planned steps of a specialist.
        frozen_depth: K.
        base_steps: Age of the base.
    """

    name: str
    domains: tuple[str, ...] = THREE_DOMAINS
    steps: int = 600
    frozen_depth: int = 0
    base_steps: int = BaseSettings().steps

    @property
    def recipe(self) -> dict[str, Any]:
        """What differs from the usual specialist."""
        return {"steps": self.steps, "frozen_depth": self.frozen_depth}

    def plan_base(self) -> Task:
        """Its base."""
        return plan_aged_base(self.base_steps)


CONDITIONS = (
    Condition("50 steps", steps=50),
    Condition("150 steps", steps=150),
    Condition("600 steps"),
    Condition("1800 steps", steps=1800),
    Condition("three of four blocks frozen", frozen_depth=3),
    Condition("base of 325 steps", base_steps=325),
    Condition("base of 5200 steps", base_steps=5200),
    Condition("cpp, python", ("cpp", "python")),
    Condition("cpp, man-de", ("cpp", "man-de")),
    Condition("readme, science", ("science", "readme")),
    Condition("python, readme", ("python", "readme")),
    Condition("science, man-de", ("science", "man-de")),
    Condition("python, readme, man-de", ("python", "readme", "man-de")),
    Condition("four domains", ("cpp", "python", "science", "readme")),
    Condition("five domains", ("cpp", "python", "science", "readme", "man-de")),
)
"""Settled before any of them was forecast."""


def share_a_specialist(first: Condition, second: Condition) -> bool:
    """Whether a specialist of one is a specialist of the other at the same seed."""
    recipes = [(c.steps, c.frozen_depth, c.base_steps) for c in (first, second)]
    return recipes[0] == recipes[1] and bool(set(first.domains) & set(second.domains))


def plan_outcome(condition: Condition, seed: int) -> Task:
    """The fusion that says what the condition gains."""
    return plan_condition(
        f"{condition.name}, seed {seed}",
        condition.domains,
        seed,
        condition.recipe,
        base=condition.plan_base(),
    )


def plan_pilots(condition: Condition, seed: int, share: float, learning_rate: float) -> Task:
    """Pilots of all contributors, measured on each other's calibration blocks."""
    base = condition.plan_base()
    recipe = {
        **condition.recipe,
        "steps": max(1, int(share * condition.steps)),
        "learning_rate": learning_rate,
        "seed": seed,
    }
    members = []
    for domain in condition.domains:
        corpus = plan_corpus(base, domain)
        adapter = plan_specialist(base, corpus, SpecialistSettings(**recipe))
        members.append(Member(domain, adapter, corpus))
    settings = FusionSettings(merges=(), calibration=_PILOT_BLOCKS, seed=seed)
    name = f"pilots of {condition.name}, seed {seed}"
    task = plan_fusion(name, base, members, settings)
    action = "measure-pilots"
    return replace(task, action=action, seconds=5 + 2.0 * len(members) ** 2)


def parse_matrix(value: Mapping[str, Any]) -> LossMatrix:
    """A loss matrix of a fusion task's result."""
    return LossMatrix(
        tuple(value["domains"]), value["base"], value["specialists"], value["own_domain"]
    )


def read_outcome(condition: Condition, result: Mapping[str, Any]) -> Outcome:
    """What a fusion's calibration losses promised, and what its held-out blocks gave."""
    case = Case(parse_matrix(result["calibration"]), condition.name)
    return Outcome(case, dict(result["gains"][ROUTER]))


def find_families(names: Sequence[str]) -> dict[str, str]:
    """Family of each condition: chains of conditions that share a specialist are one replicate."""
    by_name = {condition.name: condition for condition in CONDITIONS}
    return connect(names, lambda one, other: share_a_specialist(by_name[one], by_name[other]))


def leave_relatives_out(name: str, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Outcomes of conditions that share no specialist with the one of that name."""
    by_name = {condition.name: condition for condition in CONDITIONS}
    return [
        outcome
        for outcome in outcomes
        if not share_a_specialist(by_name[name], by_name[outcome.case.group])
    ]
