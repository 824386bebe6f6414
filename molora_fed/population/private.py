"""Evolution on texts that stay with their contributors: rounds, averages, held-out figures.

Adaptation is federated averaging in rounds, fitness and guard are sums over documents, gates are
means. What one domain's contributors say adds up to what the domain says.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molora_fed.adapters.updates import LinearUpdate
from molora_fed.errors import PopulationError
from molora_fed.evaluation.composition import name_fused, name_specialist
from molora_fed.evaluation.moments import Moments, add_by_domain, build_stand_ins
from molora_fed.evaluation.summed import name_difference
from molora_fed.evaluation.summed_report import compose_summed
from molora_fed.options import Choice, check_choices
from molora_fed.plugins import Plugins
from molora_fed.population.adaptation import Factor
from molora_fed.population.adaptation_config import AdaptationConfig
from molora_fed.population.contract import AdapterRouter, Fitness, LossTable, Slot
from molora_fed.population.evolution import POPULATION_FOLDER, ROUTER_FILE, Branch
from molora_fed.population.files import load_population, save_population
from molora_fed.population.guard import Comparison, compare_branches
from molora_fed.population.lifecycle import compute_fitness
from molora_fed.population.questions import Answer, Ask, Question
from molora_fed.population.rounds import PlannedRound, split_rounds
from molora_fed.population.router_files import load_router, save_router
from molora_fed.storage.files import write_json
from molora_fed.types import Progress

__all__ = [
    "Member",
    "PrivateData",
    "average_branches",
    "check_adapted",
    "evaluate_privately",
    "name_slot",
]


def check_adapted(found: Branch, start: Branch, *, who: str) -> None:
    """Refuse what is not the branch that was sent, adapted.

    Args:
        found: What a contributor returned, read and found finite.
        start: What it was sent.
        who: The contributor, for errors.

    Raises:
        PopulationError: If slots, layers, ranks or the router's parameters are others.
    """
    faults = []
    if len(found.population.slots) != len(start.population.slots):
        faults.append(f"{len(found.population.slots)} slots")
    for theirs, sent in zip(found.population.slots, start.population.slots, strict=False):
        if theirs.birth.id != sent.birth.id or _shapes(theirs) != _shapes(sent):
            faults.append(f"other layers or ranks in '{sent.birth.id}'")
    if _describe(found.router) != _describe(start.router):
        faults.append("another router")
    if faults:
        raise PopulationError(
            f"Cannot use the adapted population of '{who}': expected the slots and router it was "
            f"sent, got {'; '.join(faults[:5])}. Ask that contributor to run the same molora-fed "
            "version, or withdraw it."
        )


def _shapes(slot: Slot) -> dict[str, tuple[object, ...]]:
    return {
        name: (float(u.scale), *(tuple(t.shape) for t in u.tensors().values()))
        for name, u in slot.updates.items()
    }


def _describe(router: AdapterRouter) -> tuple[object, ...]:
    shapes = {name: tuple(value.shape) for name, value in router.state_dict().items()}
    return type(router), router.options, router.num_slots, router.width, shapes


def average_branches(
    start: Branch, adapted: Sequence[Branch], weights: Sequence[float], factor: Factor
) -> Branch:
    """The mean of branches that were adapted from one.

    Args:
        start: The branch that was sent to everybody; all but the trained tensors is taken from it.
        adapted: What came back, each found good by `check_adapted`.
        weights: Of each, summing to 1.
        factor: The factor that was trained; of the other, theirs is not looked at.
    """
    slots = []
    for index, sent in enumerate(start.population.slots):
        updates: dict[str, LinearUpdate] = {}
        for name, old in sent.updates.items():
            theirs = [one.population.slots[index].updates[name] for one in adapted]
            mean = _mean([own.tensors()[factor] for own in theirs], weights)
            tensors: Mapping[str, Tensor] = {**old.tensors(), factor: mean}
            updates[name] = LinearUpdate(a=tensors["a"], b=tensors["b"], scale=old.scale)
        slots.append(replace(sent, updates=updates))
    router = copy.deepcopy(start.router)
    states = [one.router.state_dict() for one in adapted]
    router.load_state_dict({name: _mean([s[name] for s in states], weights) for name in states[0]})
    return Branch(replace(start.population, slots=tuple(slots)), router.eval())


def _mean(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Summed in double precision, in the order given; of equal tensors it is that tensor."""
    total = sum(weight * value.double() for weight, value in zip(weights, values, strict=True))
    return torch.as_tensor(total).to(values[0].dtype)


