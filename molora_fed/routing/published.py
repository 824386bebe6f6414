"""Routers made from what contributors published of their hidden states; no text, and nobody asked.

A router takes part through `OutputRouter.from_statistics`; one that learns nothing needs none.
"""

from collections.abc import Mapping

import torch

from molora_fed.bank.adapters import make_up_adapters
from molora_fed.errors import RoutingError
from molora_fed.models.hidden_statistics import HiddenStatistics
from molora_fed.routing.contract import OutputRouter, RouterOptions
from molora_fed.routing.summed import FitSetting, find_owner, learns_nothing
from molora_fed.types import BASE_EXPERT

__all__ = ["check_published", "make_published", "make_up_setting"]


def make_published(
    router: type[OutputRouter], statistics: Mapping[str, HiddenStatistics], setting: FitSetting
) -> OutputRouter:
    """The router that follows from published statistics; the same ones give the same router.

    Args:
        router: Its class.
        statistics: By contributor, which is the name of its expert, too.
        setting: What the fusion is of.

    Raises:
        RoutingError: If it cannot be made from statistics, or the options are another router's.
    """
    options = router.narrow(setting.options)
    if learns_nothing(router, setting.num_experts, options):
        return router(setting.num_experts, options)
    # A class that learns in a way of its own cannot be made as the class it is derived from.
    is_own = issubclass(find_owner(router, "from_statistics"), find_owner(router, "learn"))
    made = router.from_statistics(statistics, setting) if is_own else None
    if made is None:
        raise RoutingError(
            f"Cannot make router '{router.name or router.__name__}' from published statistics: "
            "expected a router with `from_statistics` for its options, got one that has to be "
            "fitted on text. Choose another router, or another mode of privacy."
        )
    return made


def check_published(router: type[OutputRouter], options: RouterOptions) -> None:
    """Refuse a router that cannot be made from statistics, before there are any.

    It is made from statistics of two made-up texts, and made-up adapters.

    Raises:
        RoutingError: If it cannot.
    """
    setting = make_up_setting(options)
    width = setting.hidden_size
    statistics = {
        name: HiddenStatistics(name, 64, torch.full((width,), 1.0 - 2 * place), torch.eye(width))
        for place, name in enumerate(setting.domains)
    }
    make_published(router, statistics, setting)


def make_up_setting(options: RouterOptions) -> FitSetting:
    """What a fusion of two made-up contributions would agree on, to try a router's hooks on.

    Args:
        options: The router's.
    """
    names, width = ("first", "second"), 2
    experts = (BASE_EXPERT, *names)
    adapters = make_up_adapters(experts, width)
    return FitSetting(experts, names, width, 128, "probability", options, 0, adapters)
