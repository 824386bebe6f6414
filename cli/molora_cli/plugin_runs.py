"""A plugin used once in a short evolution or a small cascade of a real cooperative."""

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from molora_cli.progress import Reporter
from molora_fed.charter import Charter, PopulationRules
from molora_fed.contributions.contributed import collect_contributed
from molora_fed.contributions.manifest import Contribution
from molora_fed.errors import ConfigError
from molora_fed.models.base import Base
from molora_fed.plugins import Plugins
from molora_fed.population.contract import LifecycleOperator, LifecycleState, OperatorOptions

if TYPE_CHECKING:
    from molora_fed.cascade.contract import CascadeTask
    from molora_fed.population.evolution import Generation

__all__ = [
    "PLACES_IN_CASCADE",
    "PLACES_IN_POPULATION",
    "Tried",
    "answer_with",
    "draw_tasks_for",
    "evolve_with",
]

PLACES_IN_POPULATION = ("adapter_routers", "fitness_scopes", "lifecycle_operators")
"""Suffixes of the hooks that take part in an evolution."""

PLACES_IN_CASCADE = ("escalation_policies", "extractors", "judges", "task_families")
"""Suffixes of the hooks that take part in a cascade."""

_GENERATIONS, _STEPS = 3, 5
_PROBE, _TASKS, _MEMBERS, _NEW_TOKENS = "base", 4, 3, 16


@dataclass(frozen=True)
class Tried:
    """What is tried.

    Attributes:
        suffix: Of its hook.
        name: It is registered under.
        options: Its options.
        plugins: Where it is registered.
        progress: Receives phases and progress.
    """

    suffix: str
    name: str
    options: Mapping[str, Any]
    plugins: Plugins
    progress: Reporter


# A short evolution --------------------------------------------------------------------------------


class _FreeLeastFit(LifecycleOperator):
    """Frees the slot of least fitness, whatever it is worth, so that operators have one to fill."""

    def apply(self, state: LifecycleState, seed: int) -> LifecycleState:
        index = int(np.argmin(state.fitness.values))
        slot, value = state.population.slots[index], state.fitness.values[index]
        said = f"slot {index} of '{slot.birth.id}' is freed for the trial, fitness {value:+.4f}"
        return replace(state, freed=(index,), events=(*state.events, said))


def evolve_with(
    what: Tried, charter: Charter, base: Base, contributions: Sequence[Contribution]
) -> Iterator[str]:
    """A few generations of the charter's population with what is tried in its place.

    An operator runs where the charter has it, else before the charter's. Every generation begins
    by freeing the least fit slot.

    Args:
        what: An adapter router, a fitness scope or a lifecycle operator.
        charter: Its texts lie here.
        base: The charter's.
        contributions: Admitted ones.

    Yields:
        Lines for people: what each generation did, then losses on held-out text.

    Raises:
        MoloraError: Whatever an evolution refuses.
    """
    from molora_fed.cooperative.evolve import PooledTexts
    from molora_fed.population.generations import evolve
    from molora_fed.population.lifecycle import Step, open_operators
    from molora_fed.population.setup import build_config, build_start

    rules = _shorten(charter.amendment.population, what)
    amended = charter.amendment.model_copy(update={"population": rules})
    charter, plugins = charter.model_copy(update={"amendment": amended}), what.plugins
    contributed = [collect_contributed(one) for one in contributions]
    with tempfile.TemporaryDirectory(prefix="molora-") as scratch:
        folder, report = Path(scratch), what.progress
        texts = PooledTexts(base, charter, contributed, folder, plugins=plugins)
        start = build_start(base, charter, texts.entrants, plugins)
        steps = open_operators([(one.name, one.options) for one in rules.lifecycle], plugins)
        data = texts.open(report.phase, report)
        evolved = evolve(
            start,
            data,
            (Step("trial", _FreeLeastFit(OperatorOptions())), *steps),
            build_config(rules, len(data.domains), seed=charter.amendment.seed, threads=1),
            folder,
            plugins=plugins,
            on_phase=report.phase,
            progress=report,
        )
        report.phase("held-out")
        _, measured = texts.measure_held_out(start, evolved, report)
    yield from (_describe_generation(one) for one in evolved.generations[1:])
    losses = measured["equal_weight"]
    yield (
        f"{losses[f'fused:{rules.router}']['point']:.3f} nats a token on held-out text after "
        f"{(1 + _GENERATIONS) * _STEPS} steps, {losses['base']['point']:.3f} of the base"
    )


