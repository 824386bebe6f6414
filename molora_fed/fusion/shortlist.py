"""A member's shortlist: which experts it measures on all of its own text, and what that costs.

Every expert is run on a few calibration blocks; the best of them are run on all blocks, and the
base's columns stand for the others. On a few held-out blocks, which the choice has not seen, all
experts are run again: what a fused model loses there without the others' columns is said as sums.
The choice is made at home, and nothing is sent for it.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from molora_fed.corpus.blocks import Blocks
from molora_fed.errors import PluginError, RoutingError
from molora_fed.evaluation.bootstrap import ClusterIndex
from molora_fed.evaluation.evaluate import compute_router_losses
from molora_fed.evaluation.moments import (
    Moments,
    add_by_domain,
    check_clusters,
    estimate,
    measure_moments,
)
from molora_fed.evaluation.summed import hide_reason
from molora_fed.fusion.plan import FusionPlan
from molora_fed.types import BASE_EXPERT

if TYPE_CHECKING:
    from molora_fed.bank import Bank, HeldOutBank
    from molora_fed.fusion.sum_questions import TextCounts
    from molora_fed.routing.contract import OutputRouter

__all__ = [
    "CHOICE_BLOCKS",
    "COST_BLOCKS",
    "choose_blocks",
    "choose_experts",
    "describe_shortlist",
    "measure_cost",
]

CHOICE_BLOCKS: Final = 8
"""Calibration blocks of a member on which all experts are run to choose some."""
COST_BLOCKS: Final = 16
"""Held-out blocks of a member on which all are run to see what the choice costs."""


def choose_blocks(blocks: Blocks, count: int) -> Blocks:
    """Some blocks, always the same ones, of as many document clusters as can be.

    Args:
        blocks: A member's.
        count: How many are wanted; all if there are no more.
    """
    seen: set[int] = set()
    fresh: list[int] = []
    others: list[int] = []
    for index, clusters in enumerate(blocks.clusters[:, 1:]):
        new = set(clusters.tolist()) - seen
        (fresh if new else others).append(index)
        seen |= new
    chosen = _spread(fresh, count)
    return blocks.select(np.sort([*chosen, *_spread(others, count - len(chosen))]).astype(np.int64))


def _spread(indices: Sequence[int], count: int) -> list[int]:
    """As many of them at equal distances."""
    if count >= len(indices):
        return list(indices)
    return [indices[place * len(indices) // count] for place in range(count)]


def choose_experts(bank: "Bank", size: int, own: str) -> frozenset[str]:
    """Names of the experts with the lowest loss; the base, where it is one, and one's own first.

    Args:
        bank: Of some of a member's blocks, all experts measured.
        size: How many, 2 or more.
        own: Whose text it is.
    """
    always = [name for name in (BASE_EXPERT, own) if name in bank.expert_names]
    losses: NDArray[np.float64] = -bank.logprob[:, 1:].double().mean(dim=(0, 1)).numpy()
    ranked = [bank.expert_names[index] for index in np.argsort(losses, kind="stable")]
    others = [name for name in ranked if name not in always]
    return frozenset([*always, *others][:size])


def measure_cost(
    whole: "HeldOutBank", short: "HeldOutBank", routers: Mapping[str, "OutputRouter"], *, who: str
) -> Moments:
    """A member's side: how much more each fused model costs with the base's stand-ins.

    Args:
        whole: Of some of its held-out blocks, all experts measured.
        short: Of the same blocks, with stand-ins.
        routers: Fitted routers by name.
        who: The member, for errors.

    Returns:
        Sums over document clusters of the loss on `short` less that on `whole`, a column of each
        router.

    Raises:
        RoutingError: If a router fails; the reason stays here.
        SumError: If there are too few document clusters.
    """
    index = ClusterIndex.build(whole.clusters, whole.domain_of)
    check_clusters(len(index.counts), who=who)
    columns = {}
    for name, router in routers.items():
        try:
            more, less = (compute_router_losses(bank, router).nll for bank in (short, whole))
        except (PluginError, RoutingError) as error:
            raise hide_reason(name, who) from error
        columns[name] = index.sum((more.double() - less.double()).numpy())
    return measure_moments(index.counts, columns)


def describe_shortlist(
    plan: FusionPlan,
    costs: Sequence[tuple[str, Moments]],
    counts: Mapping[str, "TextCounts"],
    members: Sequence[str],
) -> dict[str, Any]:
    """The report's `shortlist`.

    Args:
        plan: The fusion's; it has a shortlist.
        costs: Domain and sums of `measure_cost` of members, one router or more.
        counts: What each member has, by name.
        members: Whose costs these are.
    """
    assert plan.shortlist is not None
    # A base that is no expert is run beside them.
    beside = int(all(expert.name != BASE_EXPERT for expert in plan.experts))
    size, every = plan.shortlist + beside, len(plan.experts) + beside
    width = plan.charter.identity.corpus.block_size - 1
    short = whole = 0
    for one in (counts[name] for name in members):
        calibration, kept = one.tokens // width, one.blocks - one.left_out
        for blocks, some in (
            (calibration, min(CHOICE_BLOCKS, calibration)),
            (one.blocks, min(COST_BLOCKS, kept)),
        ):
            whole += every * blocks
            short += every * blocks if some == blocks else size * blocks + every * some
        # Whoever measures others' adapters runs them on all of its calibration text.
        short += len(one.claims) * calibration
    by_domain = add_by_domain(costs)
    routers = next(iter(by_domain.values())).columns
    return {
        "experts": plan.shortlist,
        "of": len(plan.experts),
        "choice_blocks": CHOICE_BLOCKS,
        "cost_blocks": COST_BLOCKS,
        "block_passes": {"shortlist": short, "all": whole},
        "cost_nats": {
            name: estimate(list(by_domain.values()), [name] * len(by_domain)) for name in routers
        },
    }
