"""Losses and mean gates of a whole population over blocks: what guards and reports compare."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molora_fed.bank.states import BaseStates, build_states
from molora_fed.corpus.blocks import Blocks
from molora_fed.errors import PopulationError
from molora_fed.evaluation.bootstrap import ClusterIndex
from molora_fed.evaluation.evaluate import Evaluation, compute_best_domains
from molora_fed.models.base import Base
from molora_fed.models.forward import run_blocks
from molora_fed.population.bundle import EvolvedModel
from molora_fed.population.contract import AdapterRouter, Population
from molora_fed.population.mixture import Mixture
from molora_fed.types import Progress

__all__ = [
    "compute_mean_gates",
    "evaluate_population",
    "list_clusters",
    "measure_population",
    "sum_clusters",
]


def measure_population(
    base: Base,
    population: Population,
    router: AdapterRouter | Tensor,
    states: Sequence[BaseStates],
    *,
    batch: int = 16,
    progress: Progress | None = None,
) -> list[Tensor]:
    """Loss of every predicted token under a population; one pass over the blocks.

    Args:
        base: The base; its model runs where it lies, and stays as it is.
        population: The slots.
        router: Their router, which stays as it is; or gates that are equal everywhere, (P,).
        states: The base over each domain's blocks, with what the router reads.
        batch: Blocks per forward pass; one value wherever figures are compared.
        progress: Told the blocks done and in all.

    Returns:
        Losses by domain, (N, T-1) float32 nats each, on the CPU.

    Raises:
        PopulationError: If the slots do not fit the base, the router is for another number, or a
            loss is not finite.
    """
    device = next(base.model.parameters()).device
    mixture = Mixture(base.model, population).to(device).requires_grad_(False)
    gating = copy.deepcopy(router).to(device)
    if isinstance(gating, AdapterRouter):
        gating.eval()
    in_all = sum(len(state) for state in states)
    done = 0
    losses = []
    for state in states:
        rows = []
        for part in state.batches(batch, device):
            with torch.no_grad():
                gates = (
                    gating.compute_gates(part.view) if isinstance(gating, AdapterRouter) else gating
                )
            with mixture.mixed(gates):
                (result,) = run_blocks(base.model, part.tokens, batch=len(part.tokens))
            rows.append(-result.logprob[:, 1:].cpu())
            done += len(part.tokens)
            if progress is not None:
                progress(done, in_all)
        losses.append(torch.cat(rows))
        if not bool(torch.isfinite(losses[-1]).all()):
            raise PopulationError(
                f"Cannot measure a population on '{state.domain}': expected finite losses, got "
                "others. Adapt at lower rates."
            )
    return losses


def list_clusters(blocks: Blocks) -> NDArray[np.int32]:
    """Clusters of a domain's predicted tokens in the order in which losses are summed, (C,)."""
    return np.unique(blocks.clusters[:, 1:])


def sum_clusters(
    blocks: Sequence[Blocks], values: Sequence[Tensor]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Sums per document cluster, domain after domain.

    Args:
        blocks: One per domain.
        values: A figure per predicted token of each, (N, T-1).

    Returns:
        Sums (C,), predicted tokens (C,) and index of the domain (C,) of each cluster.
    """
    sums, counts, domain_of = [], [], []
    for index, (own, figures) in enumerate(zip(blocks, values, strict=True)):
        _, places = np.unique(own.clusters[:, 1:], return_inverse=True)
        flat = places.ravel()
        counts.append(np.bincount(flat).astype(np.float64))
        sums.append(np.bincount(flat, weights=figures.double().numpy().ravel()))
        domain_of.append(np.full(len(counts[-1]), index, dtype=np.int64))
    return np.concatenate(sums), np.concatenate(counts), np.concatenate(domain_of)


@torch.no_grad()
def compute_mean_gates(
    router: AdapterRouter, states: Sequence[BaseStates], *, batch: int = 16
) -> NDArray[np.float64]:
    """Mean gate of every slot by domain, without running the model.

    Args:
        router: The router.
        states: One per domain, none empty.
        batch: Blocks at a time.

    Returns:
        Means over the positions that predict, (domains, P).
    """
    device = next((p.device for p in router.parameters()), torch.device("cpu"))
    means = np.zeros((len(states), router.num_slots))
    for index, state in enumerate(states):
        for part in state.batches(batch, device):
            gates = router.compute_gates(part.view)[:, :-1]
            means[index] += gates.double().sum(dim=(0, 1)).cpu().numpy()
        means[index] /= len(state) * (state.blocks.block_size - 1)
    return means


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
