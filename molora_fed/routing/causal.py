"""Sums over the past that forget at document starts: what every causal router is made of."""

import torch
from torch import Tensor

__all__ = ["causal_mean", "causal_sum", "count_since_start"]


def causal_sum(
    values: Tensor, document_starts: Tensor, *, decay: float = 1.0, carry: Tensor | None = None
) -> Tensor:
    """Discounted sum over a document's tokens so far: y_t = keep_t * y_{t-1} + x_t.

    `keep_t` is `decay`, and 0 at a document's first token. Computed by doubling, so that it takes
    log2(T) steps and never subtracts large sums from each other as a cumulative sum would.

    Args:
        values: x, (B, T, ...).
        document_starts: True at a document's first token, (B, T) bool.
        decay: Factor per token in [0, 1].
        carry: y before the first position, (B, ...), when a text is continued; None is 0.

    Returns:
        y, shape and dtype of `values`; its last position is the next `carry`.
    """
    batch, length = document_starts.shape
    shape = (batch, length) + (1,) * (values.ndim - 2)
    keep = torch.where(document_starts, 0.0, decay).to(values.dtype).view(shape)
    total = values.clone()
    if carry is not None:
        total[:, 0] += keep[:, 0] * carry
    offset = 1
    while offset < length:
        # Both right-hand sides are read before either is replaced: the spans double together.
        total = torch.cat(
            [total[:, :offset], total[:, offset:] + keep[:, offset:] * total[:, :-offset]], dim=1
        )
        keep = torch.cat([keep[:, :offset], keep[:, offset:] * keep[:, :-offset]], dim=1)
        offset *= 2
    return total


def count_since_start(document_starts: Tensor, *, carry: Tensor | None = None) -> Tensor:
    """Tokens of the document read so far, this one included, (B, T) float32.

    Args:
        document_starts: True at a document's first token, (B, T) bool.
        carry: The count before the first position, (B,), when a text is continued; None is 0.
    """
    ones = torch.ones(document_starts.shape, device=document_starts.device)
    return causal_sum(ones, document_starts, carry=carry)


def causal_mean(values: Tensor, document_starts: Tensor) -> Tensor:
    """Mean over a document's tokens so far, this one included.

    Args:
        values: (B, T, D), any float dtype.
        document_starts: True at a document's first token, (B, T) bool.

    Returns:
        (B, T, D) float32.
    """
    total = causal_sum(values.float(), document_starts)
    return total / count_since_start(document_starts).unsqueeze(-1)
