"""Divergences and gains from losses: the only place where they are computed."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from molora_fed.errors import ConfigError
from molora_fed.types import LossMatrix, Reference

__all__ = [
    "best_own_losses",
    "compute_divergences",
    "compute_equal_weight_loss",
    "compute_gain_percent",
    "compute_gains",
    "compute_own_divergences",
    "compute_reference_losses",
    "keep_own_losses",
    "reduce_percent",
]


Figures = TypeVar("Figures", float, NDArray[np.float64])


def reduce_percent(reference_loss: Figures, loss: Figures) -> Figures:
    """The formula of every gain: by how many percent of the reference the loss is lower.

    Args:
        reference_loss: Nats per token, > 0: a number, or an array of any shape.
        loss: Nats per token, of the same shape.
    """
    return 100.0 * (reference_loss - loss) / reference_loss


def compute_gain_percent(reference_loss: float, loss: float) -> float:
    """Loss reduction in percent, `100 * (reference_loss - loss) / reference_loss`.

    Args:
        reference_loss: Nats per token, > 0.
        loss: Nats per token.

    Returns:
        Percent; negative if `loss` is the larger.

    Raises:
        ConfigError: If `reference_loss` is not positive.

    Source: arXiv 2603.22755, evaluation protocol.
    """
    if not reference_loss > 0:
        raise ConfigError(
            f"Cannot compute a gain: expected a reference loss above 0 nats, "
            f"got {reference_loss}. Check the losses it came from."
        )
    return reduce_percent(reference_loss, loss)


def compute_equal_weight_loss(losses: Mapping[str, float], domains: Iterable[str]) -> float:
    """Average over domains with equal weight, nats per token.

    Args:
        losses: Nats per token by domain; further domains are ignored.
        domains: The domains that count.

    Raises:
        ConfigError: If there is no domain, or one has no loss.
    """
    names = list(domains)
    missing = [name for name in names if name not in losses]
    if missing or not names:
        raise ConfigError(
            f"Cannot average losses: expected one for each of the domains "
            f"{', '.join(names) or '(none)'}, got none for {', '.join(missing) or 'any'}. "
            "Evaluate every domain first."
        )
    return sum(losses[name] for name in names) / len(names)


def best_own_losses(matrix: LossMatrix) -> dict[str, float]:
    """Lowest own-domain loss by domain, nats per token.

    Several specialists may share a domain: the best of them counts. A domain that no specialist
    was trained on has the base's loss.
    """
    best = dict.fromkeys(matrix.domains, float("inf"))
    for name, domain in matrix.own_domain.items():
        best[domain] = min(best[domain], matrix.specialists[name][domain])
    return {d: matrix.base[d] if loss == float("inf") else loss for d, loss in best.items()}


def compute_divergences(matrix: LossMatrix) -> dict[str, float]:
    """Divergence of the best own specialist by domain, percent; negative = worse than the base.

    Source: arXiv 2603.22755, evaluation protocol.
    """
    own = best_own_losses(matrix)
    return {d: compute_gain_percent(matrix.base[d], own[d]) for d in matrix.domains}


def compute_own_divergences(matrix: LossMatrix) -> dict[str, float]:
    """Divergence of every specialist on its own domain, by its name, percent."""
    return {
        name: compute_gain_percent(matrix.base[own], matrix.specialists[name][own])
        for name, own in matrix.own_domain.items()
    }


def compute_reference_losses(matrix: LossMatrix) -> dict[Reference, float]:
    """Equal-weight loss of what gains are measured against, nats per token.

    Returns:
        `best_specialist`: the lowest over specialists; `best_alone`: that or the base, whichever
        is lower.

    Raises:
        ConfigError: If the matrix has no specialist or lacks a loss.
    """
    if not matrix.specialists:
        raise ConfigError(
            "Cannot compute a gain: expected at least one specialist, got none. "
            "Admit a contribution first."
        )
    best = min(
        compute_equal_weight_loss(losses, matrix.domains) for losses in matrix.specialists.values()
    )
    base = compute_equal_weight_loss(matrix.base, matrix.domains)
    return {"best_alone": min(base, best), "best_specialist": best}


def compute_gains(matrix: LossMatrix, fused: Mapping[str, float]) -> dict[Reference, float]:
    """Fusion gain in percent against both references.

    Args:
        matrix: Losses of base and specialists.
        fused: The fused model's loss by domain, nats per token.

    Raises:
        ConfigError: If a domain lacks a loss.
    """
    loss = compute_equal_weight_loss(fused, matrix.domains)
    references = compute_reference_losses(matrix)
    return {name: compute_gain_percent(value, loss) for name, value in references.items()}


def keep_own_losses(matrix: LossMatrix) -> LossMatrix:
    """The matrix without any specialist's loss off its own domain: what contributors state."""
    own = {
        name: {matrix.own_domain[name]: losses[matrix.own_domain[name]]}
        for name, losses in matrix.specialists.items()
    }
    return replace(matrix, specialists=own)
