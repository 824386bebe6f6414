"""An evolution that a tiny base can do in a second, with operators that harm or do nothing."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import torch
from adaptation_helpers import build_counting_blocks, build_population, build_router

from molora_fed import hookimpl
from molora_fed.adapters.updates import LinearUpdate
from molora_fed.models.base import load_base
from molora_fed.options import Choice
from molora_fed.plugins import load_plugins
from molora_fed.population.adaptation_config import AdaptationConfig
from molora_fed.population.contract import Birth, LifecycleOperator
from molora_fed.population.evolution import Branch, EvolutionConfig
from molora_fed.population.generations import evolve
from molora_fed.population.lifecycle import open_operators
from molora_fed.population.pooled import PooledData
from molora_fed.population.split import carve_blocks

ADAPTATION = AdaptationConfig(
    steps=4, batch=4, seed=0, threads=1, learning_rate=1e-2, checkpoint_every=2
)
CONFIG = EvolutionConfig(
    adaptation=ADAPTATION,
    router_name="parallel-sigmoid",
    generations=2,
    start_steps=4,
    guard="fresh",
    seed=3,
)


def bear(state, slot, updates, operator):
    """The state with another adapter in a slot, its gates those of the one before."""
    old = state.population.slots[slot]
    birth = Birth(f"g{state.generation}-s{slot}", operator, (old.birth.id,), state.generation)
    slots = list(state.population.slots)
    slots[slot] = replace(old, birth=birth, updates=updates)
    return replace(
        state,
        population=replace(state.population, slots=tuple(slots)),
        parents={**state.parents, slot: slot},
        events=(*state.events, f"{operator} in slot {slot}"),
    )


class Harm(LifecycleOperator):
    """Replaces the first slot by strong noise."""

    def apply(self, state, seed):
        generator = torch.Generator().manual_seed(seed)
        updates = {
            name: LinearUpdate(
                a=torch.randn(u.a.shape, generator=generator),
                b=torch.randn(u.b.shape, generator=generator),
                scale=u.scale,
            )
            for name, u in state.population.slots[0].updates.items()
        }
        return bear(state, 0, updates, "harm")


class Help(LifecycleOperator):
    """Replaces every slot by one of a population that was adapted for longer."""

    donor = None

    def apply(self, state, seed):
        for index, slot in enumerate(self.donor.slots):
            state = bear(state, index, dict(slot.updates), "help")
        return state


class Copy(LifecycleOperator):
    """Replaces the first slot by itself: neither helps nor harms."""

    def apply(self, state, seed):
        return bear(state, 0, dict(state.population.slots[0].updates), "copy")


class Plugin:
    @hookimpl
    def register_lifecycle_operators(self, register):
        for name, target in (("harm", Harm), ("help", Help), ("copy", Copy)):
            register(name, target, summary="for tests", source="own definition")


PLUGINS = load_plugins(extra=[("evolution tests", Plugin())])


def build_data(
    base, folder, *, count=40, draws=2, plugins=PLUGINS, scope=Choice(name="per-domain")
):
    blocks = [build_counting_blocks(domain, count=count) for domain in ("down", "up")]
    carved = carve_blocks(blocks, draws=draws, seed=0)
    return PooledData(
        base, carved, frozenset({"base_hidden"}), folder, scope=scope, plugins=plugins
    )


def run_evolution(base, folder, *operators, config=CONFIG, plugins=PLUGINS, branch=None, **more):
    draws = config.generations if config.guard == "fresh" else 1
    return evolve(
        branch or Branch(build_population(base), build_router()),
        build_data(base, folder / "states", draws=draws),
        open_operators([(o, {}) if isinstance(o, str) else o for o in operators], plugins),
        config,
        folder / "evolution",
        plugins=plugins,
        **more,
    )


LIFECYCLE = (
    ("death", {"threshold": 10.0, "patience": 1, "min_age": 1}),
    "slot-reallocation",
    "inheritance",
    "svd-mutation",
)
"""Somebody dies in every generation."""


def read_results(folder):
    """Bytes of everything that must not depend on where a run was stopped."""
    names = ("*.json", "lineage.jsonl", "population.safetensors", "router.safetensors")
    root = folder / "evolution"
    return {
        str(path.relative_to(root)): path.read_bytes()
        for name in names
        for path in sorted(root.rglob(name))
    }


def evolve_until_killed(checkpoint: str, folder: str, count: int) -> None:
    """Evolve in a process of its own that SIGKILL ends before the disk has the `count`-th file."""
    left = [count]
    base = load_base(Path(checkpoint))
    real_fsync = os.fsync

    def fsync(descriptor) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        real_fsync(descriptor)

    os.fsync = fsync
    run_evolution(base, Path(folder), *LIFECYCLE)
