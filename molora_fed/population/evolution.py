"""What an evolution is made of: branches, settings, data, and what a generation leaves on disk."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from molora_fed.errors import PopulationError, describe_mismatch
from molora_fed.plugins import Plugins
from molora_fed.population.adaptation_config import AdaptationConfig
from molora_fed.population.contract import AdapterRouter, Fitness, Population
from molora_fed.population.files import fingerprint_population, load_population
from molora_fed.population.guard import DELTA_NATS, LEVEL, Comparison, GuardMode, spend_level
from molora_fed.population.router_files import load_router
from molora_fed.types import Progress

__all__ = [
    "GENERATION_FILE",
    "LINEAGE_FILE",
    "POPULATION_FOLDER",
    "ROUTER_FILE",
    "Branch",
    "EvolutionConfig",
    "EvolutionData",
    "Evolved",
    "Generation",
    "load_branch",
    "read_generation",
    "read_generations",
]

GENERATION_FILE = "generation.json"
LINEAGE_FILE = "lineage.jsonl"
POPULATION_FOLDER = "population"
ROUTER_FILE = "router.safetensors"


@dataclass(frozen=True, eq=False)
class Branch:
    """A population with its router."""

    population: Population
    router: AdapterRouter


@dataclass(frozen=True)
class EvolutionConfig:
    """Settings of an evolution.

    Attributes:
        adaptation: Settings of each generation's adaptation: its `steps` are those of a branch in
            a generation, 0 for none. The loop sets their place in the whole run and the seed.
        router_name: The name the router is registered under.
        generations: G, generations with a lifecycle.
        start_steps: Adaptation steps of generation 0.
        guard: Which documents guard.
        delta: Largest upper bound of the harm that is kept, nats.
        level: Of the bound.
        seed: Of data order, operators and newborns' gates.
    """

    adaptation: AdaptationConfig
    router_name: str
    generations: int = 3
    start_steps: int = 100
    guard: GuardMode = "fresh"
    delta: float = DELTA_NATS
    level: float = LEVEL
    seed: int = 0

    @property
    def total_steps(self) -> int:
        """Adaptation steps that the population which is kept has gone through at the end."""
        return self.start_steps + self.generations * self.adaptation.steps

    def schedule(self, generation: int) -> AdaptationConfig:
        """Settings of a branch's adaptation in a generation, at its place in the whole run.

        Args:
            generation: From 0, the start.
        """
        each = self.adaptation.steps
        return replace(
            self.adaptation,
            seed=self.seed,
            steps=each if generation else self.start_steps,
            first_step=self.start_steps + (generation - 1) * each if generation else 0,
            total_steps=self.total_steps,
        )

    def place_comparison(self, before: int) -> tuple[int, float]:
        """Guard sample and level of a comparison.

        Args:
            before: Comparisons that were made before it.
        """
        if self.guard == "fresh":
            return before, self.level
        return 0, spend_level(self.level, self.generations, before)


class EvolutionData(Protocol):
    """Where a population is trained and measured: on this machine, or at contributors.

    Attributes:
        domains: Domain names, in the order of every figure.
    """

    domains: tuple[str, ...]

    def describe(self) -> Mapping[str, Any]:
        """Everything about the data that decides the result, as JSON values."""

    def adapt(
        self, branch: Branch, config: AdaptationConfig, folder: Path, progress: Progress | None
    ) -> Branch:
        """Train a branch; safe to interrupt, call again with the same folder to resume."""

    def measure_fitness(
        self, branch: Branch, generation: int, progress: Progress | None
    ) -> Fitness:
        """What each slot is worth, on fitness documents."""

    def compare(
        self,
        lifecycle: Branch,
        twin: Branch,
        *,
        sample: int,
        delta: float,
        level: float,
        progress: Progress | None,
    ) -> Comparison:
        """The guard's comparison on guard sample `sample`, from 0."""

    def measure_gates(self, branch: Branch) -> NDArray[np.float64]:
        """Mean gate of every slot by domain, on fitness documents, (domains, P)."""


@dataclass(frozen=True)
class Generation:
    """What happened in a generation; the content of its `generation.json`.

    Attributes:
        number: From 0, the start.
        kept: Whether the population went on with the lifecycle.
        newborns: Slots the lifecycle refilled.
        comparison: The guard's comparison; None where it was not asked.
        events: One line for people per thing that happened.
        gates: Mean gate by domain and slot after it.
        slots: Ids of the adapters that live after it.
        population: Fingerprint of the population it ended with.
        router: SHA-256 of the router's file.
    """

    number: int
    kept: bool
    newborns: tuple[int, ...]
    comparison: Mapping[str, Any] | None
    events: tuple[str, ...]
    gates: Mapping[str, Sequence[float]]
    slots: tuple[str, ...]
    population: str
    router: str


@dataclass(frozen=True, eq=False)
class Evolved:
    """What an evolution ends with.

    Attributes:
        branch: The population and its router, on the CPU.
        generations: What happened, generation 0 first.
        folder: Where all of it lies.
    """

    branch: Branch
    generations: tuple[Generation, ...]
    folder: Path

    @property
    def compared(self) -> tuple[Generation, ...]:
        """The generations in which the guard was asked."""
        return tuple(one for one in self.generations if one.comparison is not None)


def read_generation(folder: Path) -> Generation | None:
    """What a generation left; None if it is not finished."""
    path = folder / GENERATION_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for name in ("newborns", "events", "slots"):
            content[name] = tuple(content[name])
        return Generation(**content)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise PopulationError(
            f"Cannot read generation '{folder}': expected what `molora evolve` wrote, got "
            f"{' '.join(str(error).split())[:200]}. Remove that folder to evolve it again."
        ) from error


def load_branch(folder: Path, finished: Generation, plugins: Plugins) -> Branch:
    """Always from disk, so that a run that goes on and one that never stopped are one."""
    branch = Branch(
        load_population(folder / POPULATION_FOLDER), load_router(folder / ROUTER_FILE, plugins)
    )
    if fingerprint_population(branch.population) != finished.population:
        raise PopulationError(
            describe_mismatch(
                f"Cannot resume from generation '{folder}'",
                expected=f"a population of fingerprint {finished.population[:12]}",
                got="another",
                fix="Remove that folder to evolve it again.",
            )
        )
    return branch


def read_generations(folder: Path) -> tuple[Generation, ...]:
    """What an evolution's folder says of its finished generations, in order.

    Raises:
        PopulationError: If there are none, or one is malformed.
    """
    found = []
    for path in sorted((folder / "generations").glob("[0-9]*")):
        generation = read_generation(path)
        if generation is not None:
            found.append(generation)
    if not found:
        raise PopulationError(
            f"Cannot read an evolution in '{folder}': expected finished generations, got none. "
            "Make one with `molora evolve`."
        )
    return tuple(found)
