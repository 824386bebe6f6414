"""What every slot is worth: losses of a population and of its counterfactuals, and their effects.

The counterfactual of slot i is the population with the gate of slot i at 0 at every token; the
other gates stay as they are.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molora_fed.bank.states import BaseStates
from molora_fed.errors import PopulationError
from molora_fed.models.base import Base
from molora_fed.models.forward import run_blocks
from molora_fed.population.contract import AdapterRouter, LossTable, Population, Slot
from molora_fed.population.mixture import Mixture
from molora_fed.types import Progress

__all__ = ["Effects", "check_losses", "compute_effects", "measure_losses"]

_SHOWN = 5


@dataclass(frozen=True, eq=False)
class Effects:
    """How much more the population would lose without each slot, nats per token.

    Attributes:
        total: Over all tokens, (P,).
        total_errors: Its standard errors by document cluster, (P,).
        by_domain: Over the tokens of each domain, (P, domains).
        domain_errors: Its standard errors by document cluster, (P, domains).
        regret: Loss of the population less that of the base by domain, (domains,).
    """

    total: NDArray[np.float64]
    total_errors: NDArray[np.float64]
    by_domain: NDArray[np.float64]
    domain_errors: NDArray[np.float64]
    regret: NDArray[np.float64]


def measure_losses(
    base: Base,
    population: Population,
    router: AdapterRouter,
    states: Sequence[BaseStates],
    *,
    batch: int = 16,
    progress: Progress | None = None,
) -> LossTable:
    """Losses of the base, the population, and the population without each slot.

    The base's are those on disk; each other takes one pass over the blocks. A slot that changes
    nothing (a fresh one before adaptation) needs none: without it the population is the same.

    Args:
        base: The base; its model runs where it lies, and stays as it is.
        population: The slots.
        router: Gates of the slots; it stays as it is.
        states: The base over each domain's fitness blocks, with what the router reads.
        batch: Blocks per forward pass; one value wherever figures are compared.
        progress: Told the batches done and in all, each batch run for every counterfactual.

    Returns:
        Sums per document cluster, domain after domain, from at most P + 1 passes.

    Raises:
        PopulationError: If the slots do not fit the base, the router is for another number, a
            domain is there twice or has no blocks, or a loss is not finite.
    """
    _check_request(population, router, states)
    device = next(base.model.parameters()).device
    mixture = Mixture(base.model, population).to(device).requires_grad_(False)
    gating = copy.deepcopy(router).to(device).eval()
    removed = [i for i, slot in enumerate(population.slots) if not _is_inert(slot)]
    in_all = sum(-(-len(state) // batch) for state in states)
    done = 0
    columns: dict[str, list[NDArray[np.float64]]] = {"counts": [], "base": []}
    measured: list[NDArray[np.float64]] = []  # (1 + removed, C of the domain) each
    for state in states:
        clusters = state.blocks.clusters[:, 1:]
        unique, flat = np.unique(clusters, return_inverse=True)
        of_token = flat.reshape(clusters.shape)
        columns["counts"].append(np.bincount(flat.ravel()).astype(np.float64))
        columns["base"].append(_sum(state.nll(), of_token, len(unique)))
        sums = np.zeros((1 + len(removed), len(unique)))
        for number, part in enumerate(state.batches(batch, device)):
            rows = of_token[number * batch : (number + 1) * batch]
            with torch.no_grad():
                gates = gating(part.view)
            for place, slot in enumerate([None, *removed]):
                losses = _run(base.model, mixture, part.tokens, _close(gates, slot))
                sums[place] += _sum(losses, rows, len(unique))
            done += 1
            if progress is not None:
                progress(done, in_all)
        measured.append(sums)
    losses = np.concatenate(measured, axis=1)
    _check_finite(losses, population, removed)
    without = np.repeat(losses[:1], population.num_slots, axis=0)
    without[removed] = losses[1:]
    sizes = [len(counts) for counts in columns["counts"]]
    return LossTable(
        domains=tuple(state.domain for state in states),
        domain_of=np.repeat(np.arange(len(sizes)), sizes),
        counts=np.concatenate(columns["counts"]),
        base=np.concatenate(columns["base"]),
        full=losses[0],
        without=without,
        passes=1 + len(removed),
    )


def _check_request(
    population: Population, router: AdapterRouter, states: Sequence[BaseStates]
) -> None:
    if router.num_slots != population.num_slots:
        raise PopulationError(
            f"Cannot measure fitness: expected a router of {population.num_slots} slots, got "
            f"{router.num_slots}. Build the router for this population."
        )
    domains = [state.domain for state in states]
    faults = [f"'{d}' twice" for d in dict.fromkeys(domains) if domains.count(d) > 1]
    faults += [f"no blocks of '{state.domain}'" for state in states if not len(state)]
    if faults or not states:
        raise PopulationError(
            "Cannot measure fitness: expected blocks of each domain once, got "
            f"{'; '.join(faults) or 'no domain'}. Correct the fitness data."
        )


def _is_inert(slot: Slot) -> bool:
    """Whether a slot changes no layer at all."""
    return not any(bool(u.tensors()["b"].any()) for u in slot.updates.values())


def _close(gates: Tensor, slot: int | None) -> Tensor:
    """Gates with one slot's at 0, (B, T, P)."""
    if slot is None:
        return gates
    closed = gates.clone()
    closed[..., slot] = 0.0
    return closed


