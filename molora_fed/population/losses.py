"""Losses of a whole population over blocks: what guards and reports compare."""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molora_fed.bank.states import BaseStates
from molora_fed.corpus.blocks import Blocks
from molora_fed.errors import PopulationError
from molora_fed.models.base import Base
from molora_fed.models.forward import run_blocks
from molora_fed.population.contract import AdapterRouter, Population
from molora_fed.population.mixture import Mixture
from molora_fed.types import Progress

__all__ = [
    "compute_mean_gates",
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
                gates = gating(part.view) if isinstance(gating, AdapterRouter) else gating
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
            means[index] += router(part.view)[:, :-1].double().sum(dim=(0, 1)).cpu().numpy()
        means[index] /= len(state) * (state.blocks.block_size - 1)
    return means
