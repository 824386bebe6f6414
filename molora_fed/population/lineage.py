"""The lineage of a population, line by line: parents, operator, seed, and fitness in time.

One JSON line per thing that happened, in order: the start (generation 0), then for each generation
the fitness that was measured and the change that followed. Lines are only ever added. Adding a line
that is there already does nothing, so a run that was killed simply does everything again.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from molora_fed.errors import PopulationError
from molora_fed.population.contract import Birth, Fitness, LifecycleState, Population
from molora_fed.storage.files import canonical_json, write_bytes
from molora_fed.storage.settings import describe_offenders

__all__ = [
    "Change",
    "Lineage",
    "LineageMember",
    "Measured",
    "Measurement",
    "Newborn",
    "add_to_lineage",
    "describe_change",
    "describe_fitness",
    "describe_start",
    "read_lineage",
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


MAX_LINEAGE_BYTES = 64 * 2**20

_LINE: TypeAdapter[Measurement | Change] = TypeAdapter(
    Annotated[Measurement | Change, Field(discriminator="kind")]
)


@dataclass(frozen=True)
class LineageMember:
    """One adapter's life.

    Attributes:
        birth: How it came to be.
        slot: Where it lived.
        domain: Domain it was meant for at its birth.
        kept: False if the guard preferred the twin without it: it never lived.
        death: Generation in which another took its slot; None if it lives, or never lived.
        fitness: Value and standard error in nats, by the generation at whose start it was
            measured.
    """

    birth: Birth
    slot: int
    domain: str | None
    kept: bool
    death: int | None
    fitness: Mapping[int, tuple[float, float]]

    @property
    def fitness_after(self) -> float | None:
        """Its own fitness when it was first measured; None if it never was."""
        return next((value for _, (value, _) in sorted(self.fitness.items())), None)


@dataclass(frozen=True)
class Lineage:
    """Everything a lineage file says.

    Attributes:
        lines: Its lines in order.
    """

    lines: tuple[Measurement | Change, ...]

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        """The measurements of fitness, by generation."""
        return tuple(line for line in self.lines if isinstance(line, Measurement))

    @property
    def changes(self) -> tuple[Change, ...]:
        """The changes, by generation."""
        return tuple(line for line in self.lines if isinstance(line, Change))

    @cached_property
    def members(self) -> Mapping[str, LineageMember]:
        """All adapters that were ever born, by id, parents before children."""
        deaths = {i: c.generation for c in self.changes if c.kept for i in c.deaths}
        fitness: dict[str, dict[int, tuple[float, float]]] = {}
        for line in self.measurements:
            for one in line.slots:
                fitness.setdefault(one.id, {})[line.generation] = (one.value, one.error)
        return {
            newborn.id: LineageMember(
                birth=newborn.birth,
                slot=newborn.slot,
                domain=newborn.domain,
                kept=change.kept,
                death=deaths.get(newborn.id),
                fitness=fitness.get(newborn.id, {}),
            )
            for change in self.changes
            for newborn in change.births
        }


def read_lineage(path: Path) -> Lineage:
    """Read a lineage file whose sender is not trusted.

    Raises:
        PopulationError: If it is missing, too large or malformed, or says what cannot be: lines
            out of order, an id born twice, or a death or fitness of somebody not alive.
    """
    try:
        size = path.stat().st_size
        if size > MAX_LINEAGE_BYTES:
            raise _unreadable(path, f"at most {MAX_LINEAGE_BYTES} bytes", str(size))
        lines = path.read_bytes().splitlines()
        return _check(path, tuple(_LINE.validate_json(line) for line in lines))
    except OSError as error:
        raise _unreadable(path, "a file", str(error.strerror)) from error
    except ValidationError as error:
        offenders = describe_offenders(error, whole="line")
        raise _unreadable(path, "lines of a lineage", offenders) from error


def add_to_lineage(path: Path, line: Measurement | Change) -> None:
    """Add a line; the file is whole at every moment. The same line again changes nothing.

    Raises:
        PopulationError: If the file cannot be read, or the line contradicts it: another one is
            there in its place, or it says what cannot be.
        StorageError: On I/O errors.
    """
    lines = read_lineage(path).lines if path.exists() else ()
    for one in lines:
        if _place(one) == _place(line):
            if one == line:
                return
            raise PopulationError(
                f"Cannot add to lineage '{path}': expected the {line.kind} of generation "
                f"{line.generation} that is there, got another. Evolve with the same settings, or "
                "in another folder."
            )
    lineage = _check(path, (*lines, line))
    write_bytes(path, b"".join(_encode(one) + b"\n" for one in lineage.lines))


def _encode(line: Measurement | Change) -> bytes:
    return canonical_json(json.loads(line.model_dump_json()))


def _place(line: Measurement | Change) -> tuple[int, bool]:
    """Where a line belongs: by generation, the fitness before the change."""
    return line.generation, isinstance(line, Change)


def _unreadable(path: Path, expected: str, got: str) -> PopulationError:
    return PopulationError(
        f"Cannot read lineage '{path}': expected {expected}, got {got}. "
        "Copy the file again, or evolve again."
    )


def _check(path: Path, lines: tuple[Measurement | Change, ...]) -> Lineage:
    """Follow the population through the lines, and refuse what cannot be."""
    alive: dict[int, str] = {}
    born: set[str] = set()
    previous: tuple[int, bool] | None = None
    for number, line in enumerate(lines, 1):
        place = _place(line)
        faults = []
        if (previous is None and place != (0, True)) or (previous and place <= previous):
            faults.append(f"the {line.kind} of generation {line.generation} here")
        previous = place
        if isinstance(line, Measurement):
            if [one.id for one in line.slots] != [alive[slot] for slot in sorted(alive)]:
                faults.append("fitness of other adapters than live")
            if any(len(one.by_domain) != len(line.domains) for one in line.slots):
                faults.append("fitness of other domains than named")
        else:
            faults += _follow(line, alive, born)
        if faults:
            raise _unreadable(
                path, f"a line {number} that follows from those before", "; ".join(faults[:5])
            )
    return Lineage(lines)


def _follow(change: Change, alive: dict[int, str], born: set[str]) -> list[str]:
    """Apply a change to who is alive; what cannot be is returned."""
    faults = [
        f"a birth of generation {one.generation}"
        for one in change.births
        if one.generation != change.generation
    ]
    ids = [one.id for one in change.births]
    faults += [f"'{i}' born again" for i in dict.fromkeys(ids) if i in born or ids.count(i) > 1]
    slots = [one.slot for one in change.births]
    if change.generation == 0:
        wrong = slots != list(range(len(slots))) or bool(change.deaths) or not slots
    else:
        wrong = slots != sorted(set(slots)) or list(change.deaths) != [
            alive.get(slot) for slot in slots
        ]
        known = {*alive.values(), *ids}
        unknown = sorted({p for one in change.births for p in one.parents} - known)
        faults += [f"the parent '{parent}', which is not in the population" for parent in unknown]
    if wrong:
        faults.append("births and deaths that do not match")
    born.update(ids)
    if change.kept:
        alive.update((one.slot, one.id) for one in change.births)
    return faults
