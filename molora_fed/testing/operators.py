"""Conformance checks of lifecycle operators, on made-up populations.

`check_operator_conformance(MyOperator)` is the whole test a plugin's operator needs: whatever state
it is handed, it leaves the population's slots in order, and the same bytes for the same seed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from molora_fed.adapters.updates import LinearUpdate
from molora_fed.errors import MoloraError
from molora_fed.hookspecs import check_operator
from molora_fed.population.contract import (
    LifecycleOperator,
    LifecycleState,
    OperatorOptions,
    Population,
)
from molora_fed.population.lifecycle import find_changes, find_step_faults, sum_up
from molora_fed.testing.findings import CheckResult, refuse_broken
from molora_fed.testing.populations import build_lifecycle_state
from molora_fed.testing.targets import Target, describe_target, examine_target, other_chance

__all__ = ["check_operator_conformance", "examine_operator"]

SEED = 5


def check_operator_conformance(
    operator: type[LifecycleOperator], options: OperatorOptions | None = None
) -> None:
    """Check a lifecycle operator against the whole contract, on made-up populations.

    Args:
        operator: The class that is registered.
        options: Its options; its defaults if None.

    Raises:
        PluginError: Naming every rule that is broken, with what was found.
    """
    title = describe_target("lifecycle operator", operator)
    refuse_broken(
        title, examine_operator(operator, options), page="docs/hooks/lifecycle-operators.md"
    )


def examine_operator(
    operator: type[LifecycleOperator], options: OperatorOptions | None = None
) -> tuple[CheckResult, ...]:
    """What `check_operator_conformance` finds, one result a check.

    Args:
        operator: The class that is registered.
        options: Its options; its defaults if None.
    """
    return examine_target(_CHECKS, Target(operator, options), contract=check_operator)


@dataclass(frozen=True)
class _Situation:
    """What an operator is handed.

    Attributes:
        name: In words.
        build: Makes the state.
        start: Makes the population before the generation's first operator; that of the state if
            None.
        refusable: Whether an operator may refuse it in one line: nobody can be a parent, say.
    """

    name: str
    build: Callable[[], LifecycleState]
    start: Callable[[], Population] | None = None
    refusable: bool = False


def _build_newborn() -> LifecycleState:
    """What an operator leaves that filled slot 2 with a child of slot 0."""
    state = build_lifecycle_state(generations=(0, 1, 3, 2))
    slots = list(state.population.slots)
    birth = replace(slots[2].birth, operator="before", parents=(slots[0].birth.id,))
    slots[2] = replace(slots[2], birth=birth)
    population = replace(state.population, slots=tuple(slots))
    return replace(state, population=population, parents={2: 0}, events=("'g3-s2' is born",))


def _build_dense() -> LifecycleState:
    """Slot 0 has a dense difference in place of factors."""
    state = build_lifecycle_state(freed=(2,))
    first, *others = state.population.slots
    updates = {n: LinearUpdate(dense=u.product()) for n, u in first.updates.items()}
    slots = (replace(first, updates=updates), *others)
    return replace(state, population=replace(state.population, slots=slots))


def _build_stale() -> LifecycleState:
    """Slots that were below any threshold for long."""
    state = build_lifecycle_state((-0.3, -0.2, -0.1, -0.4), generation=9)
    slots = tuple(replace(slot, stale=7) for slot in state.population.slots)
    return replace(state, population=replace(state.population, slots=slots))


_SITUATIONS = (
    _Situation("four slots alive", build_lifecycle_state),
    _Situation("four slots long unfit", _build_stale),
    _Situation("slot 2 freed", lambda: build_lifecycle_state(freed=(2,))),
    _Situation("slots 0 and 3 freed", lambda: build_lifecycle_state(freed=(0, 3))),
    _Situation(
        "a slot freed that is for no domain",
        lambda: build_lifecycle_state(freed=(1,), domains=(None,)),
    ),
    _Situation(
        "a newborn in slot 2",
        _build_newborn,
        lambda: build_lifecycle_state(generations=(0, 1, 0, 2)).population,
    ),
    _Situation("one slot, alive", lambda: build_lifecycle_state((0.1,), ranks=(2,))),
    _Situation(
        "one of two slots freed",
        lambda: build_lifecycle_state((0.1, 0.2), ranks=(2, 3), freed=(0,)),
        refusable=True,
    ),
    _Situation(
        "one slot, freed",
        lambda: build_lifecycle_state((0.1,), ranks=(2,), freed=(0,)),
        refusable=True,
    ),
    _Situation(
        "all slots freed", lambda: build_lifecycle_state(freed=(0, 1, 2, 3)), refusable=True
    ),
)
_DENSE = _Situation("a dense difference in slot 0", _build_dense, refusable=True)


@dataclass(frozen=True)
class _Result:
    """What an operator did in one situation."""

    name: str
    before: LifecycleState
    after: LifecycleState
    start: Population


def _run(case: Target, situation: _Situation, *, chance: int = 0) -> _Result | None:
    """What a fresh operator leaves; None where it may refuse and does."""
    state = situation.build()
    start = state.population if situation.start is None else situation.start()
    with other_chance(chance):
        try:
            after = case.make().apply(state, SEED)
        except MoloraError:
            if situation.refusable:
                return None
            raise
    return _Result(situation.name, state, after, start)


def _run_all(case: Target) -> Iterator[_Result]:
    for situation in _SITUATIONS:
        if (result := _run(case, situation)) is not None:
            yield result


def _gives_a_state(case: Target) -> str | None:
    for result in _run_all(case):
        if not isinstance(result.after, LifecycleState):
            found = type(result.after).__name__
            return f"expected a LifecycleState with {result.name}, got {found}"
    return None


def _keeps_slots_and_declares_newborns(case: Target) -> str | None:
    for result in _run_all(case):
        faults = find_step_faults(result.before, result.after, result.start)
        if faults:
            return (
                f"expected usable slots with {result.name}, newborns with their gates' parent, "
                f"got {'; '.join(faults)}"
            )
    return None


def _names_newborns_by_generation_and_slot(case: Target) -> str | None:
    for result in _run_all(case):
        places = zip(result.start.slots, result.after.population.slots, strict=True)
        for index, (old, new) in enumerate(places):
            wanted = f"g{result.after.generation}-s{index}"
            if new.birth.id not in (old.birth.id, wanted):
                return (
                    f"expected the id '{wanted}' of a newborn with {result.name}, got "
                    f"'{new.birth.id}'"
                )
            if new.birth.id == wanted and not new.birth.operator:
                return f"expected the operator's name in the birth of '{wanted}', got none"
    return None


def _leaves_survivors_as_they_are(case: Target) -> str | None:
    for result in _run_all(case):
        # Who was born in this generation may be changed by the operators after its own.
        sums = sum_up(result.start)
        changed = find_changes(sums, result.before.population, result.after.population)
        if changed:
            return (
                f"expected adapters that stay or are replaced by newborns with {result.name}, got "
                f"changed tensors of {', '.join(changed)}"
            )
    return None


def _changes_nothing_in_place(case: Target) -> str | None:
    for situation in _SITUATIONS:
        result = _run(case, situation)
        if result is None:
            continue
        kept, fresh = result.before, situation.build()
        same = sum_up(kept.population) == sum_up(fresh.population)
        same = same and all(
            np.array_equal(getattr(kept.fitness, name), getattr(fresh.fitness, name))
            for name in ("values", "errors", "by_domain", "regret")
        )
        plain = [(s.parents, s.freed, s.events, _list_slots(s)) for s in (kept, fresh)]
        if not same or plain[0] != plain[1]:
            return f"expected the state it was handed as it was with {situation.name}, got changes"
    return None


def _follows_from_state_and_seed(case: Target) -> str | None:
    for situation in _SITUATIONS:
        results = [_run(case, situation, chance=chance) for chance in (0, 991)]
        found = [None if one is None else _describe(one.after) for one in results]
        if found[0] != found[1]:
            return f"expected the same bytes from one seed with {situation.name}, got others"
    return None


def _has_no_memory(case: Target) -> str | None:
    operator = case.make()
    for situation in _SITUATIONS:
        if situation.refusable:
            continue
        once, again = (_describe(operator.apply(situation.build(), SEED)) for _ in range(2))
        if once != again:
            return f"expected the same bytes when it runs again with {situation.name}, got others"
    return None


def _says_events_in_lines(case: Target) -> str | None:
    for result in _run_all(case):
        before, after = result.before.events, result.after.events
        if tuple(after[: len(before)]) != tuple(before):
            return f"expected the events before to stay with {result.name}, got others"
        if any(not isinstance(one, str) or len(one.splitlines()) != 1 for one in after):
            return f"expected events of one line each with {result.name}, got {after!r}"
    return None


def _handles_or_refuses_dense_updates(case: Target) -> str | None:
    result = _run(case, _DENSE)
    if result is None or sum_up(result.before.population) == sum_up(_build_dense().population):
        return None
    return "expected a dense update as it was, or a PopulationError, got changes in place"


_CHECKS: tuple[Callable[[Target], str | None], ...] = (
    _gives_a_state,
    _keeps_slots_and_declares_newborns,
    _names_newborns_by_generation_and_slot,
    _leaves_survivors_as_they_are,
    _changes_nothing_in_place,
    _follows_from_state_and_seed,
    _has_no_memory,
    _says_events_in_lines,
    _handles_or_refuses_dense_updates,
)


def _list_slots(state: LifecycleState) -> list[object]:
    return [(slot.birth, slot.domain, slot.stale) for slot in state.population.slots]


def _describe(state: LifecycleState) -> object:
    """All of a state that must not depend on chance, tensors by their checksums."""
    sums = sum_up(state.population)
    return (sums, _list_slots(state), state.freed, dict(state.parents), list(state.events))
