"""Evolution on this machine: adaptation, fitness and guard on carved calibration blocks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molora_fed.bank.states import BaseStates, build_states
from molora_fed.bank.views import GateReading
from molora_fed.corpus.blocks import Blocks
from molora_fed.errors import PopulationError
from molora_fed.models.base import Base
from molora_fed.options import Choice, check_choices
from molora_fed.plugins import Plugins
from molora_fed.population.adaptation import adapt
from molora_fed.population.adaptation_config import AdaptationConfig
from molora_fed.population.contract import Fitness, LossTable
from molora_fed.population.evolution import Branch
from molora_fed.population.fitness import measure_losses
from molora_fed.population.guard import Comparison, compare_branches
from molora_fed.population.lifecycle import compute_fitness
from molora_fed.population.losses import compute_mean_gates, measure_population, sum_clusters
from molora_fed.population.split import Carved, Part
from molora_fed.storage.files import hash_bytes
from molora_fed.types import Progress

__all__ = ["PooledData", "select_clusters"]


class PooledData:
    """Data of an evolution whose blocks all lie here; see `EvolutionData`.

    Attributes:
        domains: Domain names.
    """

    def __init__(
        self,
        base: Base,
        carved: Carved,
        readings: frozenset[GateReading],
        folder: Path,
        *,
        scope: Choice,
        plugins: Plugins,
        batch: int = 16,
        progress: Progress | None = None,
    ) -> None:
        """Compute the base's states of everything, or find them on disk.

        Args:
            base: The base; its model runs where it lies.
            carved: The blocks.
            readings: What the router reads.
            folder: Where states lie; a bank's folder will do.
            scope: Fitness scope.
            plugins: Where it is looked up.
            batch: Blocks per forward pass.
            progress: Told the blocks done and in all.
        """
        self.domains = carved.domains
        self._base = base
        self._carved = carved
        self._scope = scope
        self._plugins = plugins
        self._batch = batch
        check_choices([(plugins.fitness_scopes, "population.scope", [scope])])

        def build(blocks: Sequence[Blocks]) -> tuple[BaseStates, ...]:
            return build_states(base, blocks, readings, folder, batch=batch, progress=progress)

        self._adaptation = build(carved.adaptation)
        self._fitness = build(carved.fitness.blocks)
        self._guard = [build(part.blocks) for part in carved.guard]

    def describe(self) -> Mapping[str, Any]:
        """See `EvolutionData`."""
        carved = self._carved
        return {
            "base": self._base.weights,
            "scope": self._scope.model_dump(mode="json"),
            "batch": self._batch,
            "adaptation": [own.fingerprint for own in carved.adaptation],
            "fitness": _describe(carved.fitness),
            "guard": [_describe(part) for part in carved.guard],
        }

    def adapt(
        self, branch: Branch, config: AdaptationConfig, folder: Path, progress: Progress | None
    ) -> Branch:
        """See `EvolutionData`."""
        adapted = adapt(
            self._base,
            branch.population,
            branch.router,
            self._adaptation,
            config,
            folder,
            progress=progress,
        )
        return Branch(*adapted)

    def measure_fitness(
        self, branch: Branch, generation: int, progress: Progress | None
    ) -> Fitness:
        """See `EvolutionData`."""
        table = measure_losses(
            self._base,
            branch.population,
            branch.router,
            self._fitness,
            batch=self._batch,
            progress=progress,
        )
        table = select_clusters(table, self._carved.fitness.counts())
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
        """See `EvolutionData`.

        Raises:
            PopulationError: If there is no such guard sample, or it is too small.
        """
        if sample >= len(self._guard):
            raise PopulationError(
                f"Cannot guard a lifecycle: expected {sample + 1} guard samples, got "
                f"{len(self._guard)}. Carve as many as there are generations."
            )
        part = self._carved.guard[sample]
        chosen = part.counts()
        summed = []
        for branch in (lifecycle, twin):
            losses = measure_population(
                self._base,
                branch.population,
                branch.router,
                self._guard[sample],
                batch=self._batch,
                progress=progress,
            )
            sums, counts, domain_of = sum_clusters(part.blocks, losses)
            summed.append(sums[chosen])
        return compare_branches(
            summed[0],
            summed[1],
            counts[chosen],
            domain_of[chosen],
            domains=self.domains,
            delta=delta,
            level=level,
        )

    def measure_gates(self, branch: Branch) -> NDArray[np.float64]:
        """See `EvolutionData`."""
        return compute_mean_gates(branch.router, self._fitness, batch=self._batch)


def select_clusters(table: LossTable, chosen: NDArray[np.bool_]) -> LossTable:
    """The losses of some clusters only.

    Args:
        table: Losses of all.
        chosen: Which of them, (C,).
    """
    return LossTable(
        domains=table.domains,
        domain_of=table.domain_of[chosen],
        counts=table.counts[chosen],
        base=table.base[chosen],
        full=table.full[chosen],
        without=table.without[:, chosen],
        passes=table.passes,
    )


def _describe(part: Part) -> list[str]:
    """One hash a domain, over blocks and the clusters that count."""
    pairs = zip(part.blocks, part.clusters, strict=True)
    return [hash_bytes(f"{b.fingerprint} {c.tolist()}".encode()) for b, c in pairs]
