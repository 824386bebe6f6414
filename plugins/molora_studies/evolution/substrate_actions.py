"""The work behind `molora_studies.evolution.substrate`: each function is one task's action."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molora_fed.adapters.files import load_adapter
from molora_fed.bank.states import BaseStates, build_states
from molora_fed.bank.views import GateReading
from molora_fed.corpus.blocks import Blocks
from molora_fed.corpus.prepare import Corpus
from molora_fed.models.base import Base, load_base
from molora_fed.models.base_files import copy_checkpoint, quiet_transformers
from molora_fed.options import Choice
from molora_fed.plugins import Plugins, get_plugins
from molora_fed.population.adaptation_config import AdaptationConfig
from molora_fed.population.contract import Population
from molora_fed.population.evolution import Branch, EvolutionConfig, Evolved
from molora_fed.population.generations import evolve
from molora_fed.population.lifecycle import Step, open_operators
from molora_fed.population.losses import measure_population
from molora_fed.population.pooled import PooledData
from molora_fed.population.router_files import open_router
from molora_fed.population.slots import make_population
from molora_fed.population.split import Carved, Shares, carve_blocks
from molora_fed.storage.files import replace_folder, storage_errors
from molora_fed.types import Split
from molora_studies.evolution.substrate import EvolutionSettings
from molora_studies.framework.actions import open_base, open_corpus
from molora_studies.framework.contract import Done, TaskContext

__all__ = [
    "EVAL_BATCH",
    "Replicate",
    "describe_evolved",
    "evolve_population",
    "make_states",
    "open_replicate",
    "perturb_base",
    "remove_generations",
]

EVAL_BATCH = 16
CARVING_SEED = 0  # fitness and guard documents are the same at all seeds
CARVING = Shares(adaptation=0.1, fitness=0.3, guard=0.6)
_READINGS: frozenset[GateReading] = frozenset({"base_hidden"})


def perturb_base(settings: Mapping[str, Any], context: TaskContext) -> dict[str, Any]:
    """Add noise to every matrix of a base, relative to its entries' spread, into `base/`."""
    base = open_base(context.needs[0])
    generator = torch.Generator().manual_seed(settings["seed"])
    with torch.no_grad():
        for _, parameter in sorted(base.model.named_parameters()):
            if parameter.ndim >= 2:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += settings["relative"] * parameter.std() * noise
    target = context.folder / "base"
    with replace_folder(target) as folder, storage_errors(folder), quiet_transformers():
        copy_checkpoint(base.folder, folder)  # the tokenizer's files stay byte for byte
        base.model.save_pretrained(folder)
    return {"weights": load_base(target).weights}


@dataclass(frozen=True, eq=False)
class _Blocks:
    """A replicate's blocks, in the order of domains."""

    carved: Carved
    held_out: tuple[Blocks, ...]


def _take_blocks(settings: Mapping[str, Any], corpora: Sequence[Corpus]) -> _Blocks:
    """Train blocks adapt, calibration is carved by whole clusters, held-out blocks report."""
    ordered = sorted(corpora, key=lambda corpus: corpus.domain)

    def take(split: Split, count: int) -> tuple[Blocks, ...]:
        return tuple(corpus.blocks[split].take(count) for corpus in ordered)

    carved = carve_blocks(
        take(Split.CALIBRATION, settings["calibration"]),
        draws=settings["guard_samples"],
        seed=CARVING_SEED,
        shares=CARVING,
    )
    return _Blocks(
        replace(carved, adaptation=take(Split.TRAIN, settings["train_blocks"])),
        take(Split.HELD_OUT, settings["held_out"]),
    )


def make_states(settings: Mapping[str, Any], context: TaskContext) -> dict[str, Any]:
    """Run the base over a replicate's blocks; columns go to `states/`.

    Returns:
        The base's held-out loss by domain, nats.
    """
    base = open_base(context.needs[0])
    blocks = _take_blocks(settings, [open_corpus(done) for done in context.needs[1:]])
    carved = blocks.carved
    measured = [part.blocks for part in (carved.fitness, *carved.guard)]
    for own in (carved.adaptation, *measured, blocks.held_out):
        states = _open_states(base, own, context.folder)
    clusters = zip(carved.domains, carved.fitness.clusters, strict=True)
    return {
        "base": {state.domain: float(state.nll().double().mean()) for state in states},
        "fitness_clusters": {domain: len(chosen) for domain, chosen in clusters},
    }


def _open_states(base: Base, blocks: Sequence[Blocks], folder: Path) -> tuple[BaseStates, ...]:
    return build_states(base, blocks, _READINGS, folder / "states", batch=EVAL_BATCH)


@dataclass(frozen=True, eq=False)
class Replicate:
    """A replicate at its start.

    Attributes:
        base: The base.
        start: Population and router before any adaptation.
        data: What it is adapted, measured and guarded on.
        steps: Its lifecycle.
        config: Settings of its evolution.
        held_out: The base's states over held-out blocks, by domain.
        base_losses: The base's held-out loss by domain, nats.
        plugins: Where names are looked up.
    """

    base: Base
    start: Branch
    data: PooledData
    steps: tuple[Step, ...]
    config: EvolutionConfig
    held_out: tuple[BaseStates, ...]
    base_losses: Mapping[str, float]
    plugins: Plugins

    def measure_held_out(self, branch: Branch) -> list[Tensor]:
        """Loss of every held-out token under a branch, by domain, (N, T-1) nats each."""
        return measure_population(
            self.base, branch.population, branch.router, self.held_out, batch=EVAL_BATCH
        )


