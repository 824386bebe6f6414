"""Attention of one new token, on a processor, for the attention functions of transformers."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

__all__ = ["ATTENTION", "attend"]

ATTENTION = "molora"
"""Name under which transformers knows `attend`."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers' `sdpa` gives; one token in 16 bits by float32 products.

    PyTorch's kernel for processors takes one token of a 16-bit model in blocks made for hundreds:
    five times as long as two products in float32, which are more exact, too.

    Args:
        module: The attention layer.
        query: (N, H, T, D_head).
        key: (N, H_kv, S, D_head).
        value: (N, H_kv, S, D_head).
        attention_mask: Added to the scores, or False where there is none, (N, 1, T, S) or None.
        dropout: Not used, as nothing trains.
        scaling: Of the scores; the root of D_head if None.
        others: See transformers.

    Returns:
        (N, T, H, D_head), and None.
    """
    is_one = query.shape[2] == 1 and query.device.type == "cpu"
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    is_plain = all(others.get(name) is None for name in ("softcap", "position_bias", "cache"))
    if not (is_one and is_half and is_plain and query.shape[1] % key.shape[1] == 0):
        found, weights = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            **others,
        )
        return found, weights
    rows, heads, _, width = query.shape
    scale = width**-0.5 if scaling is None else scaling
    grouped = query.view(rows, key.shape[1], -1, width).float()
    scores = torch.matmul(grouped, key.float().transpose(-1, -2)).mul_(scale)
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores.masked_fill_(~attention_mask[..., : key.shape[2]], float("-inf"))
        else:
            scores += attention_mask[..., : key.shape[2]]
    mixed = torch.matmul(torch.softmax(scores, dim=-1), value.float())
    return mixed.view(rows, 1, heads, width).to(query.dtype), None


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