_ROUND_FILE = "round.json"


@dataclass(frozen=True)
class Member:
    """A contributor of an evolution.

    Attributes:
        id: Its contribution's id; the order of members.
        name: Its name.
        domain: Domain of its texts.
    """

    id: str
    name: str
    domain: str


def name_slot(index: int) -> str:
    """Name of a slot's column of figures."""
    return f"slot-{index}"


class PrivateData:
    """Data of an evolution whose blocks all lie at contributors.

    Attributes:
        domains: Domain names, sorted.
    """

    def __init__(
        self,
        members: Sequence[Member],
        ask: Ask,
        *,
        scope: Choice,
        rounds: int,
        router_name: str,
        plugins: Plugins,
    ) -> None:
        """Ask nothing yet.

        Args:
            members: Who is asked, in the order of their ids, which is that of answers.
            ask: Asks them.
            scope: Fitness scope.
            rounds: Rounds of an adaptation.
            router_name: The name the router is registered under.
            plugins: Where scope and router are looked up.
        """
        self.domains = tuple(sorted({one.domain for one in members}))
        self._members = tuple(members)
        self._ask = ask
        self._scope = scope
        self._rounds = rounds
        self._router_name = router_name
        self._plugins = plugins
        check_choices([(plugins.fitness_scopes, "population.scope", [scope])])

    def describe(self) -> Mapping[str, Any]:
        """See `EvolutionData`."""
        return {
            "scope": self._scope.model_dump(mode="json"),
            "rounds": self._rounds,
            "members": [asdict(one) for one in self._members],
        }

    def adapt(
        self, branch: Branch, config: AdaptationConfig, folder: Path, progress: Progress | None
    ) -> Branch:
        """See `EvolutionData`. Everybody takes all the steps, on its own blocks."""
        share = config.batch // len(self.domains)
        for turn, planned in enumerate(split_rounds(config, self._rounds, batch=share)):
            place = folder / f"round-{turn:02d}"
            if not (place / _ROUND_FILE).is_file():
                self._save_round(self._run_round(branch, planned), place)
            # Always from disk, so that a run that goes on and one that never stopped are one.
            population = load_population(place / POPULATION_FOLDER)
            branch = Branch(population, load_router(place / ROUTER_FILE, self._plugins))
            if progress is not None:
                done = planned.config.first_step + planned.config.steps - config.first_step
                progress(done, config.steps)
        return branch

    def _run_round(self, branch: Branch, planned: PlannedRound) -> Branch:
        # The place alone: contributors take everything else from the charter.
        settings = {"first_step": planned.config.first_step}

        def read(answer: Answer) -> Branch:
            if answer.branch is None:
                raise PopulationError(
                    f"Cannot use the answer of '{answer.contributor}': expected an adapted "
                    "population, got none. Ask that contributor to run the same molora-fed version."
                )
            check_adapted(answer.branch, branch, who=answer.contributor)
            return answer.branch

        adapted = self._ask(Question("adapt", settings, (branch,)), read)
        return average_branches(branch, adapted, self._weigh(), planned.factor)

    def _weigh(self) -> list[float]:
        """Equal weight of domains, and of the contributors of each."""
        found = [one.domain for one in self._members]
        return [1.0 / (len(self.domains) * found.count(domain)) for domain in found]

    def _save_round(self, branch: Branch, place: Path) -> None:
        fingerprint = save_population(branch.population, place / POPULATION_FOLDER)
        save_router(branch.router, self._router_name, place / ROUTER_FILE)
        write_json(place / _ROUND_FILE, {"population": fingerprint})

    def measure_fitness(
        self, branch: Branch, generation: int, progress: Progress | None
    ) -> Fitness:
        """See `EvolutionData`. The scope sees stand-ins for the clusters; see `moments`."""
        slots = [name_slot(index) for index in range(branch.population.num_slots)]
        names = ["base", "full", *slots]
        moments = self.ask_moments(Question("fitness", {}, (branch,)), names)
        stand_ins = build_stand_ins(moments)
        full = stand_ins.columns["full"]
        table = LossTable(
            domains=self.domains,
            domain_of=stand_ins.domain_of,
            counts=stand_ins.counts,
            base=stand_ins.columns["base"],
            full=full,
            without=np.stack([full + stand_ins.columns[name] for name in slots]),
            passes=1 + len(slots),
        )
        return compute_fitness(self._scope, table, self._plugins)

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
        """See `EvolutionData`."""
        question = Question("guard", {"sample": sample}, (lifecycle, twin))
        stand_ins = build_stand_ins(self.ask_moments(question, ["difference"]))
        difference = stand_ins.columns["difference"]
        return compare_branches(
            difference,
            np.zeros_like(difference),
            stand_ins.counts,
            stand_ins.domain_of,
            domains=self.domains,
            delta=delta,
            level=level,
        )

    def measure_gates(self, branch: Branch) -> NDArray[np.float64]:
        """See `EvolutionData`."""
        slots = branch.population.num_slots

        def read(answer: Answer) -> tuple[float, NDArray[np.float64]]:
            try:
                positions = float(answer.figures["positions"])
                gates = np.array(answer.figures["gates"], dtype=np.float64)
                good = gates.shape == (slots,) and bool(((gates >= 0) & (gates <= 1)).all())
                if not good or not 1 <= positions < np.inf:
                    raise ValueError(f"{positions} positions, gates of shape {gates.shape}")
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise PopulationError(
                    f"Cannot use the gates of '{answer.contributor}': expected {slots} means in "
                    f"[0, 1], got '{str(error)[:80]}'. Ask that contributor to run the same "
                    "molora-fed version."
                ) from error
            return positions, gates

        found = self._ask(Question("gates", {}, (branch,)), read)
        means = np.zeros((len(self.domains), slots))
        for index, domain in enumerate(self.domains):
            own = [a for m, a in zip(self._members, found, strict=True) if m.domain == domain]
            means[index] = np.average([g for _, g in own], axis=0, weights=[n for n, _ in own])
        return means

    def ask_moments(self, question: Question, names: Sequence[str]) -> list[Moments]:
        """Ask for sums over documents.

        Args:
            question: What to ask.
            names: Columns that are wanted.

        Returns:
            The moments of each domain, its contributors' added up.
        """

        def read(answer: Answer) -> Moments:
            return Moments.from_json(answer.figures, names, who=answer.contributor)

        found = self._ask(question, read)
        parts = [(m.domain, own) for m, own in zip(self._members, found, strict=True)]
        return list(add_by_domain(parts).values())


