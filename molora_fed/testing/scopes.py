"""Conformance checks of fitness scopes, on made-up losses.

`check_scope_conformance(measure)` is the whole test a plugin's fitness scope needs.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from molora_fed.evaluation.moments import build_stand_ins, measure_moments
from molora_fed.hookspecs import check_callable
from molora_fed.population.contract import Fitness, LossTable
from molora_fed.population.lifecycle import find_fitness_faults
from molora_fed.testing.findings import CheckResult, refuse_broken
from molora_fed.testing.populations import build_loss_table
from molora_fed.testing.targets import Target, describe_target, examine_target, other_chance

__all__ = ["check_scope_conformance", "examine_scope"]

TOLERANCE_NATS = 1e-9


def check_scope_conformance(scope: Any, options: Any = None, *, name: str | None = None) -> None:
    """Check a fitness scope against the whole contract, on made-up losses.

    Args:
        scope: What is registered.
        options: Those of a class with options; its defaults if None.
        name: The name it is registered under; any one name will do if None.

    Raises:
        PluginError: Naming every rule that is broken, with what was found.
    """
    title = describe_target("fitness scope", scope)
    refuse_broken(
        title, examine_scope(scope, options, name=name), page="docs/hooks/fitness-scopes.md"
    )


def examine_scope(
    scope: Any, options: Any = None, *, name: str | None = None
) -> tuple[CheckResult, ...]:
    """What `check_scope_conformance` finds, one result a check.

    Args:
        scope: What is registered.
        options: Those of a class with options; its defaults if None.
        name: The name it is registered under; any one name will do if None.
    """
    return examine_target(_CHECKS, _Case(scope, options, name), contract=check_callable)


@dataclass(frozen=True)
class _Case(Target):
    name: str | None = None

    def measure(self, table: LossTable) -> Fitness:
        fitness: Fitness = self.make()(table)
        return fitness


def _list_tables() -> Iterator[tuple[str, LossTable]]:
    yield "four slots", build_loss_table()
    yield "one slot", build_loss_table(1)
    yield "two clusters a domain", build_loss_table(clusters=2)
    yield "two domains", build_loss_table(domains=("one", "two"))


def _gives_a_finite_fitness(case: _Case) -> str | None:
    for what, table in _list_tables():
        fitness = case.measure(table)
        if not isinstance(fitness, Fitness):
            return f"expected a Fitness of {what}, got {type(fitness).__name__}"
        if faults := find_fitness_faults(fitness, table):
            return f"expected a finite fitness of {what}, got {'; '.join(faults)}"
        if not (fitness.errors >= 0).all():
            return f"expected standard errors of {what} from 0, got others"
    return None


def _says_its_registered_name(case: _Case) -> str | None:
    names = {case.measure(table).scope for _, table in _list_tables()}
    if names == {case.name} or (case.name is None and len(names) == 1 and all(names)):
        return None
    wanted = "one name" if case.name is None else f"'{case.name}'"
    return f"expected a Fitness of scope {wanted}, got {', '.join(sorted(map(repr, names)))}"


def _leaves_the_table_alone(case: _Case) -> str | None:
    table = build_loss_table()
    before = copy.deepcopy(table)
    case.measure(table)
    for one in fields(LossTable):
        if not np.array_equal(getattr(table, one.name), getattr(before, one.name)):
            return f"expected the losses as they were, got other {one.name}"
    return None


def _follows_from_the_losses(case: _Case) -> str | None:
    found = []
    for chance in (0, 991):
        with other_chance(chance):
            found.append(case.measure(build_loss_table()))
    if _differ(found[0], found[1], tolerance=0.0):
        return "expected the same fitness from the same losses, got another"
    return None


def _is_blind_to_the_order_of_clusters(case: _Case) -> str | None:
    table = build_loss_table()
    order = np.random.default_rng(3).permutation(len(table.counts))
    columns = {n: getattr(table, n)[order] for n in ("domain_of", "counts", "base", "full")}
    moved = replace(table, **columns, without=table.without[:, order])
    if wrong := _differ(case.measure(table), case.measure(moved)):
        return f"expected a fitness that the clusters' order does not change, got other {wrong}"
    return None


def _needs_sums_over_clusters_alone(case: _Case) -> str | None:
    """On private texts the clusters are stand-ins with the same number and sums."""
    table = build_loss_table()
    slots = {f"slot {i}": one - table.full for i, one in enumerate(table.without)}
    moments = []
    for domain in range(len(table.domains)):
        own = table.domain_of == domain
        figures = {"base": table.base, "full": table.full, **slots}
        columns = {name: column[own] for name, column in figures.items()}
        moments.append(measure_moments(table.counts[own], columns))
    made = build_stand_ins(moments)
    full = made.columns["full"]
    without = np.stack([full + made.columns[name] for name in slots])
    private = replace(
        table,
        domain_of=made.domain_of,
        counts=made.counts,
        base=made.columns["base"],
        full=full,
        without=without,
    )
    if wrong := _differ(case.measure(table), case.measure(private)):
        return (
            "expected a fitness that follows from the clusters' sums, as on private texts, got "
            f"other {wrong}"
        )
    return None


def _takes_slots_as_they_come(case: _Case) -> str | None:
    table, order = build_loss_table(), [2, 0, 3, 1]
    here = case.measure(table)
    there = case.measure(replace(table, without=table.without[order]))
    rows = {n: getattr(here, n)[order] for n in ("values", "errors", "by_domain")}
    if wrong := _differ(replace(here, **rows), there):
        return f"expected a fitness that moves with its slot, got other {wrong}"
    return None


def _gives_nothing_for_nothing(case: _Case) -> str | None:
    table = build_loss_table()
    table.without[1] = table.full
    value = float(case.measure(table).values[1])
    if abs(value) <= TOLERANCE_NATS:
        return None
    return f"expected 0 nats for a slot without which nothing changes, got {value:.4g}"


def _prefers_what_would_be_missed(case: _Case) -> str | None:
    helping, harming = case.measure(build_loss_table(2, effects=(0.2, -0.2))).values
    if helping > harming:
        return None
    return (
        "expected a slot that all domains would miss to be worth more than one that harms them, "
        f"got {helping:.4g} and {harming:.4g} nats"
    )


_CHECKS: Sequence[Callable[[_Case], str | None]] = (
    _gives_a_finite_fitness,
    _says_its_registered_name,
    _leaves_the_table_alone,
    _follows_from_the_losses,
    _is_blind_to_the_order_of_clusters,
    _needs_sums_over_clusters_alone,
    _takes_slots_as_they_come,
    _gives_nothing_for_nothing,
    _prefers_what_would_be_missed,
)


def _differ(one: Fitness, other: Fitness, *, tolerance: float = TOLERANCE_NATS) -> str | None:
    """Name of the first part in which two fitnesses differ."""
    for name in ("values", "errors", "by_domain", "regret"):
        if not np.allclose(getattr(one, name), getattr(other, name), rtol=0.0, atol=tolerance):
            return name
    return None
