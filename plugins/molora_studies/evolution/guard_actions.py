"""The work behind the study `guard`: each function is one task's action.

The populations of a replicate begin alike: what the one without a lifecycle has adapted is looked
up there, not adapted again, so that all of them fit into the time of three.

Operators whose worth is known are planted to see what the guard does about them. They are of this
study alone and not registered: nobody would want to evolve with them.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from molora_evolution.products import decompose_product

from molora_fed.adapters.updates import LinearUpdate
from molora_fed.population.adaptation_config import AdaptationConfig
from molora_fed.population.contract import (
    Birth,
    Fitness,
    LifecycleOperator,
    LifecycleState,
    OperatorOptions,
    Population,
)
from molora_fed.population.evolution import (
    Branch,
    EvolutionData,
    Evolved,
    load_branch,
    read_generations,
)
from molora_fed.population.generations import evolve
from molora_fed.population.lifecycle import Step, reset_newborns, run_lifecycle
from molora_fed.population.losses import sum_clusters
from molora_fed.population.pooled import PooledData
from molora_fed.population.router_files import pack_router
from molora_fed.population.slots import make_fresh_updates
from molora_fed.storage.seeds import derive_seed
from molora_fed.types import Progress
from molora_studies.evolution.substrate_actions import (
    Replicate,
    describe_evolved,
    open_replicate,
    remove_generations,
)
from molora_studies.framework.contract import Done, TaskContext

__all__ = [
    "FollowedData",
    "Restore",
    "Ruin",
    "evolve_and_keep",
    "evolve_beside",
    "plant_operators",
    "wipe_slot",
]


def _bear(
    state: LifecycleState, slot: int, operator: str, updates: Mapping[str, LinearUpdate], seed: int
) -> LifecycleState:
    """The state with a newborn in a slot that keeps its gates."""
    old = state.population.slots[slot]
    birth = Birth(
        id=f"g{state.generation}-s{slot}",
        operator=operator,
        parents=(old.birth.id,),
        generation=state.generation,
        seed=seed,
        fitness_before=float(state.fitness.values[slot]),
    )
    slots = list(state.population.slots)
    slots[slot] = replace(old, birth=birth, updates=updates)
    return replace(
        state,
        population=replace(state.population, slots=tuple(slots)),
        parents={**state.parents, slot: slot},
        events=(*state.events, f"'{birth.id}' is planted by {operator}"),
    )


def _scramble(update: LinearUpdate, generator: torch.Generator) -> LinearUpdate:
    """Noise of the same spectrum: singular values stay, singular vectors are drawn."""
    spectrum = decompose_product(update)
    factors: Any = update

    def draw(size: int) -> torch.Tensor:
        shape = (size, len(spectrum.values))
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(drawn)[0]

    rows, columns = spectrum.shape
    roots = (spectrum.values / factors.scale).sqrt()
    left, right = draw(rows), draw(columns)
    a, b = torch.zeros_like(factors.a), torch.zeros_like(factors.b)
    a[: len(roots)] = (roots[:, None] * right.T).float()
    b[:, : len(roots)] = (left * roots).float()
    return LinearUpdate(a=a, b=b, scale=factors.scale)


class Ruin(LifecycleOperator):
    """Harms: the fittest slot's adapter becomes noise of the same spectrum, its gates stay."""

    def apply(self, state: LifecycleState, seed: int) -> LifecycleState:
        """One newborn, in the slot whose loss would cost most."""
        slot = int(np.argmax(state.fitness.values))
        generator = torch.Generator().manual_seed(seed)
        updates = {
            name: _scramble(update, generator)
            for name, update in sorted(state.population.slots[slot].updates.items())
        }
        return _bear(state, slot, "ruin", updates, seed)


