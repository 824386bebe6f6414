"""The coordinator's flow for a population: contributions become slots, and generations run.

The order is the protocol: contributions become slots; calibration text is split by whole clusters
into what adapts, what measures fitness and what guards; generations run; held-out blocks are read
once, at the end. The texts lie here (`PooledTexts`) or stay with their contributors
(`PrivateTexts`); everything else is the same.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from molora_fed.charter import Charter
from molora_fed.contributions.contributed import (
    Contributed,
    Entrant,
    collect_contributed,
    collect_entrant,
)
from molora_fed.contributions.ledger import Ledger
from molora_fed.contributions.manifest import Contribution
from molora_fed.contributions.receive import load_admitted
from molora_fed.cooperative.cooperative import Cooperative
from molora_fed.cooperative.decisions import begin_fusion, end_fusion
from molora_fed.cooperative.pins import check_pins
from molora_fed.errors import ConfigError
from molora_fed.fusion.held_out import choose_held_out
from molora_fed.models.base import Base
from molora_fed.plugins import Plugins, get_plugins
from molora_fed.population.bundle import EvolvedModel, save_evolved
from molora_fed.population.evolution import Branch, EvolutionData, Evolved
from molora_fed.population.generations import evolve
from molora_fed.population.lifecycle import open_operators
from molora_fed.population.losses import evaluate_population
from molora_fed.population.pooled import PooledData
from molora_fed.population.private import Member, PrivateData, evaluate_privately
from molora_fed.population.questions import Ask
from molora_fed.population.router_files import parse_router_options
from molora_fed.population.router_probes import check_trained
from molora_fed.population.setup import (
    build_config,
    build_result,
    build_start,
    carve_contributions,
)
from molora_fed.population.split import join_domains
from molora_fed.reporting.population import write_population_report
from molora_fed.storage.files import write_json
from molora_fed.types import Progress

__all__ = [
    "EvolutionResult",
    "EvolutionTexts",
    "PooledTexts",
    "PrivateTexts",
    "evolve_admitted",
    "evolve_contributions",
    "evolve_cooperative",
]

ACTOR = "molora evolve"
RESULT_FILE = "evolution.json"
EVOLVED_FOLDER = "evolved"


@dataclass(frozen=True, eq=False)
class EvolutionResult:
    """An evolution with its held-out figures.

    Attributes:
        result: Content of `evolution.json`.
        evolved: Population, router and generations.
        model_folder: The evolved model.
        folder: Where all of it lies.
    """

    result: dict[str, Any]
    evolved: Evolved
    model_folder: Path
    folder: Path


class EvolutionTexts(Protocol):
    """The contributors' texts, wherever they lie."""

    @property
    def entrants(self) -> Sequence[Entrant]:
        """The contributions, in the order of the slots."""

    def open(self, on_phase: Callable[[str], None], progress: Progress | None) -> EvolutionData:
        """The data that generations are trained and measured on."""

    def measure_held_out(
        self, start: Branch, evolved: Evolved, progress: Progress | None
    ) -> tuple[Sequence[str], Mapping[str, Any]]:
        """Domains and figures on held-out blocks; called once, after `open`."""


