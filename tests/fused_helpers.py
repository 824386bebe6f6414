"""A router that reads whatever it is told to, and fused models of tiny random experts."""

import torch

from molora_fed.adapters.compatibility import applied
from molora_fed.bank.views import RouterView
from molora_fed.models.forward import run_blocks
from molora_fed.models.states import Capture
from molora_fed.routing.contract import OutputRouter, RouterOptions
from molora_fed.routing.fused import FusedExpert, FusedModel
from molora_fed.testing import build_random_adapter

ALL_COLUMNS = ("base_hidden", "prefix_hidden", "mean_hidden", "experts_hidden", "evidence")


class ProbeOptions(RouterOptions):
    columns: tuple[str, ...] = ("evidence",)
    sharpness: float = 0.3


class ProbeRouter(OutputRouter[ProbeOptions]):
    """Scores every column it reads, and sums the evidence of a document so far."""

    @classmethod
    def shapes(cls, num_experts, options):
        return {"projection": ("D", num_experts)}

    @classmethod
    def build(cls, num_experts, hidden_size, columns, seed=0):
        generator = torch.Generator().manual_seed(seed)
        projection = torch.randn(hidden_size, num_experts, generator=generator)
        return cls(num_experts, ProbeOptions(columns=columns), {"projection": projection})

    @classmethod
    def reads(cls, options):
        return frozenset(options.columns)

    @classmethod
    def learn(cls, bank, options, seed, progress):
        return cls.build(bank.num_experts, bank.hidden_size, options.columns, seed)

    def scores(self, view):
        return self._score(view, self.init_state(len(view.document_starts)))[0]

    def _score(self, view, state):
        total = torch.zeros(*view.document_starts.shape, self.num_experts)
        for name in ("base_hidden", "prefix_hidden", "mean_hidden"):
            if name in self.options.columns:
                total = total + getattr(view, name).float() @ self.projection
        if "experts_hidden" in self.options.columns:
            total = total + (view.experts_hidden.float() * self.projection.T).sum(-1)
        carry = state["sum"]
        if "evidence" in self.options.columns:
            sums = []
            for t in range(total.shape[1]):
                keep = (~view.document_starts[:, t]).float().unsqueeze(-1)
                carry = carry * keep + view.evidence[:, t]
                sums.append(carry)
            total = total + torch.stack(sums, dim=1)
        return self.options.sharpness * total, {"sum": carry}

    def init_state(self, batch_size):
        return {"sum": torch.zeros(batch_size, self.num_experts)}

    def step(self, view, state):
        scores, state = self._score(view, state)
        return torch.softmax(scores, dim=-1), state


class NoncausalRouter(ProbeRouter):
    causal = False


def build_fused(
    base, *, kinds=("lora", None, "delta"), columns=("evidence",), mixture="probability", depth=1
):
    """One expert for each kind (None is the base), each with random weights of its own."""
    experts = tuple(
        FusedExpert("base", None)
        if kind is None
        else FusedExpert(
            f"expert-{index}",
            build_random_adapter(
                base.model, kind=kind, seed=index, rank=2 + index, frozen_depth=depth
            ),
            domain=f"domain-{index}",
        )
        for index, kind in enumerate(kinds)
    )
    hidden_size = base.model.get_output_embeddings().weight.shape[1]
    router = ProbeRouter.build(len(experts), hidden_size, columns)
    return FusedModel(base, experts, router, "probe", mixture, depth)


def random_tokens(batch, length, seed=0, vocabulary=256):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (batch, length), generator=generator)


def reference_forward(fused, tokens, starts):
    """One expert at a time, with `applied`: what the fused model must equal."""
    model = fused.base.model
    logits, hidden, logprob = [], [], []
    for expert in fused.experts:
        with applied(model, expert.adapter), torch.no_grad():
            logits.append(model(tokens).logits.float())
            (step,) = run_blocks(model, tokens, capture=Capture(hidden=True))
            hidden.append(step.hidden.clone())
            logprob.append(step.logprob.clone())
    (step,) = run_blocks(model, tokens, capture=Capture(True, fused.frozen_depth))
    view = RouterView(
        starts,
        base_hidden=step.hidden.clone(),
        prefix_hidden=step.prefix.clone(),
        mean_hidden=torch.stack(hidden).mean(0),
        experts_hidden=torch.stack(hidden, dim=2),
        evidence=torch.stack(logprob, dim=-1).masked_fill(starts[..., None], 0.0),
    )
    gates = fused.router.gates(view)
    if fused.mixture == "logit":
        mixed = torch.einsum("bte,ebtv->btv", gates, torch.stack(logits))
        return torch.log_softmax(mixed, dim=-1), gates
    weighted = torch.einsum("bte,ebtv->btv", gates, torch.stack(logits).softmax(-1))
    return weighted.log(), gates