class Restore(LifecycleOperator):
    """Helps: a slot that was wiped gets its adapter back.

    Args:
        slot: The slot.
        updates: The adapter's.
    """

    def __init__(self, slot: int, updates: Mapping[str, LinearUpdate]) -> None:
        super().__init__(OperatorOptions())
        self.slot = slot
        self.updates = updates

    def apply(self, state: LifecycleState, seed: int) -> LifecycleState:
        """One newborn, the adapter that was there."""
        return _bear(state, self.slot, "restore", self.updates, seed)


def wipe_slot(population: Population, slot: int, seed: int) -> Population:
    """A population with a fresh adapter in place of a slot's.

    Args:
        population: The slots; they stay as they are.
        slot: Which of them.
        seed: Of the fresh numbers.
    """
    old = population.slots[slot]
    updates = {
        name: make_fresh_updates({name: update.shape}, update.rank or 0, seed + place)[name]
        for place, (name, update) in enumerate(sorted(old.updates.items()))
    }
    slots = list(population.slots)
    slots[slot] = replace(old, updates=updates)
    return replace(population, slots=tuple(slots))


_FOLDER = "evolution"
_PLACES = {"ruin": 0, "restore": 1}  # of seeds


class FollowedData:
    """Data of an evolution that may go where another one went; see `EvolutionData`.

    Adaptation is a function of factors, router and settings; where all of them are those of a
    generation of the other evolution, its result is taken.

    Attributes:
        domains: Domain names.
    """

    def __init__(self, replicate: Replicate, followed: Sequence[Branch]) -> None:
        """Follow an evolution.

        Args:
            replicate: The start, data and settings of both.
            followed: The other evolution's branch after each generation, from 0.
        """
        self.domains = replicate.data.domains
        self._data: PooledData = replicate.data
        starts = (replicate.start, *followed[:-1])
        self._known = [
            (replicate.config.schedule(number), start, end)
            for number, (start, end) in enumerate(zip(starts, followed, strict=True))
        ]
        self._router = replicate.config.router_name
        self.describe = self._data.describe
        self.measure_fitness = self._data.measure_fitness
        self.compare = self._data.compare
        self.measure_gates = self._data.measure_gates

    def adapt(
        self, branch: Branch, config: AdaptationConfig, folder: Path, progress: Progress | None
    ) -> Branch:
        """See `EvolutionData`."""
        for known, start, end in self._known:
            if known == config and self._are_equal(branch, start):
                pairs = zip(branch.population.slots, end.population.slots, strict=True)
                slots = tuple(replace(own, updates=there.updates) for own, there in pairs)
                return Branch(replace(branch.population, slots=slots), end.router)
        return self._data.adapt(branch, config, folder, progress)

    def _are_equal(self, one: Branch, other: Branch) -> bool:
        return _hold_equal_factors(one.population, other.population) and pack_router(
            one.router, self._router
        ) == pack_router(other.router, self._router)


def _hold_equal_factors(one: Population, other: Population) -> bool:
    """Whether two populations are the same function of gates, bit for bit."""
    for own, there in zip(one.slots, other.slots, strict=True):
        if own.updates.keys() != there.updates.keys():
            return False
        for name, update in own.updates.items():
            tensors, others = update.tensors(), there.updates[name].tensors()
            if update.scale != there.updates[name].scale or tensors.keys() != others.keys():
                return False
            if not all(torch.equal(tensors[key], others[key]) for key in tensors):
                return False
    return True


def _load_followed(done: Done, replicate: Replicate) -> list[Branch]:
    """The branch after every generation of a kept evolution."""
    folder = done.folder / _FOLDER
    return [
        load_branch(folder / "generations" / f"{one.number:04d}", one, replicate.plugins)
        for one in read_generations(folder)
    ]


def evolve_and_keep(settings: Mapping[str, Any], context: TaskContext) -> dict[str, Any]:
    """Evolve a population, and keep all of its generations in `evolution/`.

    Returns:
        What `evolve_population` returns; `comparisons`, the guard's, in order; and `clusters` of
        the held-out blocks: `sums` of losses in nats, `tokens`, and index of the `domain`.
    """
    replicate = open_replicate(settings, context.needs, context.threads)
    return _evolve(replicate, replicate.data, context)


