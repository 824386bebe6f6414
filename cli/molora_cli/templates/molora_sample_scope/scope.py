"""The fitness scope: how a slot's effects become one number."""

from molora_fed import Fitness, LossTable
from molora_fed.population.fitness import compute_effects


def measure(table: LossTable) -> Fitness:
    """Measure the fitness of every slot: the one function to fill in.

    Args:
        table: Losses of the base and of the population, (C,), and of the population without slot
            i, (P, C), as sums over the tokens of C document clusters, nats; `counts` has the
            tokens, `domain_of` the domain of each cluster. On private text a cluster stands for
            many: use it through means and second moments, as `compute_effects` does.

    Returns:
        Fitness of each slot, (P,) nats per token, the loss that the population would have more
        without it; with standard errors by document cluster, (P,). `scope` is the name that is
        registered.

    See docs/hooks/fitness-scopes.md, and docs/populations.md.
    """
    effects = compute_effects(table)
    worst = effects.by_domain.argmin(axis=1)
    slots = range(len(worst))
    return Fitness(
        scope="sample-scope",
        values=effects.by_domain[slots, worst],
        errors=effects.domain_errors[slots, worst],
        by_domain=effects.by_domain,
        regret=effects.regret,
    )
