"""Evolution on texts that stay with their contributors; see `EvolutionData`.

Adaptation is federated averaging in rounds, fitness and guard are sums over documents, gates are
means. What one domain's contributors say adds up to what the domain says.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molora_fed.errors import PopulationError
from molora_fed.plugins import Plugins
from molora_fed.population.adaptation_config import AdaptationConfig
from molora_fed.population.average import average_branches, check_adapted, choose_factor
from molora_fed.population.contract import Fitness, LossTable
from molora_fed.population.evolution import POPULATION_FOLDER, ROUTER_FILE, Branch
from molora_fed.population.files import load_population, save_population
from molora_fed.population.guard import Comparison, compare_branches
from molora_fed.population.lifecycle import compute_fitness
from molora_fed.population.moments import Moments, build_stand_ins
from molora_fed.population.questions import Answer, Ask, Question
from molora_fed.population.router_files import load_router, save_router
from molora_fed.storage.files import write_json
from molora_fed.types import Progress

__all__ = ["Member", "PrivateData", "name_slot"]

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
        scope: str,
        rounds: int,
        router_name: str,
        plugins: Plugins,
    ) -> None:
        """Ask nothing yet.

        Args:
            members: Who is asked, in the order of their ids, which is that of answers.
            ask: Asks them.
            scope: Registered fitness scope.
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
        plugins.fitness_scopes.entry(scope)

    def describe(self) -> Mapping[str, Any]:
        """See `EvolutionData`."""
        return {
            "scope": self._scope,
            "rounds": self._rounds,
            "members": [asdict(one) for one in self._members],
        }

    def adapt(
        self, branch: Branch, config: AdaptationConfig, folder: Path, progress: Progress | None
    ) -> Branch:
        """See `EvolutionData`. Everybody takes all the steps, on its own blocks."""
        rounds = min(self._rounds, config.steps)
        edges = [config.steps * turn // rounds for turn in range(rounds + 1)]
        share = config.batch // len(self.domains)
        for turn in range(rounds):
            place = folder / f"round-{turn:02d}"
            if not (place / _ROUND_FILE).is_file():
                local = replace(
                    config,
                    batch=share,
                    steps=edges[turn + 1] - edges[turn],
                    first_step=config.first_step + edges[turn],
                    total_steps=config.whole,
                )
                self._save_round(self._run_round(branch, local, turn), place)
            # Always from disk, so that a run that goes on and one that never stopped are one.
            population = load_population(place / POPULATION_FOLDER)
            branch = Branch(population, load_router(place / ROUTER_FILE, self._plugins))
            if progress is not None:
                progress(edges[turn + 1], config.steps)
        return branch

    def _run_round(self, branch: Branch, config: AdaptationConfig, turn: int) -> Branch:
        factor = choose_factor(turn)
        settings = {**asdict(config), "trained_factors": factor}
        del settings["threads"]  # each contributor's own affair

        def read(answer: Answer) -> Branch:
            if answer.branch is None:
                raise PopulationError(
                    f"Cannot use the answer of '{answer.contributor}': expected an adapted "
                    "population, got none. Ask that contributor to run the same molora-fed version."
                )
            check_adapted(answer.branch, branch, who=answer.contributor)
            return answer.branch

        adapted = self._ask(Question("adapt", settings, (branch,)), read)
        return average_branches(branch, adapted, self._weigh(), factor)

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
        by_domain: list[Moments] = []
        for domain in self.domains:
            own = [a for m, a in zip(self._members, found, strict=True) if m.domain == domain]
            total = own[0]
            for one in own[1:]:
                total = total.add(one)
            by_domain.append(total)
        return by_domain
