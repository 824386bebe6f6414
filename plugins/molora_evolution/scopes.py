"""Fitness scopes: how a slot's leave-one-out effects become one number.

Source: arXiv 2605.11153, abstract; how the domains are combined is our own definition.
"""

import numpy as np

from molora_fed.errors import PopulationError
from molora_fed.population.contract import Fitness, LossTable
from molora_fed.population.fitness import compute_effects

__all__ = ["measure_global", "measure_per_domain"]


def measure_global(table: LossTable) -> Fitness:
    """The effect over all tokens: loss without the slot less loss with it.

    Args:
        table: Losses per cluster.

    Raises:
        PopulationError: If the losses cannot be used.
    """
    effects = compute_effects(table)
    return Fitness(
        scope="global",
        values=effects.total,
        errors=effects.total_errors,
        by_domain=effects.by_domain,
        regret=effects.regret,
    )


def measure_per_domain(table: LossTable) -> Fitness:
    """The effect in the domain where it is largest: a slot is worth what it is worth at its best.

    A mean over domains would be `global` again wherever domains have equally many tokens; the
    largest keeps a slot that one domain needs, whatever it costs the others. As the largest of
    several estimates it is biased upwards, by about one standard error where four are equal. The
    error is that of the domain chosen.

    Args:
        table: Losses per cluster, of two domains at least.

    Raises:
        PopulationError: If there is one domain only, or the losses cannot be used.

    Source: own definition, see docs/populations.md.
    """
    if len(table.domains) < 2:
        raise PopulationError(
            f"Cannot measure fitness per domain: expected two domains at least, got "
            f"{', '.join(table.domains) or 'none'}. Use the scope 'global', or add a domain."
        )
    effects = compute_effects(table)
    best = effects.by_domain.argmax(axis=1)
    rows = np.arange(len(best))
    return Fitness(
        scope="per-domain",
        values=effects.by_domain[rows, best],
        errors=effects.domain_errors[rows, best],
        by_domain=effects.by_domain,
        regret=effects.regret,
    )
