"""Routers that weigh experts by how well they predicted the document so far."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Self

import torch
from pydantic import Field, field_validator
from torch import Tensor
from typing_extensions import override

from molora_fed.bank.views import RouterView
from molora_fed.errors import RoutingError, ShapeError
from molora_fed.routing.causal import causal_sum
from molora_fed.routing.contract import OptionsT, OutputRouter, RouterOptions, RouterState
from molora_fed.routing.fitting import compute_score_loss, fit_on_whole
from molora_fed.routing.summed import FitSetting
from molora_fed.types import Progress, Reading
from molora_kalavai.second_order import SecondOrderFit, spread_evenly

if TYPE_CHECKING:
    from molora_fed.bank import CalibrationBank

__all__ = [
    "EvidenceOptions",
    "EvidenceRouter",
    "ZeroOptions",
    "ZeroTrainingEvidenceRouter",
    "accumulate_evidence",
    "check_evidence",
    "read_relative_evidence",
]


_LARGEST_LEAD = 500.0  # nats of evidence; an expert further behind counts as this far

_STARTS = (
    (1.0, 0.0, 0.0),
    (4.0, 0.0, 0.0),
    (0.3, 0.0, 0.0),
    (0.1, 0.0, 0.0),
    (0.0, 40.0, 0.0),
    (0.0, 10.0, 0.0),
    (0.0, 1.0, 0.0),
    (0.0, 0.3, 0.0),
    (0.0, 0.0, 1.0),
    (0.0, 0.0, 0.5),
)
"""First points of a fit by sums: the first decay's weight, one shared by all, the last one's."""


class ZeroOptions(RouterOptions):
    """The zero-training evidence router has no options."""


class EvidenceOptions(RouterOptions):
    """Options of the fitted evidence router.

    Attributes:
        decays: Factors per token at which past evidence fades; the first is 1, which forgets
            nothing, so that the zero-training form is among the forms fitted.
        prior: Whether a constant per expert is fitted too, which decides where nothing has been
            read yet; False leaves all experts equal at a document's start.
        iterations: Largest number of L-BFGS iterations.
    """

    decays: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(
        default=(1.0, 0.95, 0.8), min_length=1
    )
    prior: bool = True
    iterations: int = Field(default=40, ge=1)

    @field_validator("decays")
    @classmethod
    def _start_with_one(cls, decays: tuple[float, ...]) -> tuple[float, ...]:
        if decays[0] != 1.0:
            raise ValueError("the first decay must be 1")
        return decays


class EvidenceGates(OutputRouter[OptionsT]):
    """Gates softmax(prior + sum_k weight_k * sum_{s<=t} decay_k^(t-s) evidence_s).

    Attributes:
        weights: weight_k, (K,).
        prior: Log-prior of each expert, (E,).
    """

    readings: ClassVar[frozenset[Reading]] = frozenset({"evidence"})
    weights: Tensor
    prior: Tensor

    @property
    def decays(self) -> tuple[float, ...]:
        """decay_k, K of them."""
        return (1.0,)

    def sums(self, view: RouterView, carry: Tensor | None = None) -> Tensor:
        """Discounted evidence at every decay, (B, T, E, K); `carry` is (B, E, K)."""
        return accumulate_evidence(view, self.decays, carry)

    def score(self, sums: Tensor) -> Tensor:
        """Scores (..., E) of sums (..., E, K), differentiable in weights and prior."""
        return sums @ self.weights.to(sums.device) + self.prior.to(sums.device)

    @override
    def scores(self, view: RouterView) -> Tensor:
        """Log-posterior of each expert up to a constant, (B, T, E)."""
        check_evidence(view, self.num_experts)
        return self.score(self.sums(view))

    @override
    def init_state(self, batch_size: int) -> RouterState:
        """Discounted evidence of the document so far, (B, E, K)."""
        shape = (batch_size, self.num_experts, len(self.decays))
        return {"sums": torch.zeros(shape, device=self.weights.device)}

    @override
    def step(self, view: RouterView, state: RouterState) -> tuple[Tensor, RouterState]:
        check_evidence(view, self.num_experts)
        sums = self.sums(view, state["sums"].to(view.document_starts.device))
        return torch.softmax(self.score(sums), dim=-1), {"sums": sums[:, -1]}


class ZeroTrainingEvidenceRouter(EvidenceGates[ZeroOptions]):
    """The Bayesian mixture of experts: nothing is fitted, no calibration block is read.

    Source: own derivation, see docs/routers.md.
    """

    name: ClassVar[str] = "evidence-zero"

    @override
    def __init__(
        self,
        num_experts: int,
        options: RouterOptions | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(num_experts, options, tensors)
        self.weights, self.prior = torch.ones(1), torch.zeros(num_experts)

    @classmethod
    @override
    def bound_excess(cls, num_experts: int) -> float:
        """That of Bayes' rule with a uniform prior: ln E."""
        return math.log(num_experts)


