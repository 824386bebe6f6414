"""Questions of a fusion whose routers are made from published statistics: what measures, alone."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import ClassVar

from typing_extensions import override

from molora_fed.errors import PluginError, RoutingError
from molora_fed.fusion.plan import FusionPlan
from molora_fed.fusion.sum_questions import HELD_OUT, LOSSES, SumQuestion, TextCounts
from molora_fed.fusion.sum_rounds import SumRounds
from molora_fed.guard import guarded
from molora_fed.models.hidden_statistics import HiddenStatistics
from molora_fed.routing.contract import OutputRouter
from molora_fed.routing.published import check_published, make_published
from molora_fed.routing.summed import SummedFit

__all__ = ["PublishedRounds", "plan_rounds"]


def plan_rounds(
    plan: FusionPlan, hidden_size: int, counts: Mapping[str, TextCounts], *, seed: int
) -> SumRounds:
    """The questions that a charter has asked, as both ends derive them; see `SumRounds`."""
    kind = PublishedRounds if plan.charter.publishes_statistics else SumRounds
    return kind(plan, hidden_size, counts, seed=seed)


class PublishedRounds(SumRounds):
    """Everybody's losses on calibration text, then held-out text: there is no fit and no guard."""

    first: ClassVar[str] = LOSSES
    probed: ClassVar[str] = HELD_OUT

    @override
    def limit_fits(self) -> tuple[dict[str, int], tuple[str, ...]]:
        return {}, tuple(name for name in self._plan.routers if self._can_be_made(name))

    def _can_be_made(self, name: str) -> bool:
        router, options = self._plan.routers[name]
        with suppress(PluginError, RoutingError):
            with guarded(self._plan.router_entry(name), "from_statistics"):
                check_published(router, options)
            return True
        return False

    @override
    def list_tasks(self, question: SumQuestion) -> Iterator[tuple[str, SummedFit]]:
        return iter(())

    def make_router(self, name: str, statistics: Mapping[str, HiddenStatistics]) -> OutputRouter:
        """A router from the statistics of all contributors.

        Raises:
            PluginError: If its plugin fails.
            RoutingError: If it cannot be made from statistics.
        """
        router, options = self._plan.routers[name]
        with guarded(self._plan.router_entry(name), "from_statistics"):
            return make_published(router, statistics, self._set(options, 0))
