"""How gates turn experts' predictions into one: the probability and the logit mixture."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.backends import mkldnn
from torch.nn import functional

from molora_fed.errors import RoutingError
from molora_fed.models.forward import Capture, capture_states

__all__ = [
    "Readout",
    "compute_log_gates",
    "compute_logit_nll",
    "compute_probability_nll",
    "find_readout",
]

_NO_GATE = 1e-38  # smallest normal float32: a gate of 0 stays differentiable as a logarithm
_LOGITS_AT_ONCE = 2**19  # logits held at once; two megabytes stay in a core's cache
_LEAST_ROWS = 64  # fewer would starve the matrix product


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


@dataclass(frozen=True)
class Readout:
    """How a hidden state becomes logits, found by comparing numbers, not by architecture.

    Attributes:
        weight: Head weight, (V, D).
        bias: Head bias, (V,), or None.
        scale: Constant the head's output is multiplied with.
        softcap: c of c * tanh(logits / c), or None.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states, (..., D) -> (..., V), in the head's dtype."""
        logits = functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    @cached_property
    def _packed(self) -> tuple[Tensor, Tensor] | None:
        """The head, (V, D), and its transpose as oneDNN tensors, where that is the faster way.

        In float32 on a processor, oneDNN multiplies as exactly as the default library and more
        than twice as fast on processors that library was not written for.
        """
        is_plain = self.bias is None and self.weight.dtype == torch.float32
        if not (is_plain and self.weight.device.type == "cpu" and mkldnn.is_available()):
            return None
        weight = self.weight.detach()
        return weight.to_mkldnn(), weight.t().contiguous().to_mkldnn()

    def multiply(self, hidden: Tensor) -> Tensor:
        """Logits (R, V) of states (R, D) without gradients and without the soft-cap."""
        if self._packed is None:
            return replace(self, softcap=None).logits(hidden)
        logits = functional.linear(hidden.float().to_mkldnn(), self._packed[0]).to_dense()
        return logits if self.scale == 1.0 else logits.mul_(self.scale)

    def multiply_back(self, upstream: Tensor) -> Tensor:
        """Gradient in the states (R, D) from the gradient in the logits (R, V)."""
        if self._packed is None:
            gradient = upstream.to(self.weight.dtype) @ self.weight
        else:
            gradient = functional.linear(upstream.to_mkldnn(), self._packed[1]).to_dense()
        return gradient if self.scale == 1.0 else gradient * self.scale

    @staticmethod
    def mix_states(gates: Tensor, hidden: Tensor) -> Tensor:
        """Gate-weighted sum of states, (..., E) and (..., E, D) -> (..., D)."""
        return torch.einsum("...e,...ed->...d", gates, hidden.to(gates.dtype))

    def mix(self, gates: Tensor, hidden: Tensor) -> Tensor:
        """Gate-weighted sum of the experts' logits.

        Without a soft-cap the head is linear, so it is applied once, to the gate-weighted state
        (its bias counts once because gates sum to 1); with one it is applied to every expert.

        Args:
            gates: (..., E), summing to 1 over E.
            hidden: States that enter the head, (..., E, D).

        Returns:
            Logits, (..., V).
        """
        if self.softcap is None:
            return self.logits(self.mix_states(gates, hidden))
        logits: Tensor = torch.zeros((), dtype=gates.dtype, device=gates.device)
        for expert in range(gates.shape[-1]):
            weighted = gates[..., expert, None] * self.logits(hidden[..., expert, :])
            logits = logits + weighted
        return logits


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
        losses = _HeadCrossEntropy.apply(mixed, targets.flatten(), readout)
    else:
        logits = readout.mix(weights, states).float().flatten(0, 1)
        losses = functional.cross_entropy(logits, targets.flatten(), reduction="none")
    return losses.view(targets.shape)


class _HeadCrossEntropy(torch.autograd.Function):
    """Cross-entropy of a linear head's output, rows by rows, the gradient made on the way.

    Only some rows' distributions over the vocabulary exist at a time, and they stay in the cache;
    what is left are the two products with the head. (With a gradient, a loss is cut off at 87
    nats, where its probability leaves float32; the gradient is not.)
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, targets: Tensor, readout: Readout) -> Tensor:
        """Losses of states (R, D) for targets (R,): (R,) float32."""
        count, vocabulary = len(states), len(readout.weight)
        rows = max(_LEAST_ROWS, _LOGITS_AT_ONCE // vocabulary)
        losses = torch.empty(count, device=states.device)
        needs_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(states, dtype=readout.weight.dtype) if needs_gradient else None
        for start in range(0, count, rows):
            part = slice(start, min(start + rows, count))
            logits = readout.multiply(states[part]).float()
            if gradient is None:
                losses[part] = functional.cross_entropy(logits, targets[part], reduction="none")
                continue
            chosen = targets[part, None]
            distribution = torch.softmax(logits, dim=-1)
            losses[part] = -compute_log_gates(distribution.gather(1, chosen)).squeeze(1)
            distribution.scatter_add_(1, chosen, distribution.new_full(chosen.shape, -1.0))
            gradient[part] = readout.multiply_back(distribution)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        """Gradient in the states; the head is frozen."""
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None].to(gradient.dtype), None, None


@torch.no_grad()
def find_readout(model: Any) -> Readout:
    """Find how a model's hidden states become its logits, by running it on a few tokens.

    Args:
        model: Any Hugging Face causal language model; in evaluation mode.

    Returns:
        A readout that reproduces the model's logits.

    Raises:
        RoutingError: If neither the head, the head times a constant, nor the head under the
            configured soft-cap gives the model's logits; logits cannot be mixed then.
    """
    head = model.get_output_embeddings()
    device = head.weight.device
    vocabulary = model.get_input_embeddings().weight.shape[0]
    rows = (torch.arange(16, device=device) * 7919 % vocabulary)[None]
    with capture_states(model, Capture(hidden=True)) as states:
        logits = model(input_ids=rows, use_cache=False).logits.double()
    bias = getattr(head, "bias", None)
    weight = head.weight.detach()
    plain = Readout(weight, None if bias is None else bias.detach(), 1.0, None)
    raw = plain.logits(states["hidden"]).double()
    scale = float((raw * logits).sum() / (raw * raw).sum())
    configuration = model.config.get_text_config()
    cap = getattr(configuration, "final_logit_softcapping", None)
    candidates = [plain, Readout(weight, plain.bias, scale, None)]
    if cap is not None:
        candidates.insert(0, Readout(weight, plain.bias, 1.0, float(cap)))
    # A 16-bit model rounds its logits after the last operation; 32-bit agrees to rounding.
    tolerance = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 2e-2
    for readout in candidates:
        found = readout.logits(states["hidden"]).double()
        if torch.allclose(found, logits, rtol=tolerance, atol=tolerance * float(logits.std())):
            return readout
    raise RoutingError(
        f"Cannot mix logits of '{type(model).__name__}': expected its logits to be its head's "
        f"output, alone, scaled or soft-capped, got a difference of "
        f"{float((raw - logits).abs().max()):.3g}. Use the probability mixture."
    )
