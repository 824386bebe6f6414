"""Counted floating-point operations of reading and writing tokens.

Two operations for every weight a token is multiplied with, and four times the attention's width
for every token it looks back on, in every block: 2 W + 4 L D t at position t. Norms, activations
and sampling are left out, as usual.

Source: the usual count, e.g. arXiv 2001.08361, section 2.1, with the output head included.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from molora_fed.adapters.updates import Adapter, LinearUpdate
from molora_fed.models.layout import block_index, decoder_blocks
from molora_fed.population.contract import Population
from molora_fed.routing.fused import FusedModel

__all__ = [
    "TokenCost",
    "count_evolved",
    "count_fused",
    "count_plain",
    "count_weights",
]


@dataclass(frozen=True)
class TokenCost:
    """What one token costs.

    Attributes:
        weights: W, weights it is multiplied with.
        attention: L * D summed over everything that attends, per token looked at.
    """

    weights: int
    attention: int

    def count(self, prompt_tokens: int, new_tokens: int) -> float:
        """Operations of reading a prompt and writing tokens, for one text.

        The prompt is read once for every text, and the last token that is written is not read.

        Args:
            prompt_tokens: Tokens read, at least one.
            new_tokens: Tokens written.
        """
        positions = prompt_tokens + max(new_tokens - 1, 0)
        contexts = positions * (positions + 1) // 2  # position t looks at t + 1 tokens
        return float(2 * self.weights * positions + 4 * self.attention * contexts)


def count_weights(model: Any, *, below: int | None = None) -> int:
    """Weights of linear layers, output head included and embeddings not.

    Args:
        model: A causal language model.
        below: Only those in decoder blocks before this one.
    """
    prefix, _ = decoder_blocks(model)
    total = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            block = block_index(name, prefix)
            if below is None or (block is not None and block < below):
                total += module.weight.numel()
    return total


def _count_attention(model: Any, *, blocks: int | None = None) -> int:
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return int(width * (config.num_hidden_layers if blocks is None else blocks))


def _count_update(update: LinearUpdate) -> int:
    return sum(part.numel() for part in (update.a, update.b, update.dense) if part is not None)


def _count_adapter(adapter: Adapter | None) -> int:
    if adapter is None:
        return 0
    return sum(_count_update(update) for update in adapter.updates.values())


def count_plain(model: Any) -> TokenCost:
    """A base, or a specialist whose updates are added to its weights."""
    return TokenCost(count_weights(model), _count_attention(model))


def count_fused(fused: FusedModel) -> TokenCost:
    """A fused model: all experts, blocks they share once, their updates as products of their own.

    A router that reads the base's state costs one more row where the base is no expert.
    """
    model, shared = fused.base.model, fused.frozen_depth
    adapters = [expert.adapter for expert in fused.experts]
    reads = fused.router.reads(fused.router.options)
    rows = len(adapters) + int("base_hidden" in reads and None not in adapters)
    again = rows - 1
    weights = rows * count_weights(model) - again * count_weights(model, below=shared)
    attention = rows * _count_attention(model) - again * _count_attention(model, blocks=shared)
    return TokenCost(weights + sum(map(_count_adapter, adapters)), attention)


def count_evolved(model: Any, population: Population, *, reads_base: bool) -> TokenCost:
    """An evolved model: the mixture, and the base beside it where the router reads its states."""
    passes = 1 + int(reads_base)
    updates = [one for slot in population.slots for one in slot.updates.values()]
    weights = passes * count_weights(model) + sum(map(_count_update, updates))
    return TokenCost(weights, passes * _count_attention(model))
