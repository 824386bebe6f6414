"""Top-k gates: a wrapper around any router that keeps the k largest gates of every position.

All experts still run; what is limited is whose predictions are mixed.
"""

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor
from typing_extensions import override

from molora_fed.bank.views import RouterView
from molora_fed.errors import RoutingError
from molora_fed.models.hidden_statistics import HiddenStatistics
from molora_fed.routing.contract import OutputRouter, RouterOptions, RouterState
from molora_fed.routing.published import make_published
from molora_fed.routing.summed import FitSetting, SummedFit, plan_summed_fit
from molora_fed.types import Progress, Reading

if TYPE_CHECKING:
    from molora_fed.bank import CalibrationBank

__all__ = ["TopKRouter", "keep_top_k", "limit_experts"]


def keep_top_k(gates: Tensor, top_k: int) -> Tensor:
    """Keep the largest gates and renormalise them; the others become 0.

    Args:
        gates: (..., E), non-negative, summing to 1 over E.
        top_k: Gates to keep, >= 1; E or more keeps all. Of equal gates the first experts' stay.

    Returns:
        Gates of the same shape with at most `top_k` above 0, summing to 1 over E.
    """
    if top_k >= gates.shape[-1]:
        return gates
    # A stable sort, because ties are common: before anything is read, all gates may be equal.
    kept = gates.argsort(dim=-1, descending=True, stable=True)[..., :top_k]
    limited = torch.zeros_like(gates).scatter(-1, kept, gates.gather(-1, kept))
    return limited / limited.sum(dim=-1, keepdim=True)


class TopKRouter(OutputRouter):
    """A router that mixes the best k experts of another; its classes come from `limit_experts`.

    It is fitted as the other router is, on all gates, and saved as the other router's state.

    Attributes:
        inner_class: The other router's class.
        top_k: k.
        inner: The fitted other router.
    """

    inner_class: ClassVar[type[OutputRouter]]
    top_k: ClassVar[int]

    @override
    def __init__(
        self,
        num_experts: int,
        options: RouterOptions | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(num_experts, options)
        self.inner = self.inner_class(num_experts, options, tensors)

    @classmethod
    @override
    def reads(cls, options: RouterOptions) -> frozenset[Reading]:
        return cls.inner_class.reads(options)

    @classmethod
    @override
    def learn(
        cls,
        bank: "CalibrationBank",
        options: RouterOptions,
        seed: int,
        progress: Progress | None,
    ) -> Self:
        inner = cls.inner_class.fit(bank, options, seed, progress)
        return cls(inner.num_experts, inner.options, inner.state_tensors())

    @classmethod
    @override
    def by_sums(cls, setting: FitSetting) -> SummedFit:
        return plan_summed_fit(cls.inner_class, setting)

    @classmethod
    @override
    def from_statistics(
        cls, statistics: Mapping[str, HiddenStatistics], setting: FitSetting
    ) -> Self:
        inner = make_published(cls.inner_class, statistics, setting)
        return cls(inner.num_experts, inner.options, inner.state_tensors())

    @override
    def scores(self, view: RouterView) -> Tensor:
        return self.inner.scores(view)

    @override
    def gates(self, view: RouterView) -> Tensor:
        """The other router's k largest gates, renormalised, (B, T, E)."""
        return keep_top_k(self.inner.gates(view), self.top_k)

    @override
    def init_state(self, batch_size: int) -> RouterState:
        return self.inner.init_state(batch_size)

    @override
    def step(self, view: RouterView, state: RouterState) -> tuple[Tensor, RouterState]:
        gates, state = self.inner.step(view, state)
        return keep_top_k(gates, self.top_k), state

    @override
    def reorder(self, state: RouterState, index: Tensor) -> RouterState:
        return self.inner.reorder(state, index)

    @override
    def state_tensors(self) -> dict[str, Tensor]:
        return self.inner.state_tensors()


@cache
def limit_experts(router: type[OutputRouter], limit: int) -> type[TopKRouter]:
    """A class like `router` whose gates keep only the `limit` largest of every position.

    Args:
        router: Any router class, causal or not.
        limit: Experts mixed at most, >= 1; more than there are changes nothing.

    Raises:
        RoutingError: If `limit` is below 1.
    """
    if limit < 1:
        raise RoutingError(
            f"Cannot limit router '{router.__name__}': expected at least 1 expert, got {limit}. "
            "Raise top_k."
        )

    class Limited(TopKRouter):
        Options: ClassVar[type[RouterOptions]] = router.Options
        name: ClassVar[str] = router.name
        causal: ClassVar[bool] = router.causal
        inner_class: ClassVar[type[OutputRouter]] = router
        top_k: ClassVar[int] = limit

    Limited.__name__ = Limited.__qualname__ = f"{router.__name__}Top{limit}"
    Limited.__doc__ = f"{router.__name__}, its {limit} largest gates renormalised."
    return Limited