def evolve_beside(settings: Mapping[str, Any], context: TaskContext) -> dict[str, Any]:
    """The same beside a kept evolution, the last need; nothing is kept."""
    *needs, other = context.needs
    replicate = open_replicate(settings, needs, context.threads)
    data = FollowedData(replicate, _load_followed(other, replicate))
    found = _evolve(replicate, data, context)
    remove_generations(context.folder / _FOLDER)
    return found


def _evolve(replicate: Replicate, data: EvolutionData, context: TaskContext) -> dict[str, Any]:
    evolved: Evolved = evolve(
        replicate.start,
        data,
        replicate.steps,
        replicate.config,
        context.folder / _FOLDER,
        plugins=replicate.plugins,
        progress=context.progress,
    )
    losses = replicate.measure_held_out(evolved.branch)
    sums, tokens, domain_of = sum_clusters([own.blocks for own in replicate.held_out], losses)
    return {
        **describe_evolved(replicate, evolved, losses),
        "comparisons": [dict(one.comparison or {}) for one in evolved.compared],
        "clusters": {
            "sums": sums.tolist(),
            "tokens": tokens.tolist(),
            "domain": domain_of.tolist(),
        },
    }


def plant_operators(settings: Mapping[str, Any], context: TaskContext) -> dict[str, Any]:
    """Plant operators in every generation of a kept evolution, the last need, and ask the guard.

    `ruin` turns the fittest adapter into noise. `restore` starts from a population whose fittest
    adapter was wiped, and gives it back. Branch and twin have a generation's adaptation, at its
    place in the whole run; comparisons are the guard's as `evolve` would make them, had it been
    asked once in every generation before.

    Returns:
        `planted`: `operator`, `generation` and `comparison` of each.
    """
    *needs, other = context.needs
    replicate = open_replicate(settings, needs, context.threads)
    followed = _load_followed(other, replicate)
    data = FollowedData(replicate, followed)
    folder = context.folder / "planted"
    planted = []
    for generation, before in enumerate(followed[:-1], 1):
        fitness = data.measure_fitness(before, generation, None)
        slot = int(np.argmax(fitness.values))
        wiped = wipe_slot(before.population, slot, _derive(replicate, generation, 2))
        back = Restore(slot, before.population.slots[slot].updates)
        for start, step in (
            (before, Step("ruin", Ruin(OperatorOptions()))),
            (Branch(wiped, before.router), Step("restore", back)),
        ):
            place = folder / f"{generation:04d}-{step.name}"
            pair = _adapt_pair(replicate, data, start, step, fitness, generation, place)
            sample, level = replicate.config.place_comparison(generation - 1)
            comparison = data.compare(
                *pair, sample=sample, delta=replicate.config.delta, level=level, progress=None
            )
            planted.append(
                {
                    "operator": step.name,
                    "generation": generation,
                    "comparison": comparison.to_json(),
                }
            )
            if context.progress is not None:
                context.progress(len(planted), 2 * (len(followed) - 1))
    shutil.rmtree(folder, ignore_errors=True)
    return {"planted": planted}


def _adapt_pair(
    replicate: Replicate,
    data: EvolutionData,
    start: Branch,
    step: Step,
    fitness: Fitness,
    generation: int,
    folder: Path,
) -> tuple[Branch, Branch]:
    """A lifecycle branch of one operator, and its twin, both adapted."""
    seed = _derive(replicate, generation, _PLACES[step.name])
    state = run_lifecycle(
        (step,), start.population, fitness, data.domains, generation=generation, seed=seed
    )
    changed = Branch(state.population, reset_newborns(start.router, state, seed))
    config = replicate.config.schedule(generation)
    return (
        data.adapt(changed, config, folder / "lifecycle", None),
        data.adapt(start, config, folder / "twin", None),
    )


def _derive(replicate: Replicate, *place: int) -> int:
    return derive_seed(replicate.config.seed, *place)
