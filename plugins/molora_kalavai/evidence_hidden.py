"""Evidence together with a discriminant on hidden states, which is kept only if it helps."""

from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor
from typing_extensions import override

from molora_fed.bank.views import RouterView
from molora_fed.routing.causal import causal_mean, count_since_start
from molora_fed.routing.contract import RouterState
from molora_fed.types import Progress, Reading
from molora_kalavai.discriminant import fit_discriminant
from molora_kalavai.evidence import accumulate_evidence, check_evidence
from molora_kalavai.evidence_fit import EvidenceFit, EvidenceHiddenOptions
from molora_kalavai.hidden import pool_causally
from molora_kalavai.lda import DiscriminantRouter
from molora_kalavai.mixtures import mix_log

if TYPE_CHECKING:
    from molora_fed.bank import CalibrationBank

__all__ = ["EvidenceHiddenOptions", "EvidenceHiddenRouter"]


class EvidenceHiddenRouter(DiscriminantRouter[EvidenceHiddenOptions]):
    """Gates softmax(prior + sum_k weight_k * evidence sums + weight * statistics' log-gates).

    The second term is the router `statistics`, in closed form; of hidden states one number is
    fitted, its weight. It is fitted on out-of-fold log-gates, and stays 0 unless it lowers the
    loss of calibration text that was left out.

    Source: own derivation, see docs/routers.md.

    Attributes:
        weights: Of the evidence sums, then of the statistics' log-gates, (K + 1,).
        prior: Log-prior of each expert, (E,).
    """

    name: ClassVar[str] = "evidence-hidden"
    readings: ClassVar[frozenset[Reading]] = frozenset({"evidence"})
    weights: Tensor
    prior: Tensor

    @classmethod
    @override
    def shapes(
        cls, num_experts: int, options: EvidenceHiddenOptions
    ) -> dict[str, tuple[int | str, ...]]:
        return {
            **super().shapes(num_experts, options),
            "weights": (len(options.decays) + 1,),
            "prior": (num_experts,),
        }

    @property
    def uses_hidden(self) -> bool:
        """Whether hidden states were found to help."""
        return bool(self.weights[-1] != 0)

    @classmethod
    @override
    def learn(
        cls,
        bank: "CalibrationBank",
        options: EvidenceHiddenOptions,
        seed: int,
        progress: Progress | None,
    ) -> Self:
        """Fit the discriminant, decide whether it is used, fit the weights; no use of `seed`."""
        with torch.no_grad():
            found = fit_discriminant(bank, options.input, options.folds, cls.name)
            posterior = found.out_of_fold(bank, options.input, cls.name)
            hidden = _centre(mix_log(posterior, found.mixtures))
            sums = bank.derive(
                f"evidence:{options.decays}", lambda view: accumulate_evidence(view, options.decays)
            )
            features = torch.cat([sums, hidden.unsqueeze(-1)], dim=-1)
        fitting = EvidenceFit(bank, features, options)
        is_kept = fitting.is_hidden_better()
        weights, prior = fitting.fit(is_kept, None, progress)
        if bank.mixture != "probability":
            weights, prior = fitting.keep_better((weights, prior), fitting.start())
        tensors = {**found.discriminant.tensors(), "mixtures": found.mixtures}
        on_device = {name: tensor.to(bank.device) for name, tensor in tensors.items()}
        return cls(bank.num_experts, options, {**on_device, "weights": weights, "prior": prior})

    def _score(self, sums: Tensor, mean: Tensor, count: Tensor) -> Tensor:
        device = sums.device
        by_evidence = sums @ self.weights[:-1].to(device) + self.prior.to(device)
        if not self.uses_hidden:
            return by_evidence
        return by_evidence + self.weights[-1].to(device) * _centre(self.mix_by_domain(mean, count))

    @override
    def scores(self, view: RouterView) -> Tensor:
        check_evidence(view, self.num_experts)
        mean = causal_mean(self.read(view), view.document_starts)
        sums = accumulate_evidence(view, self.options.decays)
        return self._score(sums, mean, count_since_start(view.document_starts))

    @override
    def init_state(self, batch_size: int) -> RouterState:
        """Evidence sums (B, E, K); sum (B, D) and number (B,) of the document's states."""
        shape = (batch_size, self.num_experts, len(self.options.decays))
        return {**super().init_state(batch_size), "sums": self.centre.new_zeros(shape)}

    @override
    def step(self, view: RouterView, state: RouterState) -> tuple[Tensor, RouterState]:
        check_evidence(view, self.num_experts)
        hidden = self.read(view)
        count = count_since_start(view.document_starts, carry=state["count"].to(hidden.device))
        mean, after = pool_causally(hidden, view, state)
        sums = accumulate_evidence(view, self.options.decays, state["sums"].to(hidden.device))
        gates = torch.softmax(self._score(sums, mean, count), dim=-1)
        return gates, {**after, "sums": sums[:, -1]}


def _centre(scores: Tensor) -> Tensor:
    """Less their mean over experts: softmax does not see it."""
    return scores - scores.mean(dim=-1, keepdim=True)
