"""Evidence, fitted and unfitted, weighed against each other: fitting at a price that is bounded."""

import math
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from molora_fed.bank.views import RouterView
from molora_fed.routing.causal import causal_sum
from molora_fed.routing.contract import RouterState
from molora_kalavai.evidence import EvidenceRouter, check_evidence, read_relative_evidence

__all__ = ["MixedEvidenceRouter"]

_FORMS = 2  # the fitted form and the zero form, one half each before anything is read


class MixedEvidenceRouter(EvidenceRouter):
    """Bayes' mixture of the two evidence routers: `evidence` as fitted, and `evidence-zero`.

    Both mix the same experts, so that weighing the two forms by how well each predicted the
    document so far, from one half each, is weighing experts: gates are
    w_t(fitted) g_t(fitted) + w_t(zero) g_t(zero). Under the probability mixture a document costs
    at most ln 2 more than under the better form, whatever was fitted, and so at most
    ln E + ln 2 more than its best expert.

    Options, what is learned and how are those of `evidence`.

    Source: own derivation, see docs/routers.md.
    """

    name: ClassVar[str] = "evidence-mixed"

    @classmethod
    @override
    def bound_excess(cls, num_experts: int) -> float:
        """The zero form's ln E, and ln 2 for weighing two forms."""
        return math.log(num_experts) + math.log(_FORMS)

    @override
    def scores(self, view: RouterView) -> Tensor:
        """Log-gates, (B, T, E)."""
        check_evidence(view, self.num_experts)
        return self._run(view, self.init_state(len(view.document_starts)))[0]

    @override
    def init_state(self, batch_size: int) -> RouterState:
        """Discounted evidence (B, E, K), each form's last log-gates (B, 2, E), and its record."""
        device = self.weights.device
        return {
            **super().init_state(batch_size),
            "log_gates": torch.zeros(batch_size, _FORMS, self.num_experts, device=device),
            "record": torch.zeros(batch_size, _FORMS, device=device),
        }

    @override
    def step(self, view: RouterView, state: RouterState) -> tuple[Tensor, RouterState]:
        check_evidence(view, self.num_experts)
        scores, after = self._run(view, state)
        return torch.softmax(scores, dim=-1), after

    def _run(self, view: RouterView, before: RouterState) -> tuple[Tensor, RouterState]:
        """Log-gates (B, T, E) of the view's positions given the state before them, and the next."""
        starts = view.document_starts
        state = {name: tensor.to(starts.device) for name, tensor in before.items()}
        sums = self.sums(view, state["sums"])
        # decays[0] is 1: that sum alone, at weight 1 and with no prior, scores the zero form.
        forms = torch.stack([self.score(sums), sums[..., 0]], dim=2)
        log_gates = torch.log_softmax(forms, dim=-1)  # (B, T, 2, E)
        earlier = torch.cat([state["log_gates"].unsqueeze(1), log_gates[:, :-1]], dim=1)
        evidence = read_relative_evidence(view).unsqueeze(2)
        # What each form's gates, set before a token, gave that token: log q_f(x_t | x_<t), less
        # the mean of the forms, which no weight sees and which would grow with the document.
        earned = torch.logsumexp(earlier + evidence, dim=-1)  # (B, T, 2)
        earned = earned - earned.mean(dim=-1, keepdim=True)
        # Nothing was predicted where a document starts.
        earned = earned.masked_fill(starts.unsqueeze(-1), 0.0)
        record = causal_sum(earned, starts, carry=state["record"])
        weights = torch.log_softmax(record, dim=-1)  # (B, T, 2)
        mixed = torch.logsumexp(weights.unsqueeze(-1) + log_gates, dim=2)
        after = {"sums": sums[:, -1], "log_gates": log_gates[:, -1], "record": record[:, -1]}
        return mixed, after
