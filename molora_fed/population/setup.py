"""Evolving a cooperative's admitted contributions: `molora evolve`, on folders.

The order is the protocol: contributions become slots; calibration text is carved by whole clusters
into what adapts, what measures fitness and what guards; generations run; held-out blocks are read
once, at the end.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from molora_fed.adapters.files import load_adapter
from molora_fed.charter import Charter, PopulationRules
from molora_fed.contributions.contributed import Contributed
from molora_fed.errors import ConfigError
from molora_fed.evaluation.evaluate import Evaluation
from molora_fed.models.base import Base, check_base
from molora_fed.plugins import Plugins
from molora_fed.population.adaptation_config import AdaptationConfig
from molora_fed.population.bundle import EvolvedModel, save_evolved
from molora_fed.population.contract import Population
from molora_fed.population.evaluation import evaluate_population
from molora_fed.population.evolution import Branch, EvolutionConfig, Evolved
from molora_fed.population.generations import evolve
from molora_fed.population.lifecycle import open_operators
from molora_fed.population.pooled import PooledData
from molora_fed.population.router_files import open_router, parse_router_options
from molora_fed.population.slots import make_population
from molora_fed.population.split import Carved, Shares, carve_blocks, join_domains
from molora_fed.storage.files import write_json
from molora_fed.types import Progress

__all__ = [
    "Entrant",
    "EvolutionResult",
    "build_config",
    "build_result",
    "build_start",
    "carve_contributions",
    "evolve_contributions",
]


RESULT_FILE = "evolution.json"
EVOLVED_FOLDER = "evolved"


@dataclass(frozen=True, eq=False)
class EvolutionResult:
    """An evolution with its held-out figures.

    Attributes:
        result: Content of `evolution.json`.
        evolved: Population, router and generations.
        evaluation: Held-out losses by document cluster.
        model_folder: The evolved model.
        folder: Where all of it lies.
    """

    result: dict[str, Any]
    evolved: Evolved
    evaluation: Evaluation
    model_folder: Path
    folder: Path


def evolve_contributions(
    base: Base,
    charter: Charter,
    contributions: Sequence[Contributed],
    folder: Path,
    *,
    plugins: Plugins,
    threads: int = 1,
    on_phase: Callable[[str], None] = lambda phase: None,
    progress: Progress | None = None,
) -> EvolutionResult:
    """Evolve contributions under a charter's `[amendment.population]`.

    Args:
        base: The charter's base checkpoint.
        charter: Decides slots, router, fitness, lifecycle and guard.
        contributions: Admitted contributions, in any order.
        folder: Gets `states/`, the evolution's files, `evolved/` and `evolution.json`.
        plugins: Where everything is registered.
        threads: Torch threads of adaptation.
        on_phase: Told what begins.
        progress: Receives progress within a phase.

    Raises:
        BaseCheckpointError: If the base is not the charter's.
        ConfigError: If there are no contributions, or no calibration blocks.
        PopulationError: If the rules cannot be used, or there is too little calibration text.
        MoloraError: Whatever adaptation refuses, and I/O errors.
    """
    check_base(base, charter.identity.base)
    rules, batch = charter.amendment.population, charter.identity.corpus.evaluation_batch
    ordered = sorted(contributions, key=lambda one: one.id)
    steps = open_operators([(one.name, one.options) for one in rules.lifecycle], plugins)
    carved = carve_contributions(charter, ordered)
    start = build_start(base, charter, ordered, plugins)
    router, options = parse_router_options(rules.router, rules.options, plugins)
    on_phase("states of the base")
    data = PooledData(
        base,
        carved,
        router.reads(options),
        folder / "states",
        scope=rules.scope,
        plugins=plugins,
        batch=batch,
        progress=progress,
    )
    config = build_config(rules, len(carved.domains), seed=charter.amendment.seed, threads=threads)
    evolved = evolve(
        start,
        data,
        steps,
        config,
        folder,
        plugins=plugins,
        on_phase=on_phase,
        progress=progress,
    )
    on_phase("held-out")
    model = EvolvedModel(base, evolved.branch.population, evolved.branch.router, rules.router)
    evaluation = evaluate_population(
        model,
        join_domains([one.held_out for one in ordered]),
        folder / "states",
        alone=_find_specialists(start.population, ordered),
        batch=batch,
        seed=charter.amendment.seed,
        progress=progress,
    )
    save_evolved(base, evolved.branch, rules.router, folder / EVOLVED_FOLDER)
    result = build_result(charter, ordered, evolved, evaluation.domains, evaluation.to_json())
    write_json(folder / RESULT_FILE, result)
    return EvolutionResult(result, evolved, evaluation, folder / EVOLVED_FOLDER, folder)


def carve_contributions(charter: Charter, contributions: Sequence[Contributed]) -> Carved:
    """Carve contributors' calibration blocks as the charter says.

    Raises:
        ConfigError: If there are no contributions, or one has no calibration blocks.
        PopulationError: If there is too little text.
    """
    bare = [one.contributor for one in contributions if not one.calibration]
    if bare or not contributions:
        raise ConfigError(
            "Cannot evolve: expected admitted contributions with calibration blocks, got "
            f"{'none from ' + ', '.join(bare) if bare else 'no contribution'}. Wait for "
            "contributors, or ask for calibration blocks."
        )
    rules = charter.amendment.population
    return carve_blocks(
        join_domains([one.calibration for one in contributions if one.calibration]),
        draws=rules.guard_samples,
        seed=charter.amendment.seed,
        shares=Shares(rules.adaptation_share, rules.fitness_share, rules.guard_share),
    )


class Entrant(Protocol):
    """What an evolution needs of a contribution: id, name, domain, and folder of the adapter."""

    @property
    def id(self) -> str:
        """Contribution id."""

    @property
    def contributor(self) -> str:
        """The contributor's name."""

    @property
    def domain(self) -> str:
        """Domain it was trained on."""

    @property
    def adapter(self) -> Path:
        """Folder with the adapter's files."""


