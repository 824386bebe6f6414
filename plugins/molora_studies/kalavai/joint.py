"""Experts and router trained together: what post-hoc fusion gives away by keeping them apart."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch import Tensor, nn

from molora_fed.models.states import Capture, capture_states
from molora_fed.routing.causal import causal_mean, causal_sum

__all__ = ["JointModel"]


class JointModel(nn.Module):
    """Frozen base, experts that train, and gates on what was read: evidence and hidden states.

    Gates are softmax(a * evidence + W m): evidence the experts' log-likelihood of the document so
    far, m the mean of the base's hidden states so far. With a = 1 and W = 0, where it starts, that
    is the zero-training evidence router. Experts' distributions are mixed as probabilities; the
    base is expert 0. It has as much of a causal language model's surface as training and
    evaluation use.

    Attributes:
        router: W, (1 + E, D), over `router_scale`: zero at the start.
        weight: (a - 1) over `router_scale`, (1,): zero at the start.
    """

    def __init__(
        self, base: Any, experts: Sequence[Any], *, end_of_text: int, router_scale: float
    ) -> None:
        """Join models.

        Args:
            base: The base model; its parameters are left alone.
            experts: Models whose trainable parameters are trained.
            end_of_text: Id that ends a document.
            router_scale: How much faster than the experts the router learns.
        """
        super().__init__()
        self.base = base
        self.experts = nn.ModuleList(experts)
        self.end_of_text = end_of_text
        self.router_scale = router_scale
        hidden = base.get_output_embeddings().weight.shape[1]
        self.router = nn.Parameter(torch.zeros(1 + len(experts), hidden))
        self.weight = nn.Parameter(torch.zeros(1))

    def get_input_embeddings(self) -> nn.Module:
        """The base's embedding, which experts share."""
        embeddings: nn.Module = self.base.get_input_embeddings()
        return embeddings

    def train(self, mode: bool = True) -> Self:
        """Experts alone change mode: the base is the same expert throughout."""
        super().train(mode)
        self.base.eval()
        return self

    def trained_parameters(self) -> list[nn.Parameter]:
        """The router and what the experts train, in a fixed order."""
        own = [p for expert in self.experts for p in expert.parameters() if p.requires_grad]
        return [self.router, self.weight, *own]

    def gates(self, hidden: Tensor, logprob: Tensor, tokens: Tensor) -> Tensor:
        """Log gates of every position from what was read up to it.

        Args:
            hidden: The base's states before the output head, (B, T, D).
            logprob: Each expert's log-probability of x_t given x_<t in nats, (B, T, 1 + E).
            tokens: Token ids, (B, T).

        Returns:
            (B, T, 1 + E), a log-softmax.
        """
        starts = torch.ones(tokens.shape, dtype=torch.bool, device=tokens.device)
        starts[:, 1:] = tokens[:, :-1] == self.end_of_text
        evidence = causal_sum(logprob.masked_fill(starts.unsqueeze(-1), 0.0), starts)
        states = causal_mean(hidden, starts) @ (self.router_scale * self.router).T
        weight = 1.0 + self.router_scale * self.weight
        return torch.log_softmax(weight * evidence + states, dim=-1)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        """Log-probabilities of the mixture as `logits`, (B, T, V).

        Args:
            input_ids: Token ids, (B, T).
            use_cache: Ignored: nothing is kept between calls.
        """
        with torch.no_grad(), capture_states(self.base, Capture(hidden=True)) as states:
            predictions = [_predict(self.base, input_ids)]
        predictions += [_predict(expert, input_ids) for expert in self.experts]
        logprob = torch.stack([_read_targets(p, input_ids) for p in predictions], dim=-1)
        log_gates = self.gates(states["hidden"], logprob, input_ids)
        mixed = predictions[0] + log_gates[..., :1]
        for index, prediction in enumerate(predictions[1:], start=1):
            mixed = torch.logaddexp(mixed, prediction + log_gates[..., index, None])
        return SimpleNamespace(logits=mixed)


def _predict(model: Any, tokens: Tensor) -> Tensor:
    """Log-probabilities of the next token, (B, T, V) float32."""
    return torch.log_softmax(model(input_ids=tokens, use_cache=False).logits.float(), dim=-1)


def _read_targets(prediction: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of each token given those before it, (B, T); 0 at t = 0."""
    found = prediction[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return nn.functional.pad(found, (1, 0))
