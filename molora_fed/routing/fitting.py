"""Fits routers on a bank: mini-batch AdamW as published, or all of it at once for few numbers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molora_fed.errors import RoutingError
from molora_fed.models.runtime import limit_threads
from molora_fed.types import Progress

if TYPE_CHECKING:
    from molora_fed.bank import CalibrationBank

__all__ = [
    "check_calibration",
    "compute_score_loss",
    "draw_batches",
    "fit_on_batches",
    "fit_on_whole",
]

_REPORT_EVERY = 25  # steps between reports of progress
_CHUNK_NUMBERS = 2**20  # numbers of the features handled at once: what fitting needs of memory

Scores = Callable[[Tensor], Tensor]
"""Turns features of B blocks (B, T, ...) into scores (B, T, E)."""


def check_calibration(bank: object) -> None:
    """Refuse anything but a calibration bank; every router's `fit` calls this first.

    Raises:
        RoutingError: If it is a held-out bank or no bank at all.
    """
    from molora_fed.bank import CalibrationBank

    if not isinstance(bank, CalibrationBank):
        raise RoutingError(
            f"Cannot fit a router: expected a CalibrationBank, got {type(bank).__name__}. "
            "Held-out blocks are for reports; build a bank of the calibration split."
        )


def draw_batches(
    bank: "CalibrationBank", *, steps: int, batch: int, seed: int, pure_steps: int = 0
) -> Tensor:
    """Choose the blocks of every step, domains in turn, so that each counts equally.

    Blocks of a domain are gone through in random order, then again in another.

    Args:
        bank: Where they come from.
        steps: Number of steps.
        batch: Blocks per step.
        seed: Of the order.
        pure_steps: Steps at the beginning whose blocks are all of one domain, domains in turn.

    Returns:
        Block indices, (steps, batch) int64.
    """
    generator = np.random.default_rng(seed)
    domains = len(bank.domains)
    pure = _take_turns(generator, domains, pure_steps).repeat(batch)
    order = np.concatenate([pure, _take_turns(generator, domains, (steps - pure_steps) * batch)])
    chosen = np.empty(steps * batch, dtype=np.int64)
    for domain in range(domains):
        rows = np.flatnonzero(bank.domain_of == domain)
        places = np.flatnonzero(order == domain)
        epochs = -(-len(places) // len(rows))
        shuffled = [generator.permutation(rows) for _ in range(epochs)]
        if shuffled:
            chosen[places] = np.concatenate(shuffled)[: len(places)]
    return torch.from_numpy(chosen.reshape(steps, batch))


def _take_turns(generator: np.random.Generator, domains: int, count: int) -> NDArray[np.int64]:
    """Domain indices, (count,): every domain once in random order, then again in another."""
    turns = [generator.permutation(domains) for _ in range(-(-count // domains))]
    return np.concatenate([np.zeros(0, dtype=np.int64), *turns])[:count]


def fit_on_batches(
    bank: "CalibrationBank",
    features: Tensor,
    parameters: Sequence[Tensor],
    scores: Scores,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
    curriculum: float = 0.0,
    progress: Progress | None = None,
) -> None:
    """Fit parameters with AdamW on mini-batches, in place; no model runs.

    Args:
        bank: Gives the losses, under its mixture.
        features: What scores are computed from, (N, T, ...), e.g. from `bank.derive`.
        parameters: Leaf tensors that `scores` uses; trainable while this runs.
        scores: Turns features of B blocks into scores (B, T, E), differentiably.
        steps: Optimiser steps.
        batch: Blocks per step.
        learning_rate: Of AdamW, constant.
        seed: Of the blocks' order.
        curriculum: Share of the steps, the first ones, whose blocks are all of one domain.
        progress: Receives steps done and in all, with the batch's `loss` in nats.

    Raises:
        RoutingError: If the loss is not finite at the end.
    """
    pure = round(curriculum * steps)
    schedule = draw_batches(bank, steps=steps, batch=batch, seed=seed, pure_steps=pure)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(list(parameters), lr=learning_rate, fused=True)
    loss = torch.zeros(())
    with _threads_for(bank):
        for step, rows in enumerate(schedule, start=1):
            chosen = features.index_select(0, rows).to(bank.device)
            loss = bank.score_nll(scores(chosen), rows).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if progress is not None and (step % _REPORT_EVERY == 0 or step == steps):
                progress(step, steps, loss=float(loss.detach()))
    for parameter in parameters:
        parameter.requires_grad_(False)
    if not bool(torch.isfinite(loss)):
        raise RoutingError(
            f"Cannot fit the router: expected a finite loss, got {float(loss.detach())}. "
            "Lower the learning rate."
        )


def fit_on_whole(
    bank: "CalibrationBank",
    features: Tensor,
    parameters: Sequence[Tensor],
    scores: Scores,
    *,
    iterations: int,
    rows: Tensor | None = None,
    progress: Progress | None = None,
) -> float:
    """Fit a few parameters with L-BFGS on the whole bank, in place; never worse than the start.

    The loss is the equal-weight mean over domains, the figure that is reported.

    Args:
        bank: Gives the losses, under its mixture.
        features: What scores are computed from, (N, T, ...).
        parameters: Leaf tensors that `scores` uses, at their start; at their best afterwards.
        scores: Turns features of B blocks into scores (B, T, E), differentiably.
        iterations: Largest number of L-BFGS iterations.
        rows: Indices (B,) int64 of the blocks to fit on, some of every domain; None takes all.
        progress: Receives evaluations done and an estimate of all, with `loss` in nats.

    Returns:
        The equal-weight calibration loss of the parameters kept, nats.
    """
    best_loss = float("inf")
    best = [parameter.detach().clone() for parameter in parameters]
    evaluations = 0
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        list(parameters), max_iter=iterations, line_search_fn="strong_wolfe", tolerance_change=1e-7
    )

    def closure() -> Tensor:
        nonlocal best_loss, evaluations
        optimizer.zero_grad()
        total = 0.0
        for loss in _weighted_losses(bank, features, scores, rows):
            loss.backward()
            total += float(loss.detach())
        if total < best_loss:
            best_loss = total
            for kept, parameter in zip(best, parameters, strict=True):
                kept.copy_(parameter.detach())
        evaluations += 1
        if progress is not None:
            progress(min(evaluations, iterations), iterations, loss=total)
        return torch.tensor(total)

    with _threads_for(bank):
        optimizer.step(closure)
    for kept, parameter in zip(best, parameters, strict=True):
        parameter.requires_grad_(False)
        parameter.copy_(kept)
    return best_loss


@torch.no_grad()
def compute_score_loss(bank: "CalibrationBank", features: Tensor, scores: Scores) -> float:
    """Equal-weight calibration loss of the gates softmax(scores), nats per token.

    Args:
        bank: Gives the losses, under its mixture.
        features: What scores are computed from, (N, T, ...).
        scores: Turns features of B blocks into scores (B, T, E).
    """
    return float(sum(float(loss) for loss in _weighted_losses(bank, features, scores, None)))


def _weighted_losses(
    bank: "CalibrationBank", features: Tensor, scores: Scores, chosen: Tensor | None
) -> Iterator[Tensor]:
    """Parts whose sum is the equal-weight mean over domains, some blocks at a time."""
    domain_of = bank.domain_of if chosen is None else bank.domain_of[chosen.numpy()]
    per_domain = np.bincount(domain_of, minlength=len(bank.domains))
    weights = torch.from_numpy(1.0 / (per_domain[domain_of] * len(bank.domains))).float()
    chunk = max(1, _CHUNK_NUMBERS // max(1, features[0].numel()))
    for start in range(0, len(domain_of), chunk):
        part = slice(start, min(start + chunk, len(domain_of)))
        rows = part if chosen is None else chosen[part]
        block_losses = bank.score_nll(scores(features[rows].to(bank.device)), rows).mean(dim=1)
        yield torch.dot(block_losses, weights[part].to(bank.device))


def _threads_for(bank: "CalibrationBank") -> AbstractContextManager[None]:
    """One thread for the probability mixture; all of them where logits are mixed.

    Its steps are so small that threads wait for each other longer than they work (a hundred times
    longer on a busy machine), and one thread gives the same bytes whatever the machine has.
    """
    return limit_threads(1 if bank.readout is None else torch.get_num_threads())
