"""A router in closed form from class means and shared covariances of a hidden state."""

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import TypeVar, override

from molora_fed.bank.views import RouterView
from molora_fed.models.hidden_statistics import HiddenStatistics
from molora_fed.models.runtime import limit_threads
from molora_fed.routing.causal import causal_mean, count_since_start
from molora_fed.routing.contract import OutputRouter, RouterOptions, RouterState
from molora_fed.routing.summed import FitSetting
from molora_fed.types import Progress, Reading
from molora_kalavai.discriminant import (
    Discriminant,
    assume_constants,
    diagonalise,
    fit_discriminant,
)
from molora_kalavai.evidence_fit import EvidenceHiddenOptions
from molora_kalavai.hidden import pool_causally, read_hidden
from molora_kalavai.mixtures import assume_mixtures, mix_log
from molora_kalavai.moments import ClassMoments
from molora_kalavai.statistics_sums import StatisticsSums

if TYPE_CHECKING:
    from molora_fed.bank import CalibrationBank

__all__ = ["DiscriminantRouter", "StatisticsOptions", "StatisticsRouter"]


class StatisticsOptions(RouterOptions):
    """Options of the statistics router.

    Attributes:
        input: Hidden state whose statistics are taken.
        folds: Parts of the cross-validation that chooses shrinkage and temperature.
    """

    input: Literal["base_hidden", "prefix_hidden", "mean_hidden"] = "base_hidden"
    folds: int = Field(default=5, ge=2)


HiddenT = TypeVar("HiddenT", bound=StatisticsOptions | EvidenceHiddenOptions, default=Any)


class DiscriminantRouter(OutputRouter[HiddenT]):
    """What the routers by a discriminant share: its tensors, and the running mean it reads.

    Attributes:
        mixtures: Weight of each expert in each domain, (C, E).
    """

    mixtures: Tensor

    @classmethod
    @override
    def reads(cls, options: RouterOptions) -> frozenset[Reading]:
        return frozenset({cls.narrow(options).input, *cls.readings})

    @classmethod
    @override
    def shapes(cls, num_experts: int, options: HiddenT) -> dict[str, tuple[int | str, ...]]:
        return {
            "centre": ("D",),
            "basis": ("D", "D"),
            "means": ("C", "D"),
            "spread": ("D",),
            "correlation": (1,),
            "temperature": (1,),
            "mixtures": ("C", num_experts),
        }

    def discriminant(self, device: torch.device) -> Discriminant:
        """P(domain | running mean), on a device."""
        return Discriminant(
            **{field.name: getattr(self, field.name).to(device) for field in fields(Discriminant)}
        )

    def read(self, view: RouterView) -> Tensor:
        """The hidden state of the options, (B, T, D).

        Raises:
            RoutingError: If the view has none.
            ShapeError: If it has another width.
        """
        return read_hidden(view, self.options.input, self.name, len(self.centre))

    def mix_by_domain(self, mean: Tensor, count: Tensor) -> Tensor:
        """Log sum_d P(d | mean) w_d, (..., E), of running means (..., D) over `count` tokens."""
        log_posterior = self.discriminant(mean.device).log_posterior(mean, count)
        return mix_log(log_posterior, self.mixtures.to(mean.device))

    @override
    def init_state(self, batch_size: int) -> RouterState:
        """Sum of the document's states, (B, D), and their number, (B,)."""
        return {
            "sum": self.centre.new_zeros(batch_size, len(self.centre)),
            "count": self.centre.new_zeros(batch_size),
        }


class StatisticsRouter(DiscriminantRouter[StatisticsOptions]):
    """Gates sum_d P(d | m_t) w_d: each domain's best constant gates, by the domain's probability.

    P is a linear discriminant on m_t, the mean of the document's hidden states up to t.

    Source: Fisher's discriminant with two levels of covariance; own derivation, see
    docs/routers.md.
    """

    name: ClassVar[str] = "statistics"

    @classmethod
    @override
    def learn(
        cls,
        bank: "CalibrationBank",
        options: StatisticsOptions,
        seed: int,
        progress: Progress | None,
    ) -> Self:
        """Fit on the whole bank in two passes; `seed` has no effect."""
        with torch.no_grad():
            found = fit_discriminant(bank, options.input, options.folds, cls.name)
        tensors = {**found.discriminant.tensors(), "mixtures": found.mixtures}
        on_device = {name: tensor.to(bank.device) for name, tensor in tensors.items()}
        return cls(bank.num_experts, options, on_device)

    @classmethod
    @override
    def by_sums(cls, setting: FitSetting) -> StatisticsSums:
        options = cls.narrow(setting.options)
        return StatisticsSums(setting, options, options.input, options.folds, cls.name)

    @classmethod
    @override
    def from_statistics(
        cls, statistics: Mapping[str, HiddenStatistics], setting: FitSetting
    ) -> Self | None:
        """The same discriminant; what only losses could tell of gates and constants is assumed."""
        options = cls.narrow(setting.options)
        if options.input != "base_hidden":
            return None
        with limit_threads(1):
            moments = ClassMoments.of_statistics(statistics.values(), setting.domains)
            found = assume_constants(diagonalise(moments))
        owners = [statistics[n].domain if n in statistics else "" for n in setting.expert_names]
        mixtures = assume_mixtures(owners, setting.domains)
        return cls(setting.num_experts, options, {**found.tensors(), "mixtures": mixtures})

    @override
    def scores(self, view: RouterView) -> Tensor:
        """Logarithm of the gates, (B, T, E)."""
        mean = causal_mean(self.read(view), view.document_starts)
        return self.mix_by_domain(mean, count_since_start(view.document_starts))

    @override
    def step(self, view: RouterView, state: RouterState) -> tuple[Tensor, RouterState]:
        hidden = self.read(view)
        count = count_since_start(view.document_starts, carry=state["count"].to(hidden.device))
        mean, after = pool_causally(hidden, view, state)
        return torch.softmax(self.mix_by_domain(mean, count), dim=-1), after
