"""Counted floating-point operations of reading and writing tokens.

Two operations for every weight a token is multiplied with, and four times the attention's width
for every token it looks back on, in every block: 2 W + 4 L D t at position t. Norms, activations
and sampling are left out, as usual.

Source: the usual count, e.g. arXiv 2001.08361, section 2.1, with the output head included.
"""

from dataclasses import dataclass

from molora_fed.inference.fused_lm import FusedForCausalLM
from molora_fed.models.layout import block_index, decoder_blocks

__all__ = ["TokenCost", "count_cost"]


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


def count_cost(model: FusedForCausalLM) -> TokenCost:
    """What a token costs: every expert's row, blocks that all share once, updates as products.

    A router that reads the base's state costs one more row where the base is no expert; beside a
    population the base runs once more.

    Args:
        model: The model.
    """
    rows, depth = model.num_rows, model.config.frozen_depth
    shared = depth if model.config.mixes == "distributions" and rows > 1 else 0
    prefix, _ = decoder_blocks(model.model)
    weights = 0
    for name, layer in model.expert_layers.items():
        block = block_index(name, prefix)
        is_shared = block is not None and block < shared
        own = [p.numel() for p in layer.parameters() if p is not layer.weight and p.ndim > 1]
        weights += layer.weight.numel() * (1 if is_shared else rows) + sum(own)
    config = model.model.config.get_text_config()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    blocks = config.num_hidden_layers * rows - shared * (rows - 1)
    return TokenCost(weights, int(width * blocks))
