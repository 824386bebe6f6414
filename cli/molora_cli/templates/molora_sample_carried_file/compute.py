"""The carried file: what a contributor computes at home and signs with its adapter."""

from collections.abc import Mapping

import torch
from molora_fed import CarriedContext
from molora_fed.types import Split
from torch import Tensor


def compute(context: CarriedContext) -> Mapping[str, Tensor]:
    """Compute what routers will read of this contribution: the one function to fill in.

    It runs once, on the contributor's machine, after its adapter is trained; what it returns is
    published with the adapter. It leaves the base and the adapter as they are.

    Args:
        context: `base.model` is the base; `adapter` the contributor's updates by layer, which
            `molora_fed.applied(model, adapter)` puts into it for a while; `blocks(Split.TRAIN)` and
            `blocks(Split.VALIDATION)` give its text, tokens (B, T) int32 at a time; draw with a
            generator of `seed`, and keep below `max_bytes`.

    Returns:
        Finite tensors by name. Routers have them as
        `bank.carried[expert]["sample-carried-file"]`; None is that of an expert without.

    See docs/hooks/carried-files.md.
    """
    model, total, count = context.base.model, 0.0, 0
    for blocks in context.blocks(Split.VALIDATION, batch=8):
        tokens = torch.from_numpy(blocks.tokens).long().to(model.device)
        with torch.no_grad():
            states = model(tokens, output_hidden_states=True).hidden_states[-1]  # (B, T, D)
        total = total + states.double().sum(dim=(0, 1))
        count += tokens.numel()
    return {"mean": (torch.as_tensor(total) / count).float()}
