"""The lines of a lineage, and how a run's objects become them."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from molora_fed.population.contract import Birth, Fitness, LifecycleState, Population

__all__ = [
    "Change",
    "Measured",
    "Measurement",
    "Newborn",
    "describe_change",
    "describe_fitness",
    "describe_start",
]

_Name = Annotated[str, Field(max_length=256)]


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Newborn(_Line):
    """An adapter's birth.

    Attributes:
        slot: Where it lives.
        domain: Domain it is meant for; None if for none in particular.
        id, operator, parents, generation, seed, fitness_before: See `Birth`.
    """

    slot: int = Field(ge=0)
    domain: _Name | None
    id: str = Field(min_length=1, max_length=256)
    operator: _Name
    parents: tuple[_Name, ...] = Field(max_length=64)
    generation: int = Field(ge=0)
    seed: int
    fitness_before: float | None

    @property
    def birth(self) -> Birth:
        """The birth alone."""
        return Birth(**self.model_dump(exclude={"slot", "domain"}))


class Measured(_Line):
    """An adapter's fitness.

    Attributes:
        id: Of its birth.
        value: Nats per token.
        error: Standard error by document cluster.
        by_domain: The same for each domain.
    """

    id: str = Field(min_length=1, max_length=256)
    value: float
    error: float = Field(ge=0)
    by_domain: tuple[float, ...] = Field(max_length=1024)


class Measurement(_Line):
    """A line: fitness of all slots at the start of a generation.

    Attributes:
        generation: Its number, from 1.
        scope: Registered name of the fitness scope.
        domains: Domain names.
        slots: Fitness of each slot, in order.
    """

    kind: Literal["fitness"] = "fitness"
    generation: int = Field(ge=1)
    scope: _Name
    domains: tuple[_Name, ...] = Field(max_length=1024)
    slots: tuple[Measured, ...] = Field(min_length=1, max_length=1024)


class Change(_Line):
    """A line: what a generation's lifecycle did; generation 0 is the start.

    Attributes:
        generation: Its number.
        kept: Whether the population went on with it; else with the twin without a lifecycle.
        births: Newborns in the order of their slots.
        deaths: Ids of the adapters they replaced, in the same order; none at the start.
        events: Lines for people.
    """

    kind: Literal["change"] = "change"
    generation: int = Field(ge=0)
    kept: bool
    births: tuple[Newborn, ...] = Field(max_length=1024)
    deaths: tuple[_Name, ...] = Field(max_length=1024)
    events: tuple[str, ...] = Field(default=(), max_length=4096)


def describe_start(population: Population) -> Change:
    """The first line: all slots of the first generation are born."""
    births = _list_births(population, range(population.num_slots))
    return Change(generation=0, kept=True, births=births, deaths=())


def describe_fitness(
    population: Population, fitness: Fitness, domains: Sequence[str], generation: int
) -> Measurement:
    """The line of a measurement, taken at the start of a generation."""
    slots = tuple(
        Measured(
            id=slot.birth.id,
            value=float(fitness.values[index]),
            error=float(fitness.errors[index]),
            by_domain=tuple(float(value) for value in fitness.by_domain[index]),
        )
        for index, slot in enumerate(population.slots)
    )
    return Measurement(
        generation=generation, scope=fitness.scope, domains=tuple(domains), slots=slots
    )


def describe_change(before: Population, state: LifecycleState, *, kept: bool) -> Change:
    """The line of a lifecycle, written once the guard has decided.

    Args:
        before: The population before the lifecycle.
        state: What the lifecycle left.
        kept: Whether the population goes on with it.
    """
    after = state.population
    newborn = [
        index
        for index, slot in enumerate(after.slots)
        if slot.birth.id != before.slots[index].birth.id
    ]
    return Change(
        generation=state.generation,
        kept=kept,
        births=_list_births(after, newborn),
        deaths=tuple(before.slots[index].birth.id for index in newborn),
        events=tuple(state.events),
    )


def _list_births(population: Population, slots: Sequence[int]) -> tuple[Newborn, ...]:
    chosen = [(index, population.slots[index]) for index in slots]
    return tuple(Newborn(slot=i, domain=s.domain, **asdict(s.birth)) for i, s in chosen)
