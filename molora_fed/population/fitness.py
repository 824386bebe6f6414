"""What every slot is worth: losses of a population and of its counterfactuals, and their effects.

The counterfactual of slot i is the population with the gate of slot i at 0 at every token; the
other gates stay as they are.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from molora_fed.errors import PopulationError
from molora_fed.population.contract import LossTable

__all__ = ["Effects", "check_losses", "compute_effects"]

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
