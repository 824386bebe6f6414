"""How many blocks go through a model at once: by tokens, and fewer where memory is short.

The number decides the last bits of float32 sums, and columns of a bank are found again by it. So it
never follows what happens to be free: it depends on the sizes of model and blocks and on all the
memory of the device, which are the same in two runs on one machine.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from molora_fed.models.forward import LOGITS_AT_ONCE
from molora_fed.models.head import find_head
from molora_fed.models.runtime import format_bytes

__all__ = ["TOKENS_A_PASS", "PassBytes", "choose_batch", "fit_batch", "halve_until", "list_batches"]

_LOG = logging.getLogger(__name__)

TOKENS_A_PASS = 2_048
"""Tokens of a forward pass where nobody says otherwise; more gain nothing, as measured in
docs/results/scale.md, and cost memory."""
_MOST_BLOCKS = 16
_STEP = 2**28  # memory is rounded down to it: a kernel's own share differs a little
_SHARE = 0.5  # of what the weights leave, for a pass; the rest is for columns and for others


def choose_batch(block_size: int) -> int:
    """Blocks of a forward pass of at most `TOKENS_A_PASS` tokens: from 1 to 16.

    Shorter blocks than 128 tokens have 16, too: so it always was, and a charter binds the number.

    Args:
        block_size: T, tokens per block.
    """
    return min(_MOST_BLOCKS, max(1, TOKENS_A_PASS // block_size))


def list_batches(batch: int) -> list[int]:
    """The numbers of blocks that `halve_until` may give for this one, largest first."""
    found = [batch]
    while found[-1] > 1:
        found.append(found[-1] // 2)
    return found


@dataclass(frozen=True)
class PassBytes:
    """What a forward pass without gradients takes, as far as it can be foreseen.

    Attributes:
        weights: Bytes of the model's weights, and of the copy of those that an adapter changes.
        fixed: Bytes of a pass that do not grow with its tokens: logits held at once.
        per_token: Bytes of a pass for each of its tokens.
    """

    weights: int
    fixed: int
    per_token: int

    @staticmethod
    def of(model: Any, block_size: int) -> "PassBytes":
        """The sizes of a model's passes over blocks of T tokens.

        Counted are one block's activations, the states that are kept, and attention with all its
        scores in float32, which most models do not hold at once.

        Args:
            model: A Hugging Face causal language model.
            block_size: T.
        """
        config = model.config.get_text_config()
        size, width = model.dtype.itemsize, int(config.hidden_size)
        inner = int(getattr(config, "intermediate_size", None) or 4 * width)
        heads = int(getattr(config, "num_attention_heads", None) or 1)
        vocabulary = int(model.get_input_embeddings().weight.shape[0])
        logit = size + 4
        per_token = size * (10 * width + 3 * inner) + heads * block_size * logit
        fixed = logit * max(LOGITS_AT_ONCE, block_size * vocabulary)
        if find_head(model) is None:  # then all logits exist at once
            per_token, fixed = per_token + logit * vocabulary, 0
        weights = 2 * sum(each.numel() * each.element_size() for each in model.parameters())
        return PassBytes(weights, fixed, per_token)

    def count(self, tokens: int) -> int:
        """Bytes of a pass of so many tokens, beside the weights."""
        return self.fixed + tokens * self.per_token


def halve_until(batch: int, block_size: int, needs: PassBytes, memory: int) -> int:
    """The largest of batch, batch / 2, batch / 4, ... whose pass fits into a device's memory.

    Args:
        batch: Blocks that are wanted.
        block_size: T.
        needs: What a pass takes.
        memory: Bytes of the device in all; rounded down to steps of 256 MiB.

    Returns:
        Blocks per pass, at least one, whether that fits or not.
    """
    there = int((memory // _STEP * _STEP - needs.weights) * _SHARE)
    found = list_batches(batch)
    return next((one for one in found if needs.count(one * block_size) <= there), 1)


def fit_batch(model: Any, block_size: int, batch: int | None = None) -> int:
    """Blocks per forward pass of a model on the device where it is.

    Called with its own result it gives the same.

    Args:
        model: A Hugging Face causal language model.
        block_size: T.
        batch: Blocks that are wanted; `choose_batch` if None.

    Returns:
        That many, or as many as the device's memory suffices for, which is logged.
    """
    wanted = choose_batch(block_size) if batch is None else batch
    needs, memory = PassBytes.of(model, block_size), find_memory_bytes(model.device)
    found = halve_until(wanted, block_size, needs, memory)
    if found < wanted:
        _LOG.warning(
            "%d blocks of %d tokens per pass instead of %d: these would take about %s of the %s "
            "of %s. The last bits of losses differ.",
            found,
            block_size,
            wanted,
            format_bytes(needs.weights + needs.count(wanted * block_size)),
            format_bytes(memory),
            model.device,
        )
    return found


def find_memory_bytes(device: torch.device) -> int:
    """All the memory of an accelerator, or of this process's group on the machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    memory = psutil.virtual_memory().total
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:  # "max" where there is none
            memory = min(memory, int(Path(limit).read_text()))
        except (OSError, ValueError):
            continue
    return memory
