"""The carried file: what a contributor computes at home and sends for routers to read."""

from collections.abc import Mapping

import torch
from molora_fed import CarriedContext, applied
from molora_fed.types import Split
from torch import Tensor

BATCH = 4


def compute(context: CarriedContext) -> Mapping[str, Tensor]:
    """Compute the tensors that are sent: the one function to fill in.

    The same context gives the same tensors, and the base is afterwards as it was. A router reads
    them as `bank.carried[expert]["sample-carried-file"]`, which is None for an expert without.

    Args:
        context: `base.model` is without the adapter, `applied` puts `adapter` on; `blocks` gives
            tokens (B, T) int32 of the train or the validation split, a batch at a time; `seed`
            is of whatever is drawn; `max_bytes` is the largest file that the charter takes.

    Returns:
        Tensors by name, finite, float32, float16 or bfloat16, of at most four axes; here the mean
        hidden state that enters the output head, (D,).

    See docs/hooks/carried-files.md.
    """
    total, count = torch.zeros(context.base.hidden_size), 0
    for blocks in context.blocks(Split.TRAIN, BATCH):
        tokens = torch.from_numpy(blocks.tokens).long().to(context.base.model.device)
        with applied(context.base.model, context.adapter) as model, torch.no_grad():
            states = model(tokens, output_hidden_states=True).hidden_states[-1]  # (B, T, D)
        total += states.float().sum(dim=(0, 1)).cpu()
        count += tokens.numel()
    return {"mean": total / count}
