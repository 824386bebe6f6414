"""Routers of a fusion made from what contributors published with their adapters."""

from collections.abc import Callable
from typing import Any

from molora_fed.errors import CorpusError, RoutingError
from molora_fed.fusion.boundary import NotMeasured
from molora_fed.fusion.collapse import GuardedRouter
from molora_fed.fusion.plan import FusionPlan
from molora_fed.fusion.published_rounds import PublishedRounds
from molora_fed.fusion.sum_questions import SumQuestion
from molora_fed.models.hidden_statistics import (
    HiddenStatistics,
    compute_statistics_bytes,
    load_statistics,
)
from molora_fed.privacy.sums.vectors import Total

__all__ = ["PublishedFits"]

_NOT_GUARDED = "made from published statistics, so not judged on calibration text"


class PublishedFits:
    """See `RouterFits`.

    Args:
        plan: The fusion's.
        rounds: Of this fusion.
        missing: Receives compared routers that cannot be made from statistics.

    Raises:
        CorpusError: If somebody's statistics cannot be read.
        RoutingError: If the published router cannot be made from them.
    """

    num_rounds = 1

    def __init__(self, plan: FusionPlan, rounds: PublishedRounds, missing: NotMeasured) -> None:
        statistics = _load_all(plan, rounds.hidden_size)
        self._rounds = rounds
        self._made: dict[str, GuardedRouter[Any]] = {}
        for name in plan.routers:
            with missing.skipping("router", name, unless=name == plan.router):
                router = rounds.make_router(name, statistics)
                if not all(bool(t.isfinite().all()) for t in router.state_tensors().values()):
                    raise RoutingError(
                        f"Cannot make router '{name}' from published statistics: expected finite "
                        "numbers, got NaN or infinity. Choose another router."
                    )
                self._made[name] = GuardedRouter(router, (), 0)
                missing.add("guard", name, _NOT_GUARDED)

    def begin(self) -> SumQuestion:
        """See `RouterFits`."""
        return SumQuestion(self._rounds.first, (), {})

    def finish(
        self, first: SumQuestion, total: Total, ask: Callable[[SumQuestion], Total]
    ) -> dict[str, GuardedRouter[Any]]:
        """See `RouterFits`; nothing is asked."""
        return self._made


def _load_all(plan: FusionPlan, width: int) -> dict[str, HiddenStatistics]:
    """Statistics of all contributors, in the order of their experts."""
    found = {}
    for one in plan.contributions:
        if one.statistics is None:
            raise CorpusError(
                f"Cannot fuse contribution of '{one.contributor}': expected statistics of hidden "
                "states beside its adapter, got none. Have it contributed again."
            )
        found[one.contributor] = load_statistics(
            one.statistics,
            one.domain,
            who=one.contributor,
            max_bytes=compute_statistics_bytes(width),
        )
    return found