class PooledTexts:
    """Texts that lie here, as contributions' samples.

    Args:
        base: The charter's base checkpoint.
        charter: Decides router, fitness and how the texts are split.
        contributions: Admitted contributions, in any order.
        folder: Gets `states/`.
        plugins: Where routers and fitness scopes are registered.

    Raises:
        ConfigError: If there are no contributions, or no calibration blocks.
        PopulationError: If there is too little calibration text.
    """

    def __init__(
        self,
        base: Base,
        charter: Charter,
        contributions: Sequence[Contributed],
        folder: Path,
        *,
        plugins: Plugins,
    ) -> None:
        self.entrants = sorted(contributions, key=lambda one: one.id)
        self._base = base
        self._charter = charter
        self._states = folder / "states"
        self._plugins = plugins
        self._batch = charter.identity.corpus.evaluation_batch
        self._carved = carve_contributions(charter, self.entrants)

    def open(self, on_phase: Callable[[str], None], progress: Progress | None) -> EvolutionData:
        """Compute the base's states, or find them on disk; see `EvolutionTexts`."""
        rules = self._charter.amendment.population
        router, options = parse_router_options(rules.router, rules.options, self._plugins)
        on_phase("states of the base")
        return PooledData(
            self._base,
            self._carved,
            router.reads(options),
            self._states,
            scope=rules.scope,
            plugins=self._plugins,
            batch=self._batch,
            progress=progress,
        )

    def measure_held_out(
        self, start: Branch, evolved: Evolved, progress: Progress | None
    ) -> tuple[Sequence[str], Mapping[str, Any]]:
        """Measure the evolved model, and each contribution alone at the rank of its slot."""
        amendment, first = self._charter.amendment, start.population
        last = evolved.branch
        choice = choose_held_out(self.entrants, self._base)
        kept = [one.held_out.select(choice.overlaps[one.contributor].kept) for one in self.entrants]
        evaluation = evaluate_population(
            EvolvedModel(self._base, last.population, last.router, amendment.population.router),
            join_domains([blocks for blocks in kept if len(blocks)]),
            self._states,
            alone={
                one.contributor: (replace(first, slots=(first.slots[index],)), 0)
                for index, one in enumerate(self.entrants)
            },
            batch=self._batch,
            seed=amendment.seed,
            progress=progress,
        )
        return evaluation.domains, {**evaluation.to_json(), "overlap": choice.to_json()}


class PrivateTexts:
    """Texts that stay with their contributors, who are asked.

    Args:
        charter: Decides router, fitness and rounds.
        contributions: Admitted ones, in canonical order.
        ask: Asks their contributors.
        plugins: Where routers and fitness scopes are registered.
    """

    def __init__(
        self,
        charter: Charter,
        contributions: Sequence[Contribution],
        ask: Ask,
        *,
        plugins: Plugins,
    ) -> None:
        self.entrants = [collect_entrant(one) for one in contributions]
        rules = charter.amendment.population
        self._router_name = rules.router
        self._data = PrivateData(
            [Member(one.id, one.contributor, one.domain) for one in self.entrants],
            ask,
            scope=rules.scope,
            rounds=rules.rounds,
            router_name=rules.router,
            plugins=plugins,
        )

    def open(self, on_phase: Callable[[str], None], progress: Progress | None) -> EvolutionData:
        """Ask nothing yet; see `EvolutionTexts`."""
        return self._data

    def measure_held_out(
        self, start: Branch, evolved: Evolved, progress: Progress | None
    ) -> tuple[Sequence[str], Mapping[str, Any]]:
        """Ask for sums of losses on held-out blocks."""
        last = evolved.generations[-1]
        measured = evaluate_privately(
            self._data,
            evolved.branch,
            start,
            [one.contributor for one in self.entrants],
            router_name=self._router_name,
            gates={d: dict(zip(last.slots, row, strict=True)) for d, row in last.gates.items()},
        )
        return self._data.domains, measured


def evolve_contributions(
    base: Base,
    charter: Charter,
    texts: EvolutionTexts,
    folder: Path,
    *,
    plugins: Plugins,
    threads: int = 1,
    on_phase: Callable[[str], None] = lambda phase: None,
    progress: Progress | None = None,
) -> EvolutionResult:
    """Evolve contributions, or go on; measure on held-out texts, once; write the evolved model.

    Args:
        base: The charter's base checkpoint.
        charter: Decides slots, router, fitness, lifecycle and guard.
        texts: The contributions and their texts.
        folder: Gets the evolution's files, `evolved/` and `evolution.json`.
        plugins: Where everything is registered.
        threads: Torch threads of adaptation.
        on_phase: Told what begins.
        progress: Receives progress within a phase.

    Raises:
        PopulationError: If the rules cannot be used.
        MoloraError: Whatever adaptation raises; a StorageError on I/O errors.
    """
    rules = charter.amendment.population
    steps = open_operators([(one.name, one.options) for one in rules.lifecycle], plugins)
    start = build_start(base, charter, texts.entrants, plugins)
    data = texts.open(on_phase, progress)
    config = build_config(rules, len(data.domains), seed=charter.amendment.seed, threads=threads)
    evolved = evolve(
        start, data, steps, config, folder, plugins=plugins, on_phase=on_phase, progress=progress
    )
    if evolved.branch.router.entry is not None:
        check_trained(evolved.branch.router.entry, evolved.branch.router)
    on_phase("held-out")
    domains, measured = texts.measure_held_out(start, evolved, progress)
    save_evolved(base, evolved.branch, rules.router, folder / EVOLVED_FOLDER)
    result = build_result(charter, texts.entrants, evolved, domains, measured)
    write_json(folder / RESULT_FILE, result)
    return EvolutionResult(result, evolved, folder / EVOLVED_FOLDER, folder)


