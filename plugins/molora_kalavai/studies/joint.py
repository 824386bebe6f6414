"""Experts and router trained together: what post-hoc fusion gives away by keeping them apart."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch import Tensor, nn

from molora_fed.forward import Capture, capture_states
from molora_fed.routing.causal import causal_mean

__all__ = ["JointModel"]


class JointModel(nn.Module):
    """Frozen base, experts that train, and a linear router on the base's causal running mean.

    Experts' distributions are mixed as probabilities; the base is expert 0. It has as much of a
    causal language model's surface as training and evaluation use.

    Attributes:
        router: W, (1 + E, D): zero at the start, so that all gates are equal.
    """

    def __init__(
        self, base: Any, experts: Sequence[Any], *, end_of_text: int, router_scale: float
    ) -> None:
        """Join models.

        Args:
            base: The base model; its parameters are left alone.
            experts: Models whose trainable parameters are trained.
            end_of_text: Id that ends a document.
            router_scale: Factor on W: how much faster than the experts the router learns.
        """
        super().__init__()
        self.base = base
        self.experts = nn.ModuleList(experts)
        self.end_of_text = end_of_text
        self.router_scale = router_scale
        hidden = base.get_output_embeddings().weight.shape[1]
        self.router = nn.Parameter(torch.zeros(1 + len(experts), hidden))

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
        return [self.router, *own]

    def gates(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Log gates of every position from what was read up to it.

        Args:
            hidden: The base's states before the output head, (B, T, D).
            tokens: Token ids, (B, T).

        Returns:
            (B, T, 1 + E), a log-softmax.
        """
        starts = torch.ones(tokens.shape, dtype=torch.bool, device=tokens.device)
        starts[:, 1:] = tokens[:, :-1] == self.end_of_text
        pooled = causal_mean(hidden, starts)
        return torch.log_softmax(self.router_scale * pooled @ self.router.T, dim=-1)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        """Log-probabilities of the mixture as `logits`, (B, T, V).

        Args:
            input_ids: Token ids, (B, T).
            use_cache: Ignored: nothing is kept between calls.
        """
        with torch.no_grad(), capture_states(self.base, Capture(hidden=True)) as states:
            logits = self.base(input_ids=input_ids, use_cache=False).logits
        log_gates = self.gates(states["hidden"], input_ids)
        mixed = torch.log_softmax(logits.float(), dim=-1) + log_gates[..., :1]
        for index, expert in enumerate(self.experts, start=1):
            logits = expert(input_ids=input_ids, use_cache=False).logits
            logprob = torch.log_softmax(logits.float(), dim=-1) + log_gates[..., index, None]
            mixed = torch.logaddexp(mixed, logprob)
        return SimpleNamespace(logits=mixed)