def _run(model: Any, mixture: Mixture, tokens: Tensor, gates: Tensor) -> Tensor:
    """Losses of the predicted tokens of some blocks, (B, T-1) nats."""
    with mixture.mixed(gates):
        (result,) = run_blocks(model, tokens, batch=len(tokens))
    return -result.logprob[:, 1:]


def _sum(values: Tensor, of_token: NDArray[np.int64], clusters: int) -> NDArray[np.float64]:
    """Sums per cluster of a figure per predicted token, (B, T-1) -> (clusters,)."""
    weights = values.double().cpu().numpy().ravel()
    sums = np.bincount(of_token.ravel(), weights=weights, minlength=clusters)
    return sums.astype(np.float64, copy=False)


def _check_finite(
    losses: NDArray[np.float64], population: Population, removed: Sequence[int]
) -> None:
    wrong = np.flatnonzero(~np.isfinite(losses).all(axis=1))
    if len(wrong):
        names = [f"'{population.slots[index].birth.id}'" for index in removed]
        names = ["nobody", *names]
        raise PopulationError(
            "Cannot measure fitness: expected finite losses, got others without "
            f"{', '.join(names[place] for place in wrong[:_SHOWN])}. Adapt at lower rates."
        )


def check_losses(table: LossTable) -> None:
    """Refuse losses that no fitness can be computed from; all faults are named.

    Raises:
        PopulationError: If there is no slot, shapes differ, a number is not finite, or a domain
            has fewer than two clusters or a cluster without tokens: it has no standard error.
    """
    clusters = len(table.counts)
    faults = []
    shapes = {name: getattr(table, name).shape for name in ("domain_of", "counts", "base", "full")}
    faults += [f"{n} of shape {s}" for n, s in shapes.items() if s != (clusters,)]
    if table.without.ndim != 2 or not len(table.without) or table.without.shape[1] != clusters:
        faults.append(f"without of shape {table.without.shape}")
    for name in ("counts", "base", "full", "without"):
        if not np.isfinite(getattr(table, name)).all():
            faults.append(f"NaN or infinity in {name}")
    if not faults:
        if not (table.counts > 0).all():
            faults.append("a cluster without tokens")
        found = np.bincount(table.domain_of, minlength=len(table.domains))
        if len(found) > len(table.domains):
            faults.append(f"clusters of a domain {len(found) - 1}")
        faults += [
            f"{count} clusters of '{domain}'"
            for domain, count in zip(table.domains, found, strict=False)
            if count < 2
        ]
    if faults:
        raise PopulationError(
            f"Cannot compute fitness: expected finite losses of at least two document clusters in "
            f"each domain, got {'; '.join(faults[:_SHOWN])}. Measure on more documents."
        )


def compute_effects(table: LossTable) -> Effects:
    """Leave-one-out effects of all slots, with standard errors by document cluster.

    A scope combines them into one fitness per slot. An effect is a ratio, the sum of differences
    d_c over the sum of tokens n_c, so its standard error is the linearised one:
    `sqrt(C / (C - 1) * sum_c (d_c - effect * n_c)^2) / sum_c n_c`.

    Args:
        table: Losses per cluster.

    Raises:
        PopulationError: See `check_losses`.

    Source: Cochran, Sampling Techniques, 3rd ed., section 6.4 (ratio estimate).
    """
    check_losses(table)
    differences = table.without - table.full  # (P, C)
    total, total_errors = _estimate(differences, table.counts)
    per_domain = []
    regret = np.empty(len(table.domains))
    for domain in range(len(table.domains)):
        own = table.domain_of == domain
        per_domain.append(_estimate(differences[:, own], table.counts[own]))
        regret[domain] = (table.full[own].sum() - table.base[own].sum()) / table.counts[own].sum()
    by_domain = np.stack([effect for effect, _ in per_domain], axis=1)
    domain_errors = np.stack([error for _, error in per_domain], axis=1)
    return Effects(total, total_errors, by_domain, domain_errors, regret)


def _estimate(
    differences: NDArray[np.float64], counts: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ratio of sums and its standard error, (P, C) and (C,) -> twice (P,)."""
    clusters, tokens = len(counts), counts.sum()
    effects = differences.sum(axis=1) / tokens
    residuals = differences - effects[:, None] * counts
    squares = np.square(residuals).sum(axis=1)
    return effects, np.sqrt(clusters / (clusters - 1) * squares) / tokens