def evolve_admitted(
    ledger: Ledger,
    charter: Charter,
    base: Base,
    texts: EvolutionTexts,
    folder: Path,
    *,
    actor: str,
    plugins: Plugins,
    threads: int = 1,
    publish: Callable[[EvolutionResult, Path], None] = lambda result, report: None,
    on_phase: Callable[[str], None] = lambda phase: None,
    progress: Progress | None = None,
) -> tuple[EvolutionResult, Path]:
    """Evolve admitted contributions, write the report, and keep the decisions in the ledger.

    Args:
        ledger: Open for writing; ends as PUBLISHED.
        charter: The cooperative's charter.
        base: Its base.
        texts: The admitted contributions and their texts.
        folder: Gets everything.
        actor: Who does this, for the history.
        plugins: Where everything is registered.
        threads: Torch threads of adaptation.
        publish: Hands result and report on, before the ledger says that it is published.
        on_phase: Told what begins.
        progress: Receives progress within a phase.

    Returns:
        The result, and the path of its report.

    Raises:
        MoloraError: Whatever `evolve_contributions` raises.
    """
    begin_fusion(ledger, actor=actor)
    result = evolve_contributions(
        base,
        charter,
        texts,
        folder,
        plugins=plugins,
        threads=threads,
        on_phase=on_phase,
        progress=progress,
    )
    on_phase("report")
    report = write_population_report(folder)
    publish(result, report)
    end_fusion(ledger, actor=actor, result=result.result)
    return result, report


def evolve_cooperative(
    cooperative: Cooperative,
    *,
    out: Path | None = None,
    plugins: Plugins | None = None,
    threads: int = 1,
    on_phase: Callable[[str], None] = lambda phase: None,
    progress: Progress | None = None,
) -> tuple[EvolutionResult, Path]:
    """Evolve all admitted contributions; safe to interrupt, run again to resume.

    Args:
        cooperative: Whose charter, base and ledger count.
        out: Gets everything; `evolution/` of the cooperative's folder if None.
        plugins: Where everything is registered; the installed plugins by default.
        threads: Torch threads of adaptation.
        on_phase: Told what begins.
        progress: Receives progress within a phase.

    Returns:
        The result, and the path of its report.

    Raises:
        ConfigError: If its texts are private: then the server evolves.
        PluginError: If plugins that the charter pins are not here as they are pinned.
        LedgerError: If another process, such as a server, works on the cooperative.
        MoloraError: Whatever `PooledTexts` and `evolve_contributions` raise.
    """
    plugins, out = plugins or get_plugins(), out or cooperative.folder / "evolution"
    charter = cooperative.charter
    check_pins(charter, plugins)
    if charter.is_private:
        raise ConfigError(
            f"Cannot evolve '{cooperative.folder}' here: expected texts that lie here, got a "
            "charter under which they stay with contributors. Run `molora serve`: it evolves once "
            "enough contributions are admitted, while their contributors are connected."
        )
    with cooperative.open_ledger() as ledger:
        on_phase("base")
        base = cooperative.load_base(progress)
        admitted = load_admitted(ledger, cooperative.store)
        contributed = [collect_contributed(one) for one in admitted]
        return evolve_admitted(
            ledger,
            charter,
            base,
            PooledTexts(base, charter, contributed, out, plugins=plugins),
            out,
            actor=ACTOR,
            plugins=plugins,
            threads=threads,
            on_phase=on_phase,
            progress=progress,
        )
