"""What a contributor computes: a gate that opens on its own text, trained after the adapter."""

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import layer_norm, logsigmoid

from molora_fed import CarriedContext, Configurable, PluginOptions, applied

__all__ = ["Gate", "GateOptions", "normalise"]


class GateOptions(PluginOptions):
    """How the gate is trained.

    Attributes:
        steps: AdamW steps.
        batch: Blocks per step.
        learning_rate: Of AdamW.
        blocks: Train blocks that are read, at most.
    """

    steps: int = Field(default=100, ge=1)
    batch: int = Field(default=16, ge=1)
    learning_rate: float = Field(default=5e-3, gt=0)
    blocks: int = Field(default=128, ge=1)


class Gate(Configurable[GateOptions]):
    """Trains v so that `s p_e + (1 - s) p_base` predicts the contributor's own text best.

    s = sigmoid(v . h + c), and h is the base's normalised state. Source: gates trained by each
    expert's owner with everything else frozen, arXiv 2402.05859; there one a module, on what enters
    it, here one an adapter.
    """

    def __call__(self, context: CarriedContext) -> Mapping[str, Tensor]:
        """The gate, (D,) float32; c only lets v be centred, and stays at home.

        Args:
            context: The contributor's base, adapter and text.
        """
        states, own, base = self._read(context)
        gate = torch.zeros(states.shape[-1], requires_grad=True)
        offset = torch.zeros((), requires_grad=True)
        optimizer = torch.optim.AdamW([gate, offset], lr=self.options.learning_rate)
        generator = torch.Generator().manual_seed(context.seed)
        for step in range(self.options.steps):
            rows = torch.randint(0, len(states), (self.options.batch,), generator=generator)
            with torch.enable_grad():
                score = states[rows] @ gate + offset
                mixed = torch.logaddexp(
                    logsigmoid(score) + own[rows], logsigmoid(-score) + base[rows]
                )
                loss = -mixed.mean()
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            if context.progress is not None:
                context.progress(step + 1, self.options.steps, loss=float(loss.detach()))
        return {"gate": gate.detach()}

    def _read(self, context: CarriedContext) -> tuple[Tensor, Tensor, Tensor]:
        """States (N, T-1, D), and log-probabilities (N, T-1) of specialist and base, in nats."""
        model, states, own, base = context.base.model, [], [], []
        left = self.options.blocks
        for blocks in context.blocks("train", batch=8):
            if left <= 0:
                break
            tokens = torch.from_numpy(blocks.tokens[:left]).long().to(model.device)
            left -= len(tokens)
            with torch.no_grad():
                output = model(tokens, output_hidden_states=True)
                states.append(normalise(output.hidden_states[-1][:, :-1]).cpu())
                base.append(look_up(output.logits, tokens))
                with applied(model, context.adapter) as specialist:
                    own.append(look_up(specialist(tokens).logits, tokens))
        return torch.cat(states), torch.cat(own), torch.cat(base)


def look_up(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities of each next token, (B, T-1) nats.

    Args:
        logits: (B, T, V).
        tokens: (B, T).
    """
    logprob = torch.log_softmax(logits[:, :-1].float(), dim=-1)
    return logprob.gather(-1, tokens[:, 1:, None]).squeeze(-1).cpu()


def normalise(states: Tensor) -> Tensor:
    """States with mean 0 and variance 1 each, (..., D) float32."""
    return layer_norm(states.float(), states.shape[-1:])
