"""Held-out figures of an evolved model, by the evaluator that every reported figure comes from."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molora_fed.bank.states import build_states
from molora_fed.corpus.blocks import Blocks
from molora_fed.evaluation.bootstrap import ClusterIndex
from molora_fed.evaluation.evaluate import Evaluation, compute_best_domains
from molora_fed.population.bundle import EvolvedModel
from molora_fed.population.contract import AdapterRouter, Population
from molora_fed.population.losses import compute_mean_gates, measure_population
from molora_fed.types import Progress

__all__ = ["evaluate_population"]


def evaluate_population(
    evolved: EvolvedModel,
    blocks: Sequence[Blocks],
    folder: Path,
    *,
    alone: Mapping[str, tuple[Population, int]] | None = None,
    batch: int = 16,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure base, single slots and population on blocks that nothing was trained or chosen on.

    Args:
        evolved: The model.
        blocks: Held-out blocks, one of each domain.
        folder: Where the base's states lie.
        alone: Specialists to report by name: a population and the slot of it that is at gate 1,
            the others at 0; this population's own slots by the ids of their adapters if None.
        batch: Blocks per forward pass.
        seed: Of the bootstrap.
        progress: Told the blocks done and in all, of each pass in turn.

    Returns:
        Losses of the base, `specialist:<name>`, the domain oracle among these, uniform gates
        (1 / P each), and the population as `fused:<router>`.

    Raises:
        PopulationError: If the slots do not fit the base, or a loss is not finite.
    """
    population = evolved.population
    singles = alone or {name: (population, index) for index, name in enumerate(evolved.slot_names)}
    readings = type(evolved.router).reads(evolved.router.options)
    states = build_states(evolved.base, blocks, readings, folder, batch=batch, progress=progress)
    offset, clusters = 0, []
    for own in blocks:  # every domain numbers its clusters on its own
        clusters.append(own.clusters.astype(np.int64) - int(own.clusters.min()) + offset)
        offset = int(clusters[-1].max()) + 1
    owner = np.repeat(np.arange(len(blocks)), [len(own) for own in blocks])
    index = ClusterIndex.build(np.concatenate(clusters), owner)

    def measure(slots: Population, gates: AdapterRouter | Tensor) -> NDArray[np.float64]:
        losses = measure_population(
            evolved.base, slots, gates, states, batch=batch, progress=progress
        )
        return index.sum(torch.cat(losses).numpy())

    sums = {"base": index.sum(torch.cat([state.nll() for state in states]).numpy())}
    for name, (slots, place) in singles.items():
        gates = torch.zeros(slots.num_slots)
        gates[place] = 1.0
        sums[f"specialist:{name}"] = measure(slots, gates)
    sums["domain_oracle"] = compute_best_domains(index, list(sums.values()))
    equal = torch.full((population.num_slots,), 1.0 / population.num_slots)
    sums["uniform"] = measure(population, equal)
    sums[f"fused:{evolved.router_name}"] = measure(population, evolved.router)
    means = compute_mean_gates(evolved.router, states, batch=batch)
    by_domain = {
        own.domain: dict(zip(evolved.slot_names, map(float, row), strict=True))
        for own, row in zip(blocks, means, strict=True)
    }
    domains = tuple(own.domain for own in blocks)
    return Evaluation(domains, index, sums, {evolved.router_name: by_domain}, seed)
