"""How gates turn experts' predictions into one: the probability and the logit mixture."""

import torch
from torch import Tensor
from torch.nn import functional

from molora_fed.models.head import Readout, compute_head_losses

__all__ = [
    "compute_log_gates",
    "compute_logit_nll",
    "compute_probability_nll",
]

_NO_GATE = 1e-38  # smallest normal float32: a gate of 0 stays differentiable as a logarithm


def compute_log_gates(gates: Tensor) -> Tensor:
    """Logarithm of gates that stays finite, and differentiable, where a gate is 0."""
    return gates.clamp_min(_NO_GATE).log()


def compute_probability_nll(log_gates: Tensor, logprob: Tensor) -> Tensor:
    """Loss of the mixture of the experts' distributions.

    Args:
        log_gates: (B, T, E), their exponentials sum to 1 over E; position t weighs x_{t+1}.
        logprob: `log p_e(x_t | x_<t)` in nats, (B, T, E).

    Returns:
        -log sum_e gates[t, e] p_e(x_{t+1} | x_<=t) in nats, (B, T-1).
    """
    return -torch.logsumexp(log_gates[:, :-1] + logprob[:, 1:], dim=-1)


def compute_logit_nll(gates: Tensor, hidden: Tensor, tokens: Tensor, readout: Readout) -> Tensor:
    """Loss of the mixture of the experts' logits, as published by KALAVAI.

    Args:
        gates: (B, T, E), summing to 1 over E; position t weighs x_{t+1}.
        hidden: Experts' states that enter the head, (B, T, E, D).
        tokens: Token ids, (B, T), integer.
        readout: The head they share.

    Returns:
        Cross-entropy of x_1 .. x_{T-1} in nats, (B, T-1) float32; differentiable in `gates`.

    Source: arXiv 2603.22755, protocol.
    """
    weights, states = gates[:, :-1], hidden[:, :-1]
    targets = tokens[:, 1:].long().to(gates.device)
    if readout.softcap is None:
        mixed = readout.mix_states(weights, states).flatten(0, 1)
        losses = compute_head_losses(mixed, targets.flatten(), readout)
    else:
        logits = readout.mix(weights, states).float().flatten(0, 1)
        losses = functional.cross_entropy(logits, targets.flatten(), reduction="none")
    return losses.view(targets.shape)
