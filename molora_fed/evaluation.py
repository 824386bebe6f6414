"""The only evaluator: every loss that is reported or decided on is computed here."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molora_fed.forward import run_blocks
from molora_fed.types import Progress

__all__ = ["compute_block_losses"]


def compute_block_losses(
    model: Any,
    tokens: NDArray[np.int32] | Tensor,
    *,
    batch: int = 16,
    progress: Progress | None = None,
) -> Tensor:
    """Loss of every predicted token; their mean is the loss of the blocks.

    Args:
        model: Any Hugging Face causal language model, an adapter applied to it or not.
        tokens: Token ids, (N, T), integer.
        batch: Blocks per forward pass; one value wherever figures are compared.
        progress: Receives blocks done and blocks in all.

    Returns:
        Negative log-likelihood in nats of x_1 .. x_{T-1}, (N, T-1) float32 on the CPU.

    Raises:
        ShapeError: If `tokens` is not (N, T >= 2) or holds an id outside the vocabulary.
    """
    rows = [
        -step.logprob[:, 1:].cpu()
        for step in run_blocks(model, tokens, batch=batch, progress=progress)
    ]
    if not rows:
        return torch.zeros((0, tokens.shape[1] - 1))
    return torch.cat(rows)