def _shorten(rules: PopulationRules, what: Tried) -> PopulationRules:
    options = dict(what.options)
    asked: dict[str, Any]
    if what.suffix == "adapter_routers":
        asked = {"router": what.name, "options": options}
    elif what.suffix == "fitness_scopes":
        asked = {"scope": {"name": what.name, "options": options}}
    else:
        choice: dict[str, Any] = {"name": what.name, "options": options}
        others = [one.model_dump() for one in rules.lifecycle]
        is_there = any(one["name"] == what.name for one in others)
        placed = [choice if one["name"] == what.name else one for one in others]
        asked = {"lifecycle": placed if is_there else [choice, *others]}
    short = {"generations": _GENERATIONS, "start_steps": _STEPS, "steps": _STEPS}
    # One guard sample for all generations, so that little calibration text is enough.
    return PopulationRules.model_validate(
        {**rules.model_dump(), **short, "guard": "spending", **asked}
    )


def _describe_generation(one: "Generation") -> str:
    bound = "" if one.comparison is None else f"; harm at most {one.comparison['bound']:+.4f} nats"
    kept = "kept" if one.kept else "the twin without them is kept"
    newborns = f"{len(one.newborns)} newborn{'s' if len(one.newborns) != 1 else ''}{bound}, {kept}"
    return f"generation {one.number}: {'; '.join([*one.events, newborns])}"


# A small cascade ----------------------------------------------------------------------------------


def answer_with(what: Tried, cooperative: Path, contributors: Sequence[str]) -> Iterator[str]:
    """A few tasks: the base is the probe, specialists are the members.

    Args:
        what: An extractor, a judge, an escalation policy or a task family.
        cooperative: Its folder.
        contributors: Of admitted contributions; the first few take part.

    Yields:
        Lines for people: how tasks were decided, and that the record decides the same.

    Raises:
        ConfigError: If the record decides otherwise, or there are no tasks.
        MoloraError: Whatever a cascade refuses.
    """
    from molora_fed.cascade.building import build_cascade
    from molora_fed.cascade.config import CascadeConfig
    from molora_fed.cascade.session import ANSWERS_FILE, run_in_folder
    from molora_fed.storage.keys import load_or_make_key

    tasks, folder = draw_tasks_for(what), cooperative.resolve()
    members = {
        f"member-{number}": {"kind": "specialist", "cooperative": folder, "contributor": one}
        for number, one in enumerate(contributors[:_MEMBERS], start=1)
    }
    models = {_PROBE: {"kind": "base", "path": folder}, **members}
    section = {"probe": _PROBE, "members": list(members), "max_new_tokens": _NEW_TOKENS}
    key = {"judges": "judge", "escalation_policies": "policy"}.get(what.suffix)
    chosen = {key: what.name, f"{key}_options": dict(what.options)} if key else {}
    cascade = build_cascade(
        CascadeConfig.model_validate({"cascade": {**section, **chosen}, "models": models}),
        Path(),  # files among a policy's options are named as on any command line
        what.plugins,
        extractors=tuple({task.extractor: None for task in tasks}),
    )
    what.progress.phase(f"{len(tasks)} tasks")
    with tempfile.TemporaryDirectory(prefix="molora-") as scratch:
        run = Path(scratch)
        signing = load_or_make_key(run / "key.pem")
        plugins, report = what.plugins, what.progress
        ran = run_in_folder(cascade, tasks, run, key=signing, plugins=plugins, progress=report)
        lines = (run / ANSWERS_FILE).read_text(encoding="utf-8").splitlines()
    differing = ran.replay.differences
    if differing:
        raise ConfigError(
            "expected the same decisions from the record, got "
            f"{len(differing)} that differ: {differing[0]}"
        )
    modes = Counter(str(json.loads(line)["mode"]) for line in lines)
    said = ", ".join(f"{count} by {mode}" for mode, count in sorted(modes.items()))
    answered = ran.totals.tasks - ran.totals.failed
    yield f"{len(tasks)} tasks of '{tasks[0].family}', {answered} answered: {said}"
    yield f"replayed {ran.replay.decisions} decisions from the record, 0 differences"


def draw_tasks_for(what: Tried) -> "list[CascadeTask]":
    """Tasks of the family that is tried, of one that uses the extractor tried, or of the first.

    Where no family uses an extractor, it reads answers to tasks that ask for another.

    Args:
        what: What is tried in a cascade.

    Raises:
        ConfigError: If no family is registered.
    """
    from molora_fed.cascade.contract import draw_tasks

    families = what.plugins.task_families.names()
    if not families:
        raise ConfigError(
            "Cannot try this without tasks: expected a registered task family, got none. "
            "Enable one."
        )

    def draw(name: str) -> "list[CascadeTask]":
        return draw_tasks([name], (1,), count=_TASKS, seed=0, split="test", plugins=what.plugins)

    if what.suffix == "task_families":
        return draw(what.name)
    drawn = draw(families[0])
    if what.suffix != "extractors":
        return drawn
    for name in families:
        tasks = draw(name)
        if {task.extractor for task in tasks} == {what.name}:
            return tasks
    return [replace(task, extractor=what.name) for task in drawn]
