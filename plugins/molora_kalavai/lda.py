"""A router in closed form from class means and shared covariances of a hidden state."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from molora_fed.bank.views import RouterView
from molora_fed.errors import RoutingError, ShapeError
from molora_fed.routing.causal import causal_mean, count_since_start
from molora_fed.routing.contract import OutputRouter, RouterOptions, RouterState
from molora_fed.routing.fitting import check_calibration
from molora_fed.types import Progress, Reading
from molora_kalavai.discriminant import Discriminant, fit_discriminant
from molora_kalavai.hidden import pool_causally, read_hidden
from molora_kalavai.mixtures import mix_log

if TYPE_CHECKING:
    from molora_fed.bank import CalibrationBank

__all__ = ["StatisticsOptions", "StatisticsRouter"]

_LABEL = "statistics"


class StatisticsOptions(RouterOptions):
    """Options of the statistics router.

    Attributes:
        input: Hidden state whose statistics are taken.
        folds: Parts of the cross-validation that chooses shrinkage and temperature.
    """

    input: Literal["base_hidden", "prefix_hidden", "mean_hidden"] = "base_hidden"
    folds: int = Field(default=5, ge=2)


class StatisticsRouter(OutputRouter):
    """Gates sum_d P(d | m_t) w_d: each domain's best constant gates, by the domain's probability.

    P is a linear discriminant on m_t, the mean of the document's hidden states up to t.

    Source: Fisher's discriminant with two levels of covariance; own derivation, see
    docs/routers.md.
    """

    Options: ClassVar[type[RouterOptions]] = StatisticsOptions

    def __init__(
        self,
        num_experts: int,
        options: StatisticsOptions,
        discriminant: Discriminant,
        mixtures: Tensor,
    ) -> None:
        super().__init__(num_experts, options)
        self.input: Reading = options.input
        self.discriminant = discriminant
        self.mixtures = mixtures  # (C, E)

    @classmethod
    def reads(cls, options: RouterOptions) -> frozenset[Reading]:
        """The one hidden state of the options."""
        return frozenset({_narrow(options).input})

    @classmethod
    def fit(
        cls,
        bank: "CalibrationBank",
        options: RouterOptions,
        seed: int,
        progress: Progress | None = None,
    ) -> Self:
        """Fit on the whole bank in two passes; `seed` has no effect."""
        check_calibration(bank)
        chosen = _narrow(options)
        with torch.no_grad():
            found = fit_discriminant(bank, chosen.input, chosen.folds, _LABEL)
        discriminant = found.discriminant.to(bank.device)
        return cls(bank.num_experts, chosen, discriminant, found.mixtures.to(bank.device))

    def scores(self, view: RouterView) -> Tensor:
        """Logarithm of the gates, (B, T, E)."""
        mean = causal_mean(self._read(view), view.document_starts)
        return self._score(mean, count_since_start(view.document_starts))

    def init_state(self, batch_size: int) -> RouterState:
        """Sum of the document's states, (B, D), and their number, (B,)."""
        centre = self.discriminant.centre
        return {
            "sum": centre.new_zeros(batch_size, len(centre)),
            "count": centre.new_zeros(batch_size),
        }

    def step(self, view: RouterView, state: RouterState) -> tuple[Tensor, RouterState]:
        """Gates of the next positions, (B, t, E), and the state after them."""
        hidden = self._read(view)
        count = count_since_start(view.document_starts, carry=state["count"].to(hidden.device))
        mean, after = pool_causally(hidden, view, state)
        return torch.softmax(self._score(mean, count), dim=-1), after

    def _score(self, mean: Tensor, count: Tensor) -> Tensor:
        log_posterior = self.discriminant.to(mean.device).log_posterior(mean, count)
        return mix_log(log_posterior, self.mixtures.to(mean.device))

    def _read(self, view: RouterView) -> Tensor:
        hidden = read_hidden(view, self.input, _LABEL)
        if hidden.shape[-1] != len(self.discriminant.centre):
            raise ShapeError(
                f"Cannot route with '{_LABEL}': expected {self.input} of width "
                f"{len(self.discriminant.centre)}, got {hidden.shape[-1]}. "
                "Use the base it was fitted on."
            )
        return hidden

    def state_tensors(self) -> dict[str, Tensor]:
        """The discriminant's tensors and the domains' gates, (C, E)."""
        return {**self.discriminant.tensors(), "mixtures": self.mixtures}

    @classmethod
    def from_state(
        cls, num_experts: int, options: RouterOptions, tensors: Mapping[str, Tensor]
    ) -> Self:
        """The router with these statistics.

        Raises:
            ShapeError: If a tensor is missing or has another shape.
        """
        mixtures = tensors.get("mixtures")
        if mixtures is None or mixtures.ndim != 2 or mixtures.shape[1] != num_experts:
            got = "nothing" if mixtures is None else str(tuple(mixtures.shape))
            raise ShapeError(
                f"Cannot load router '{_LABEL}': expected mixtures (C, {num_experts}), got {got}. "
                "Fuse again."
            )
        discriminant = Discriminant.load(tensors, len(mixtures), _LABEL)
        return cls(num_experts, _narrow(options), discriminant, mixtures)


def _narrow(options: RouterOptions) -> StatisticsOptions:
    if not isinstance(options, StatisticsOptions):
        raise RoutingError(
            f"Cannot use router '{_LABEL}': expected StatisticsOptions, got "
            f"{type(options).__name__}. Build the options with its Options class."
        )
    return options
