"""Routers that weigh experts by how well they predicted the document so far."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Self

import torch
from pydantic import Field, field_validator
from torch import Tensor

from molora_fed.bank.views import RouterView
from molora_fed.errors import RoutingError, ShapeError
from molora_fed.routing.causal import causal_sum
from molora_fed.routing.contract import OutputRouter, RouterOptions, RouterState
from molora_fed.routing.fitting import check_calibration, compute_score_loss, fit_on_whole
from molora_fed.types import Progress, Reading

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


class _EvidenceGates(OutputRouter):
    """Gates softmax(prior + sum_k weight_k * sum_{s<=t} decay_k^(t-s) evidence_s).

    Attributes:
        decays: decay_k, K of them.
        weights: weight_k, (K,).
        prior: Log-prior of each expert, (E,).
    """

    def __init__(
        self,
        num_experts: int,
        options: RouterOptions,
        decays: tuple[float, ...],
        weights: Tensor,
        prior: Tensor,
    ) -> None:
        super().__init__(num_experts, options)
        self.decays = decays
        self.weights = weights
        self.prior = prior

    @classmethod
    def reads(cls, options: RouterOptions) -> frozenset[Reading]:
        """Evidence alone."""
        return frozenset({"evidence"})

    def _sums(self, view: RouterView, carry: Tensor | None = None) -> Tensor:
        """Discounted evidence at every decay, (B, T, E, K); `carry` is (B, E, K)."""
        return accumulate_evidence(view, self.decays, carry)

    def _score(self, sums: Tensor) -> Tensor:
        return sums @ self.weights.to(sums.device) + self.prior.to(sums.device)

    def scores(self, view: RouterView) -> Tensor:
        """Log-posterior of each expert up to a constant, (B, T, E)."""
        check_evidence(view, self.num_experts)
        return self._score(self._sums(view))

    def init_state(self, batch_size: int) -> RouterState:
        """Discounted evidence of the document so far, (B, E, K)."""
        shape = (batch_size, self.num_experts, len(self.decays))
        return {"sums": torch.zeros(shape, device=self.weights.device)}

    def step(self, view: RouterView, state: RouterState) -> tuple[Tensor, RouterState]:
        """Gates of the next positions, (B, t, E), and the state after them."""
        check_evidence(view, self.num_experts)
        sums = self._sums(view, state["sums"].to(view.document_starts.device))
        return torch.softmax(self._score(sums), dim=-1), {"sums": sums[:, -1]}


class ZeroTrainingEvidenceRouter(_EvidenceGates):
    """The Bayesian mixture of experts: nothing is fitted, no calibration block is read.

    Source: own derivation, see docs/routers.md.
    """

    Options: ClassVar[type[RouterOptions]] = ZeroOptions

    @classmethod
    def fit(
        cls,
        bank: "CalibrationBank",
        options: RouterOptions,
        seed: int,
        progress: Progress | None = None,
    ) -> Self:
        """The router for the bank's experts; reads nothing else of it."""
        check_calibration(bank)
        return cls.of(bank.num_experts, options)

    @classmethod
    def of(cls, num_experts: int, options: RouterOptions | None = None) -> Self:
        """The router for any number of experts, without a bank."""
        ones, zeros = torch.ones(1), torch.zeros(num_experts)
        return cls(num_experts, options or ZeroOptions(), (1.0,), ones, zeros)

    def state_tensors(self) -> dict[str, Tensor]:
        """Nothing was learned."""
        return {}

    @classmethod
    def from_state(
        cls, num_experts: int, options: RouterOptions, tensors: Mapping[str, Tensor]
    ) -> Self:
        """The router for this number of experts.

        Raises:
            ShapeError: If there are tensors: they belong to another router.
        """
        if tensors:
            raise ShapeError(
                f"Cannot load router 'evidence-zero': expected no tensors, "
                f"got {', '.join(sorted(tensors))}. Fuse again."
            )
        return cls.of(num_experts, options)


class EvidenceRouter(_EvidenceGates):
    """Evidence at several decays, a weight each, fitted on calibration from the zero form.

    On the calibration bank it is never worse than the zero-training form, where it starts.

    Source: own derivation, see docs/routers.md.
    """

    Options: ClassVar[type[RouterOptions]] = EvidenceOptions

    @classmethod
    def fit(
        cls,
        bank: "CalibrationBank",
        options: RouterOptions,
        seed: int,
        progress: Progress | None = None,
    ) -> Self:
        """Fit the weights (and the prior, if asked for) on the whole bank; `seed` has no effect."""
        check_calibration(bank)
        chosen = _narrow(options)
        weights = torch.zeros(len(chosen.decays), device=bank.device)
        weights[0] = 1.0
        prior = torch.zeros(bank.num_experts, device=bank.device)
        router = cls(bank.num_experts, chosen, chosen.decays, weights, prior)
        sums = bank.derive(f"evidence:{chosen.decays}", router._sums)
        parameters = [router.weights, router.prior] if chosen.prior else [router.weights]
        start = [parameter.clone() for parameter in parameters]
        fit_on_whole(
            # Evidence weighs distributions, and so it is fitted, a vocabulary's width cheaper.
            bank.under_probability_mixture(),
            sums,
            parameters,
            router._score,
            iterations=chosen.iterations,
            progress=progress,
        )
        if bank.mixture != "probability":
            _keep_better(bank, sums, router, parameters, start)
        return router

    def state_tensors(self) -> dict[str, Tensor]:
        """Weights of the decays, (K,), and the prior, (E,)."""
        return {"weights": self.weights.detach(), "prior": self.prior.detach()}

    @classmethod
    def from_state(
        cls, num_experts: int, options: RouterOptions, tensors: Mapping[str, Tensor]
    ) -> Self:
        """The router with these weights and prior.

        Raises:
            ShapeError: If one is missing or has another shape.
        """
        chosen = _narrow(options)
        expected = {"weights": (len(chosen.decays),), "prior": (num_experts,)}
        got = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if got != expected:
            raise ShapeError(
                f"Cannot load router 'evidence': expected {expected}, got {got}. Fuse again."
            )
        return cls(num_experts, chosen, chosen.decays, tensors["weights"], tensors["prior"])


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
    fitted_loss = compute_score_loss(bank, sums, router._score)
    _assign(parameters, start)
    if fitted_loss < compute_score_loss(bank, sums, router._score):
        _assign(parameters, fitted)


def _assign(parameters: list[Tensor], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _narrow(options: RouterOptions) -> EvidenceOptions:
    if not isinstance(options, EvidenceOptions):
        raise RoutingError(
            f"Cannot use router 'evidence': expected EvidenceOptions, got "
            f"{type(options).__name__}. Build the options with its Options class."
        )
    return options