def open_replicate(settings: Mapping[str, Any], needs: Sequence[Done], threads: int) -> Replicate:
    """Open what a task of `plan_evolution` rests on.

    Args:
        settings: The task's.
        needs: Its finished needs.
        threads: Torch threads of adaptation.
    """
    chosen = EvolutionSettings.model_validate(settings["evolution"])
    base, states, count = open_base(needs[0]), needs[1], settings["corpora"]
    corpora, specialists = needs[2 : 2 + count], needs[2 + count :]
    blocks = _take_blocks(states.task.settings, [open_corpus(done) for done in corpora])
    plugins = get_plugins()
    population = _make_population(base, specialists, settings)
    router = open_router(
        chosen.router,
        chosen.router_options,
        base=base,
        num_slots=population.num_slots,
        seed=settings["seed"],
        plugins=plugins,
    )
    readings = router.reads(router.options)
    guarded = chosen.guard != "off"
    data = PooledData(
        base,
        blocks.carved if guarded else replace(blocks.carved, guard=()),
        readings,
        states.folder / "states",
        scope=Choice(name=chosen.scope),
        plugins=plugins,
        batch=EVAL_BATCH,
    )
    return Replicate(
        base=base,
        start=Branch(population, router),
        data=data,
        steps=open_operators(chosen.lifecycle, plugins),
        config=_configure(chosen, settings, threads),
        held_out=build_states(base, blocks.held_out, readings, states.folder / "states"),
        base_losses=states.result["base"],
        plugins=plugins,
    )


def evolve_population(settings: Mapping[str, Any], context: TaskContext) -> dict[str, Any]:
    """Evolve one population and measure it on held-out blocks; see `plan_evolution`.

    Returns:
        `held_out` and `base` (nats by domain), `steps`, `fitness_measurements`, `births`, `kept`
        (one entry a generation with newborns), `slots` (ids at the end), `gates` (mean by domain)
        and `events`.
    """
    replicate = open_replicate(settings, context.needs, context.threads)
    folder = context.folder / "evolution"
    evolved = evolve(
        replicate.start,
        replicate.data,
        replicate.steps,
        replicate.config,
        folder,
        plugins=replicate.plugins,
        progress=context.progress,
    )
    found = describe_evolved(replicate, evolved, replicate.measure_held_out(evolved.branch))
    remove_generations(folder)
    return found


def _configure(
    chosen: EvolutionSettings, settings: Mapping[str, Any], threads: int
) -> EvolutionConfig:
    return EvolutionConfig(
        adaptation=AdaptationConfig(
            steps=settings["steps"],
            batch=chosen.batch,
            seed=settings["seed"],
            threads=threads,
            learning_rate=chosen.learning_rate,
            router_learning_rate=chosen.router_learning_rate,
        ),
        router_name=chosen.router,
        generations=settings["generations"],
        start_steps=settings["start_steps"],
        guard=chosen.guard,
        delta=chosen.delta,
        seed=settings["seed"],
    )


def _make_population(
    base: Base, specialists: Sequence[Done], settings: Mapping[str, Any]
) -> Population:
    """Specialists, then fresh slots; on a perturbed base they are transplanted."""
    adapters = []
    for done in specialists:
        domain = str(done.result["domain"])
        adapter = load_adapter(done.folder / "adapter", plugins=get_plugins(), name=domain)
        adapters.append((domain, domain, replace(adapter, base_weights="")))
    return make_population(
        base,
        adapters,
        num_slots=settings["slots"],
        rank=settings["rank"],
        filling="fresh",
        seed=settings["seed"],
    )


def describe_evolved(
    replicate: Replicate, evolved: Evolved, losses: Sequence[Tensor]
) -> dict[str, Any]:
    """What a task says of its evolved population; see `evolve_population`.

    Args:
        replicate: Where it started.
        evolved: What it ended with.
        losses: Its held-out losses, by domain.
    """
    generations = evolved.generations
    born = [one for one in generations if one.newborns]
    return {
        "held_out": {
            state.domain: float(values.double().mean())
            for state, values in zip(replicate.held_out, losses, strict=True)
        },
        "base": dict(replicate.base_losses),
        "steps": replicate.config.total_steps,
        "fitness_measurements": len(generations) - 1,
        "births": sum(len(one.newborns) for one in born),
        "kept": [one.kept for one in born],
        "slots": list(generations[-1].slots),
        "gates": {domain: list(gates) for domain, gates in generations[-1].gates.items()},
        "events": [event for one in generations for event in one.events],
    }


def remove_generations(folder: Path) -> None:
    """The generations' files: thousands of them over a study. Renamed first: half is worse."""
    finished = folder.with_name("finished")
    shutil.rmtree(finished, ignore_errors=True)
    folder.replace(finished)
    shutil.rmtree(finished)
