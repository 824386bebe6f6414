"""The generation loop: fitness, lifecycle, adaptation beside a twin, guard, and what is kept.

Generation 0 adapts the start. Each further generation measures fitness, lets the lifecycle
operators replace slots, and adapts two branches by equal steps on equal batches: the one with the
lifecycle, and its twin without. The guard keeps one of them. A generation without newborns has one
branch and asks no guard.

Every generation ends as a folder; a run that is killed at any moment and started again goes on
after the last one, inside it where adaptation stopped, and ends with the same bytes.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from molora_fed.errors import PopulationError, describe_mismatch
from molora_fed.guard import guarded
from molora_fed.plugins import Plugins
from molora_fed.population.contract import LifecycleState
from molora_fed.population.evolution import (
    GENERATION_FILE,
    LINEAGE_FILE,
    POPULATION_FOLDER,
    ROUTER_FILE,
    Branch,
    EvolutionConfig,
    EvolutionData,
    Evolved,
    Generation,
    load_branch,
    read_generation,
)
from molora_fed.population.files import fingerprint_population, save_population
from molora_fed.population.guard import Comparison
from molora_fed.population.lifecycle import Step, reset_newborns, run_lifecycle
from molora_fed.population.lineage import (
    add_to_lineage,
    describe_change,
    describe_fitness,
    describe_start,
)
from molora_fed.population.router_files import pack_router, save_router
from molora_fed.storage.files import canonical_json, hash_bytes, write_json
from molora_fed.storage.locks import lock_folder
from molora_fed.storage.seeds import derive_seed
from molora_fed.types import Progress

__all__ = ["evolve"]

RUN_FILE = "run.json"
_LIFECYCLE, _TWIN = "lifecycle", "twin"


def evolve(
    branch: Branch,
    data: EvolutionData,
    steps: Sequence[Step],
    config: EvolutionConfig,
    folder: Path,
    *,
    plugins: Plugins,
    on_phase: Callable[[str], None] = lambda phase: None,
    progress: Progress | None = None,
) -> Evolved:
    """Evolve a population, or resume a run that was stopped in the same folder.

    Args:
        branch: Where it starts; it stays as it is.
        data: Where it is trained and measured.
        steps: The lifecycle's operators in order; none gives adaptation alone.
        config: Settings.
        folder: Gets `run.json`, `lineage.jsonl` and a folder a generation.
        plugins: Where the router's name is looked up.
        on_phase: Told what begins.
        progress: Receives progress within a phase.

    Raises:
        PopulationError: If the settings cannot be used, an operator or the data refuse, or the
            folder holds an evolution of other inputs.
        TrainingError: If adaptation refuses, or another process works in the folder.
        StorageError: On I/O errors.
    """
    _check(branch, config)
    with lock_folder(folder):
        _claim(folder, _identify(branch, data, steps, config))
        run = _Run(data, steps, config, folder, plugins, on_phase, progress)
        done: list[Generation] = []
        for number in range(config.generations + 1):
            finished = read_generation(run.place(number))
            if finished is None:
                finished = run.generation(number, branch, done)
            branch = load_branch(run.place(number), finished, plugins)
            _remove_checkpoints(run.place(number))
            done.append(finished)
    return Evolved(branch, tuple(done), folder)


class _Run:
    """One evolution: its data, operators and settings."""

    def __init__(
        self,
        data: EvolutionData,
        steps: Sequence[Step],
        config: EvolutionConfig,
        folder: Path,
        plugins: Plugins,
        on_phase: Callable[[str], None],
        progress: Progress | None,
    ) -> None:
        self.data = data
        self.steps = steps
        self.config = config
        self.folder = folder
        self.plugins = plugins
        self.on_phase = on_phase
        self.progress = progress

    def place(self, number: int) -> Path:
        """Folder of a generation."""
        return self.folder / "generations" / f"{number:04d}"

    def generation(self, number: int, before: Branch, done: Sequence[Generation]) -> Generation:
        """Run one generation and write its folder."""
        for left_over in self.place(number).glob(".population.*"):  # of a killed process
            shutil.rmtree(left_over)
        if number == 0:
            add_to_lineage(self.folder / LINEAGE_FILE, describe_start(before.population))
            return self._finish(number, self._adapt(before, number, _LIFECYCLE))
        state = self._run_lifecycle(number, before)
        newborns = tuple(sorted(state.parents))
        seed = derive_seed(self.config.seed, number, 1)
        with guarded(self.plugins.adapter_routers.entry(self.config.router_name), "reset_slot"):
            router = reset_newborns(before.router, state, seed) if newborns else before.router
        lifecycle = self._adapt(Branch(state.population, router), number, _LIFECYCLE)
        comparison, kept = None, lifecycle
        if newborns and self.config.guard != "off":
            twin = self._adapt(before, number, _TWIN)
            comparison = self._compare(number, lifecycle, twin, done)
            kept = lifecycle if comparison.kept else twin
        change = describe_change(before.population, state, kept=kept is lifecycle)
        add_to_lineage(self.folder / LINEAGE_FILE, change)
        return self._finish(
            number, kept, kept is lifecycle, newborns, comparison, tuple(state.events)
        )

    def _run_lifecycle(self, number: int, before: Branch) -> LifecycleState:
        self.on_phase(f"generation {number}: fitness")
        fitness = self.data.measure_fitness(before, number, self.progress)
        domains = self.data.domains
        line = describe_fitness(before.population, fitness, domains, number)
        add_to_lineage(self.folder / LINEAGE_FILE, line)
        return run_lifecycle(
            self.steps,
            before.population,
            fitness,
            domains,
            generation=number,
            seed=derive_seed(self.config.seed, number, 0),
        )

    def _adapt(self, branch: Branch, number: int, name: str) -> Branch:
        settings = self.config.schedule(number)
        if settings.steps == 0:
            return branch
        self.on_phase(f"generation {number}: adaptation" + (" of the twin" * (name == _TWIN)))
        return self.data.adapt(branch, settings, self.place(number) / name, self.progress)

    def _compare(
        self, number: int, lifecycle: Branch, twin: Branch, done: Sequence[Generation]
    ) -> Comparison:
        self.on_phase(f"generation {number}: guard")
        before = sum(one.comparison is not None for one in done)
        sample, level = self.config.place_comparison(before)
        return self.data.compare(
            lifecycle,
            twin,
            sample=sample,
            delta=self.config.delta,
            level=level,
            progress=self.progress,
        )

    def _finish(
        self,
        number: int,
        after: Branch,
        kept: bool = True,
        newborns: tuple[int, ...] = (),
        comparison: Comparison | None = None,
        events: tuple[str, ...] = (),
    ) -> Generation:
        """Write a generation's folder; `generation.json` comes last."""
        folder = self.place(number)
        gates = self.data.measure_gates(after)
        finished = Generation(
            number=number,
            kept=kept,
            newborns=newborns,
            comparison=None if comparison is None else comparison.to_json(),
            events=events,
            gates={d: list(map(float, g)) for d, g in zip(self.data.domains, gates, strict=True)},
            slots=tuple(slot.birth.id for slot in after.population.slots),
            population=save_population(after.population, folder / POPULATION_FOLDER),
            router=hash_bytes(pack_router(after.router, self.config.router_name)),
        )
        save_router(after.router, self.config.router_name, folder / ROUTER_FILE)
        write_json(folder / GENERATION_FILE, asdict(finished))
        return finished