def build_start(
    base: Base, charter: Charter, contributions: Sequence[Entrant], plugins: Plugins
) -> Branch:
    """The first generation: contributions as slots, and a fresh router.

    Args:
        base: The charter's base.
        charter: Decides slots and router.
        contributions: In the order of the slots.
        plugins: Where adapter kinds and the router are registered.

    Raises:
        AdapterError: If an adapter is malformed.
        PopulationError: If the slots or the router's options cannot be used.
    """
    rules, limits = charter.amendment.population, charter.identity.adapters
    adapters = [
        (
            one.contributor,
            one.domain,
            load_adapter(one.adapter, rules=limits, plugins=plugins, name=one.contributor),
        )
        for one in contributions
    ]
    population = make_population(
        base,
        adapters,
        num_slots=rules.slots or len(adapters),
        rank=rules.rank,
        filling=rules.filling,
        frozen_depth=limits.frozen_depth,
        seed=charter.amendment.seed,
    )
    router = open_router(
        rules.router,
        rules.options,
        base=base,
        num_slots=population.num_slots,
        seed=charter.amendment.seed,
        plugins=plugins,
    )
    return Branch(population, router)


def build_config(
    rules: PopulationRules, domains: int, *, seed: int, threads: int
) -> EvolutionConfig:
    """The loop's settings.

    Args:
        rules: The charter's.
        domains: Number of domains.
        seed: Of data order, operators and newborns' gates.
        threads: Torch threads.
    """
    adaptation = AdaptationConfig(
        steps=rules.steps,
        batch=rules.blocks_per_domain * domains,
        seed=seed,
        threads=threads,
        learning_rate=rules.learning_rate,
        router_learning_rate=rules.router_learning_rate,
    )
    return EvolutionConfig(
        adaptation=adaptation,
        router_name=rules.router,
        generations=rules.generations,
        start_steps=rules.start_steps,
        guard=rules.guard,
        delta=rules.delta,
        level=rules.level,
        seed=seed,
    )


def _find_specialists(
    start: Population, contributions: Sequence[Contributed]
) -> dict[str, tuple[Population, int]]:
    """Each contribution alone, as it entered: at the rank of its slot."""
    return {
        one.contributor: (replace(start, slots=(start.slots[index],)), 0)
        for index, one in enumerate(contributions)
    }


def build_result(
    charter: Charter,
    contributions: Sequence[Entrant],
    evolved: Evolved,
    domains: Sequence[str],
    measured: Mapping[str, Any],
) -> dict[str, Any]:
    """Content of `evolution.json`.

    Args:
        charter: The cooperative's charter.
        contributions: In the order of the slots.
        evolved: The evolution.
        domains: Domain names.
        measured: Held-out figures, JSON values.
    """
    rules = charter.amendment.population
    compared = evolved.compared
    return {
        **measured,
        "cooperative": charter.identity.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": charter.amendment.seed,
        "router": rules.router,
        "domains": list(domains),
        "own_domain": {one.contributor: one.domain for one in contributions},
        "population": rules.model_dump(mode="json"),
        "generations": [asdict(one) for one in evolved.generations],
        "guard": {
            "mode": rules.guard,
            "compared": len(compared),
            "kept": sum(one.kept for one in compared),
        },
        "fingerprints": {
            "base": charter.identity.base.weights,
            "charter": charter.identity_hash,
            "contributions": {one.contributor: one.id for one in contributions},
            "population": evolved.generations[-1].population,
            "router": evolved.generations[-1].router,
        },
    }