class EvidenceRouter(EvidenceGates[EvidenceOptions]):
    """Evidence at several decays, a weight each, fitted on calibration from the zero form.

    On the calibration bank it is never worse than the zero-training form, where it starts.

    Source: own derivation, see docs/routers.md.
    """

    name: ClassVar[str] = "evidence"

    @property
    @override
    def decays(self) -> tuple[float, ...]:
        return self.options.decays

    @classmethod
    @override
    def shapes(cls, num_experts: int, options: EvidenceOptions) -> dict[str, tuple[int | str, ...]]:
        return {"weights": (len(options.decays),), "prior": (num_experts,)}

    @classmethod
    @override
    def learn(
        cls,
        bank: "CalibrationBank",
        options: EvidenceOptions,
        seed: int,
        progress: Progress | None,
    ) -> Self:
        """Fit the weights (and the prior, if asked for) on the whole bank; `seed` has no effect."""
        weights = torch.zeros(len(options.decays), device=bank.device)
        weights[0] = 1.0
        prior = torch.zeros(bank.num_experts, device=bank.device)
        router = cls(bank.num_experts, options, {"weights": weights, "prior": prior})
        sums = bank.derive(f"evidence:{options.decays}", router.sums)
        parameters = [router.weights, router.prior] if options.prior else [router.weights]
        start = [parameter.clone() for parameter in parameters]
        fit_on_whole(
            # Evidence weighs distributions, and so it is fitted, a vocabulary's width cheaper.
            bank.under_probability_mixture(),
            sums,
            parameters,
            router.score,
            iterations=options.iterations,
            progress=progress,
        )
        if bank.mixture != "probability":
            _keep_better(bank, sums, router, parameters, start)
        return router

    @classmethod
    @override
    def by_sums(cls, setting: FitSetting) -> "EvidenceSums":
        return EvidenceSums(setting, cls.narrow(setting.options))


class EvidenceSums(SecondOrderFit[EvidenceOptions]):
    """Weights, then the prior, fitted by sums; never worse than the zero form."""

    slope_bound: ClassVar[float] = _LARGEST_LEAD

    @override
    def begin(self) -> Tensor:
        """The zero form, and evidence that counts for more, for less, or fades."""
        points = torch.zeros(
            len(_STARTS), self._num_weights + self.setting.num_experts, dtype=torch.float64
        )
        for point, (oldest, each, newest) in zip(points, _STARTS, strict=True):
            point[: self._num_weights] = each / self._num_weights
            point[0] += oldest
            point[self._num_weights - 1] += newest
        return points

    @override
    def directions(self) -> Tensor:
        weights = torch.eye(self._num_weights, dtype=torch.float64)
        size = self.setting.num_experts
        prior = spread_evenly(size)[:, : None if self.options.prior else 0]
        return torch.block_diag(weights, prior)

    @override
    def features(self, bank: "CalibrationBank") -> Tensor:
        decays = self.options.decays
        return bank.derive(f"evidence:{decays}", lambda view: accumulate_evidence(view, decays))

    @override
    def score(self, features: Tensor, theta: Tensor) -> Tensor:
        # Softmax does not see what all experts share: how far each is behind the best one is
        # bounded, and with it every sum.
        behind = features - features.amax(dim=-2, keepdim=True)
        weights, prior = theta[: self._num_weights], theta[self._num_weights :]
        return behind.clamp_min(-_LARGEST_LEAD) @ weights + prior

    @override
    def tensors(self, theta: Tensor) -> dict[str, Tensor]:
        weights, prior = theta.float().split([self._num_weights, self.setting.num_experts])
        return {"weights": weights.clone(), "prior": prior.clone()}

    @property
    def _num_weights(self) -> int:
        return len(self.options.decays)


def check_evidence(view: RouterView, num_experts: int) -> None:
    """Refuse a view whose evidence is of other experts.

    Raises:
        ShapeError: If it has none, or of another number of experts.
    """
    got = None if view.evidence is None else view.evidence.shape[-1]
    if got != num_experts:
        raise ShapeError(
            f"Cannot route by evidence: expected evidence of {num_experts} experts, "
            f"got {got or 'none'}. Use the experts it was fitted for."
        )


def read_relative_evidence(view: RouterView) -> Tensor:
    """Evidence less the experts' mean at each token, (B, T, E) float32.

    Softmax does not see what all experts share; leaving it out keeps sums small and exact.

    Raises:
        RoutingError: If the view has none.
    """
    if view.evidence is None:
        raise RoutingError(
            "Cannot route by evidence: expected a view with evidence, got none. "
            "Build the bank with this reading."
        )
    evidence = view.evidence.float()
    return evidence - evidence.mean(dim=-1, keepdim=True)


def accumulate_evidence(
    view: RouterView, decays: tuple[float, ...], carry: Tensor | None = None
) -> Tensor:
    """Discounted sums of relative evidence over the document so far.

    Args:
        view: B blocks with evidence.
        decays: K factors per token.
        carry: The sums before the first position, (B, E, K), when a text is continued.

    Returns:
        (B, T, E, K) float32.

    Raises:
        RoutingError: If the view has no evidence.
    """
    relative = read_relative_evidence(view)
    sums = [
        causal_sum(
            relative,
            view.document_starts,
            decay=decay,
            carry=None if carry is None else carry[..., index],
        )
        for index, decay in enumerate(decays)
    ]
    return torch.stack(sums, dim=-1)


def _keep_better(
    bank: "CalibrationBank",
    sums: Tensor,
    router: EvidenceRouter,
    parameters: list[Tensor],
    start: list[Tensor],
) -> None:
    """Go back to the start if the bank's own mixture is better there."""
    fitted = [parameter.clone() for parameter in parameters]
    fitted_loss = compute_score_loss(bank, sums, router.score)
    _assign(parameters, start)
    if fitted_loss < compute_score_loss(bank, sums, router.score):
        _assign(parameters, fitted)


def _assign(parameters: list[Tensor], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