def _remove_checkpoints(folder: Path) -> None:
    """Adaptation's, of a finished generation: several times a population's size."""
    for name in (_LIFECYCLE, _TWIN):
        for checkpoint in (folder / name).glob("*.safetensors"):
            checkpoint.unlink()
        for round_folder in (folder / name).glob("round-*"):
            shutil.rmtree(round_folder)


def _check(branch: Branch, config: EvolutionConfig) -> None:
    faults = [
        f"{name} {getattr(config, name)}"
        for name in ("generations", "start_steps", "seed")
        if getattr(config, name) < 0
    ]
    if config.adaptation.steps < 0:
        faults.append(f"adaptation steps {config.adaptation.steps}")
    if branch.router.num_slots != branch.population.num_slots:
        faults.append(
            f"a router of {branch.router.num_slots} slots for {branch.population.num_slots}"
        )
    if faults:
        raise PopulationError(
            "Cannot evolve: expected generations, steps and seed of 0 at least and a router of "
            f"this population, got {'; '.join(faults)}. Correct these."
        )


def _identify(
    branch: Branch, data: EvolutionData, steps: Sequence[Step], config: EvolutionConfig
) -> dict[str, Any]:
    """Everything that decides the result beside versions, as JSON values."""
    settings = asdict(config)
    for name in ("threads", "checkpoint_every"):  # neither changes the result
        del settings["adaptation"][name]
    content = {
        **settings,
        "data": dict(data.describe()),
        "domains": list(data.domains),
        "operators": [
            {"name": s.name, "options": s.operator.options.model_dump(mode="json")} for s in steps
        ],
        "start": fingerprint_population(branch.population),
        "router": hash_bytes(pack_router(branch.router, config.router_name)),
    }
    found: dict[str, Any] = json.loads(canonical_json(content))
    return found


def _claim(folder: Path, identity: dict[str, Any]) -> None:
    """Write what this evolution is, or check that the folder holds the same."""
    path = folder / RUN_FILE
    if not path.exists():
        write_json(path, identity)
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        names = sorted({*found, *identity})
        differences = [name for name in names if found.get(name) != identity.get(name)]
    except (OSError, ValueError, TypeError):
        differences = ["a file that cannot be read"]
    if differences:
        raise PopulationError(
            describe_mismatch(
                f"Cannot resume the evolution in '{folder}'",
                expected="the inputs and settings it was started with",
                got=f"others: {', '.join(differences)}",
                fix="Restore these, or evolve in another folder.",
            )
        )
