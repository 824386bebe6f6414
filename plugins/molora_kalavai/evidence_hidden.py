"""Evidence together with a discriminant on hidden states, which is kept only if it helps."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from molora_fed.bank.views import RouterView
from molora_fed.errors import RoutingError, ShapeError
from molora_fed.routing.causal import causal_mean, count_since_start
from molora_fed.routing.contract import OutputRouter, RouterOptions, RouterState
from molora_fed.routing.fitting import check_calibration
from molora_fed.types import Progress, Reading
from molora_kalavai.discriminant import Discriminant, fit_discriminant
from molora_kalavai.evidence import accumulate_evidence, check_evidence
from molora_kalavai.evidence_fit import EvidenceFit, EvidenceHiddenOptions
from molora_kalavai.hidden import pool_causally, read_hidden
from molora_kalavai.mixtures import mix_log

if TYPE_CHECKING:
    from molora_fed.bank import CalibrationBank

__all__ = ["EvidenceHiddenOptions", "EvidenceHiddenRouter"]

_LABEL = "evidence-hidden"


class EvidenceHiddenRouter(OutputRouter):
    """Gates softmax(prior + sum_k weight_k * evidence sums + weight * statistics' log-gates).

    The second term is the router `statistics`, in closed form; of hidden states one number is
    fitted, its weight. It is fitted on out-of-fold log-gates, and stays 0 unless it lowers the
    loss of calibration text that was left out.

    Source: own derivation, see docs/routers.md.

    Attributes:
        weights: Of the evidence sums, then of the statistics' log-gates, (K + 1,).
        prior: Log-prior of each expert, (E,).
        discriminant: P(domain | running mean).
        mixtures: Weight of each expert in each domain, (C, E).
    """

    Options: ClassVar[type[RouterOptions]] = EvidenceHiddenOptions

    def __init__(
        self,
        num_experts: int,
        options: EvidenceHiddenOptions,
        weights: Tensor,
        prior: Tensor,
        discriminant: Discriminant,
        mixtures: Tensor,
    ) -> None:
        super().__init__(num_experts, options)
        self.decays = options.decays
        self.input: Reading = options.input
        self.weights = weights
        self.prior = prior
        self.discriminant = discriminant
        self.mixtures = mixtures

    @classmethod
    def reads(cls, options: RouterOptions) -> frozenset[Reading]:
        """Evidence and one hidden state."""
        return frozenset({"evidence", _narrow(options).input})

    @property
    def uses_hidden(self) -> bool:
        """Whether hidden states were found to help."""
        return bool(self.weights[-1] != 0)

    @classmethod
    def fit(
        cls,
        bank: "CalibrationBank",
        options: RouterOptions,
        seed: int,
        progress: Progress | None = None,
    ) -> Self:
        """Fit the discriminant, decide whether it is used, fit the weights; no use of `seed`."""
        check_calibration(bank)
        chosen = _narrow(options)
        with torch.no_grad():
            found = fit_discriminant(bank, chosen.input, chosen.folds, _LABEL)
            posterior = found.out_of_fold(bank, chosen.input, _LABEL)
            hidden = _centre(mix_log(posterior, found.mixtures))
            sums = bank.derive(
                f"evidence:{chosen.decays}", lambda view: accumulate_evidence(view, chosen.decays)
            )
            features = torch.cat([sums, hidden.unsqueeze(-1)], dim=-1)
        fitting = EvidenceFit(bank, features, chosen)
        is_kept = fitting.is_hidden_better()
        weights, prior = fitting.fit(is_kept, None, progress)
        if bank.mixture != "probability":
            weights, prior = fitting.keep_better((weights, prior), fitting.start())
        discriminant = found.discriminant.to(bank.device)
        mixtures = found.mixtures.to(bank.device)
        return cls(bank.num_experts, chosen, weights, prior, discriminant, mixtures)

    def _score(self, sums: Tensor, mean: Tensor, count: Tensor) -> Tensor:
        device = sums.device
        by_evidence = sums @ self.weights[:-1].to(device) + self.prior.to(device)
        if not self.uses_hidden:
            return by_evidence
        posterior = self.discriminant.to(device).log_posterior(mean, count)
        hidden = _centre(mix_log(posterior, self.mixtures.to(device)))
        return by_evidence + self.weights[-1].to(device) * hidden

    def scores(self, view: RouterView) -> Tensor:
        """Logits of the gates, (B, T, E)."""
        check_evidence(view, self.num_experts)
        mean = causal_mean(self._read(view), view.document_starts)
        sums = accumulate_evidence(view, self.decays)
        return self._score(sums, mean, count_since_start(view.document_starts))

    def init_state(self, batch_size: int) -> RouterState:
        """Evidence sums (B, E, K); sum (B, D) and number (B,) of the document's states."""
        centre = self.discriminant.centre
        return {
            "sums": centre.new_zeros(batch_size, self.num_experts, len(self.decays)),
            "sum": centre.new_zeros(batch_size, len(centre)),
            "count": centre.new_zeros(batch_size),
        }

    def step(self, view: RouterView, state: RouterState) -> tuple[Tensor, RouterState]:
        """Gates of the next positions, (B, t, E), and the state after them."""
        check_evidence(view, self.num_experts)
        hidden = self._read(view)
        count = count_since_start(view.document_starts, carry=state["count"].to(hidden.device))
        mean, after = pool_causally(hidden, view, state)
        sums = accumulate_evidence(view, self.decays, state["sums"].to(hidden.device))
        gates = torch.softmax(self._score(sums, mean, count), dim=-1)
        return gates, {**after, "sums": sums[:, -1]}

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
        """Weights (K + 1,), prior (E,), the discriminant's tensors, the domains' gates (C, E)."""
        return {
            **self.discriminant.tensors(),
            "weights": self.weights,
            "prior": self.prior,
            "mixtures": self.mixtures,
        }

    @classmethod
    def from_state(
        cls, num_experts: int, options: RouterOptions, tensors: Mapping[str, Tensor]
    ) -> Self:
        """The router with these numbers.

        Raises:
            ShapeError: If a tensor is missing or has another shape.
        """
        chosen = _narrow(options)
        mixtures = tensors.get("mixtures")
        domains = 0 if mixtures is None else len(mixtures)
        expected = {
            "weights": (len(chosen.decays) + 1,),
            "prior": (num_experts,),
            "mixtures": (domains, num_experts),
        }
        got = {name: tuple(tensors[name].shape) for name in expected if name in tensors}
        if got != expected:
            raise ShapeError(
                f"Cannot load router '{_LABEL}': expected {expected}, got {got}. Fuse again."
            )
        discriminant = Discriminant.load(tensors, domains, _LABEL)
        return cls(num_experts, chosen, discriminant=discriminant, **_pick(tensors, expected))


def _centre(scores: Tensor) -> Tensor:
    """Less their mean over experts: softmax does not see it."""
    return scores - scores.mean(dim=-1, keepdim=True)


def _pick(tensors: Mapping[str, Tensor], names: Mapping[str, object]) -> dict[str, Tensor]:
    return {name: tensors[name] for name in names}


def _narrow(options: RouterOptions) -> EvidenceHiddenOptions:
    if not isinstance(options, EvidenceHiddenOptions):
        raise RoutingError(
            f"Cannot use router '{_LABEL}': expected EvidenceHiddenOptions, got "
            f"{type(options).__name__}. Build the options with its Options class."
        )
    return options
