"""How hidden states become logits, and the loss of tokens without all logits at once."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.backends import mkldnn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from molora_fed.errors import RoutingError
from molora_fed.models.states import Capture, capture_states, evaluating, make_probe

__all__ = ["Head", "Readout", "compute_head_losses", "find_head", "find_readout"]

_LEAST = 1e-38  # smallest normal float32
_LOGITS_AT_ONCE = 2**19  # logits held at once; two megabytes stay in a core's cache
_LEAST_ROWS = 64  # fewer would starve the matrix product


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

    @property
    def is_packed(self) -> bool:
        """Whether losses of a frozen head take two more copies of its weight."""
        is_plain = self.bias is None and self.weight.dtype == torch.float32
        return is_plain and self.weight.device.type == "cpu" and mkldnn.is_available()

    @cached_property
    def _packed(self) -> tuple[Tensor, Tensor] | None:
        """The head, (V, D), and its transpose as oneDNN tensors, where that is the faster way.

        In float32 on a processor, oneDNN multiplies as exactly as the default library and more
        than twice as fast on processors that library was not written for.
        """
        if not self.is_packed:
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


def compute_head_losses(states: Tensor, targets: Tensor, readout: Readout) -> Tensor:
    """Cross-entropy of a frozen linear head's logits, differentiable in the states.

    Args:
        states: What enters the head, (R, D).
        targets: Token ids, (R,).
        readout: The head, without a soft-cap.

    Returns:
        (R,) nats, float32.
    """
    losses: Tensor = _HeadCrossEntropy.apply(states, targets, readout)
    return losses


def _split_rows(count: int, vocabulary: int) -> Iterator[slice]:
    """Parts of rows whose logits exist at a time."""
    rows = max(_LEAST_ROWS, _LOGITS_AT_ONCE // vocabulary)
    for start in range(0, count, rows):
        yield slice(start, min(start + rows, count))


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
        losses = torch.empty(count, device=states.device)
        needs_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(states, dtype=readout.weight.dtype) if needs_gradient else None
        for part in _split_rows(count, vocabulary):
            logits = readout.multiply(states[part]).float()
            if gradient is None:
                losses[part] = functional.cross_entropy(logits, targets[part], reduction="none")
                continue
            chosen = targets[part, None]
            distribution = torch.softmax(logits, dim=-1)
            losses[part] = -distribution.gather(1, chosen).clamp_min(_LEAST).log().squeeze(1)
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
    rows = make_probe(model)
    with capture_states(model, Capture(hidden=True)) as states:
        logits = model(input_ids=rows, use_cache=False).logits.double()
    if not bool(torch.isfinite(logits).all()):
        raise RoutingError(
            f"Cannot read the head of '{type(model).__name__}': expected finite logits, got NaN or "
            "infinity. Check the checkpoint."
        )
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


@dataclass(frozen=True, eq=False)
class Head:
    """A causal language model in two parts, so that losses need no (B, T, V) logits.

    Attributes:
        decoder: Turns token ids into the states that enter the output head.
        module: The output head; trained or not.
        readout: What the head's output becomes.
    """

    decoder: nn.Module
    module: nn.Module
    readout: Readout

    def compute_logits(self, states: Tensor) -> Tensor:
        """The model's logits of states, (..., D) to (..., V), in the head's dtype."""
        logits: Tensor = self.module(states)
        if self.readout.scale != 1.0:
            logits = logits * self.readout.scale
        if (cap := self.readout.softcap) is not None:
            logits = cap * torch.tanh(logits / cap)
        return logits

    def compute_losses(self, tokens: Tensor, **inputs: Any) -> Tensor:
        """Loss of every predicted token, in nats.

        Args:
            tokens: (B, T), integer.
            inputs: Further inputs of the decoder, e.g. `position_ids` (B, T-1).

        Returns:
            (B, T-1) float32; differentiable in whatever of the model requires gradients.
        """
        found = self.decoder(input_ids=tokens[:, :-1], use_cache=False, **inputs)
        states, targets = found.last_hidden_state.flatten(0, 1), tokens[:, 1:].flatten()
        is_trained = any(parameter.requires_grad for parameter in self.module.parameters())
        if self.readout.softcap is None and not is_trained:
            losses = compute_head_losses(states, targets, self.readout)
        else:
            # Each part's logits are made again for its gradient, which the head needs, too.
            parts = _split_rows(len(states), len(self.readout.weight))
            each = (
                checkpoint(self._cross_entropy, states[part], targets[part], use_reentrant=False)
                for part in parts
            )
            losses = torch.cat(list(each))
        return losses.view(len(tokens), -1)

    def _cross_entropy(self, states: Tensor, targets: Tensor) -> Tensor:
        logits = self.compute_logits(states).float()
        return functional.cross_entropy(logits, targets, reduction="none")


_found: "WeakKeyDictionary[Any, Head | None]" = WeakKeyDictionary()


def find_head(model: Any) -> Head | None:
    """Split a model into decoder and head, if that computes what the whole does.

    What was found is kept for as long as the model lives: `load_base` asks first, when nothing
    changes the model yet.

    Args:
        model: A Hugging Face causal language model, or one that wraps it as PEFT does.

    Returns:
        The two parts; None where they do not give the model's logits to the bit, or where others
        watch it by hooks.
    """
    if model._forward_hooks or model._forward_pre_hooks:
        return None
    if model not in _found:
        try:
            _found[model] = _find_head(model)
        except Exception:  # in a place where it can run on no other tokens
            return None
    return _found[model]


@torch.no_grad()
def _find_head(model: Any) -> Head | None:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(inner, "get_output_embeddings"):
        return None
    module = inner.get_output_embeddings()
    decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else None
    if module is None or decoder is None or decoder is inner:
        return None
    with evaluating(model):
        try:
            head = Head(decoder, module, find_readout(model))
        except RoutingError:
            return None
        with capture_states(model, Capture(hidden=True)) as states:
            rows = make_probe(model)
            logits = model(input_ids=rows, use_cache=False).logits
            found = decoder(input_ids=rows, use_cache=False).last_hidden_state
        # To the bit: a readout is found within a tolerance, and losses are reported.
        same = (states["hidden"], found), (logits, head.compute_logits(found))
    return head if all(torch.equal(one, other) for one, other in same) else None