def evaluate_privately(
    data: PrivateData,
    last: Branch,
    start: Branch,
    specialists: Sequence[str],
    *,
    router_name: str,
    gates: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """Ask for losses on held-out blocks, once.

    Args:
        data: Whom to ask.
        last: What was evolved.
        start: What it began with: its first slots, each at gate 1, are the specialists.
        specialists: Their names in reports.
        router_name: The name the router is registered under.
        gates: Mean gate by domain and slot.

    Returns:
        The figures of `Evaluation.to_json` that sums can give, with `interval_method`.
    """
    slots = [name_slot(index) for index in range(start.population.num_slots)]
    columns = ["base", *slots, "uniform"]
    names = [*columns, "fused", *(f"{name}-less-fused" for name in columns)]
    moments = data.ask_moments(Question("held-out", {}, (last, start)), names)
    found = {name_specialist(name): name_slot(i) for i, name in enumerate(specialists)}
    alone = {"base": "base", **found}
    methods = {**alone, "uniform": "uniform"}
    fused = name_fused(router_name)
    more = {name_difference(name, fused): f"{old}-less-fused" for name, old in methods.items()}
    methods[fused] = "fused"
    by_domain = {
        domain: own.rename({**methods, **more})
        for domain, own in zip(data.domains, moments, strict=True)
    }
    return compose_summed(by_domain, list(alone), list(methods), {router_name: gates})
