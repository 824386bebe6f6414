"""What an evolution begins with under a charter, and the result that it writes.

`molora_fed.cooperative.evolve` runs it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from molora_fed.adapters.files import load_adapter
from molora_fed.charter import Charter, PopulationRules
from molora_fed.contributions.contributed import Contributed, Entrant
from molora_fed.errors import ConfigError
from molora_fed.models.base import Base
from molora_fed.plugins import Plugins
from molora_fed.population.adaptation_config import AdaptationConfig
from molora_fed.population.evolution import Branch, EvolutionConfig, Evolved
from molora_fed.population.router_files import open_router
from molora_fed.population.slots import make_population
from molora_fed.population.split import Carved, Shares, carve_blocks, join_domains

__all__ = [
    "build_config",
    "build_result",
    "build_start",
    "carve_contributions",
]


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
            load_adapter(
                one.adapter,
                rules=limits,
                model=base.model,
                plugins=plugins,
                name=one.contributor,
            ),
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
