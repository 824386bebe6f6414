"""What memory a training takes beside its base, foreseen before it starts.

Activations are not guessed from an architecture: a few tokens are run, what the graph keeps of them
is counted, and that grows with the tokens of a part of a step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from molora_fed.models.forward import count_logits
from molora_fed.models.head import Head
from molora_fed.models.layout import decoder_blocks
from molora_fed.models.runtime import Placement, check_memory, find_free_bytes, format_bytes
from molora_fed.models.states import evaluating, make_probe

__all__ = ["Activations", "TrainingSize", "check_training", "count_activations", "estimate_bytes"]

_FLOAT32 = 4
_PROBE_TOKENS = 32
_BYTES_OF_A_LOGIT = 12  # itself, its softmax and its gradient
_HOLES = 0.6
"""Of what a graph keeps, or would without checkpointing: holes that a processor's heap has between.

The C library does not give the room of one block's temporaries to the next one's, see
docs/results/scale.md.
"""
_SAVED_TWICE = 2  # a checkpoint's tensors as bytes, and the file's bytes


@dataclass(frozen=True)
class Activations:
    """What a forward pass keeps for its gradient: `fixed + linear T + square T^2` bytes a block.

    Attributes:
        fixed: Bytes whatever the length, e.g. weights in another dtype.
        linear: Bytes a token.
        square: Bytes a pair of tokens: attention weights, where they are kept.
        block: Share of it that one decoder block has, in (0, 1].
        border: Bytes a token of the state between two decoder blocks.
    """

    fixed: float
    linear: float
    square: float
    block: float
    border: float

    def count(self, rows: int, length: int, *, checkpointing: bool, holes: float = 0.0) -> float:
        """Bytes at the moment of a step that takes most.

        Args:
            rows: Blocks at once.
            length: Their tokens.
            checkpointing: Whether all but the borders of decoder blocks are computed again.
            holes: Share of what is kept, or would be, that is lost between.
        """
        kept = self.fixed + rows * length * (self.linear + self.square * length)
        one = kept * self.block  # the block at work: its gradients, too
        if checkpointing:
            return rows * length * self.border / self.block + 2 * one + holes * kept
        return kept + one + holes * kept


@dataclass(frozen=True)
class TrainingSize:
    """How much is computed at once, and of how large blocks.

    Attributes:
        rows: Blocks of a step that this process takes.
        parts: Parts in which it computes them.
        length: T, tokens of a block.
        validation_rows: Blocks of a validation's forward pass.
        checkpointing: Whether activations are computed again.
    """

    rows: int
    parts: int
    length: int
    validation_rows: int
    checkpointing: bool

    @property
    def rows_at_once(self) -> int:
        """Blocks of the largest part."""
        return math.ceil(self.rows / min(self.parts, self.rows))


def count_activations(model: Any, head: Head | None, length: int) -> Activations:
    """Run a few tokens and count what their gradient would need.

    Args:
        model: What is trained, in the dtype in which it computes; nothing of it changes.
        head: Its parts; None where losses are of all logits at once.
        length: T; no more tokens than that are run.
    """
    decoder = model if head is None else head.decoder
    most = max(4, min(length - 1, _PROBE_TOKENS))
    lengths = (most // 4, most // 2, most)
    with evaluating(model):
        kept = [_count_kept(model, decoder, tokens) for tokens in lengths]
    square, linear, fixed = np.polyfit(lengths, kept, 2)
    table = model.get_input_embeddings().weight
    if head is None:
        linear += model.get_output_embeddings().weight.shape[0] * _BYTES_OF_A_LOGIT
    blocks = len(decoder_blocks(model)[1])
    width = int(model.get_output_embeddings().weight.shape[1])
    return Activations(
        fixed=max(fixed, 0.0),
        linear=max(linear, 0.0),
        square=max(square, 0.0),
        block=1 / blocks,
        border=width * table.element_size(),
    )


def _count_kept(model: Any, decoder: Any, tokens: int) -> int:
    """Bytes that a graph keeps beside what the model holds anyway."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    rows = make_probe(model).repeat(1, -(-tokens // make_probe(model).shape[1]))[:, :tokens]
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = decoder(input_ids=rows, use_cache=False)  # alive until all is counted
        del found
    return sum(kept.values())


def estimate_bytes(
    model: Any,
    head: Head | None,
    parameters: Sequence[nn.Parameter],
    activations: Activations,
    size: TrainingSize,
    placement: Placement,
) -> int:
    """Bytes that a training takes beside what is loaded when it starts.

    Args:
        model: What is trained.
        head: Its parts, if it was split.
        parameters: What of it is trained, float32.
        activations: Of `count_activations`.
        size: How much at once.
        placement: Where, and in which dtype.
    """
    trained = sum(parameter.numel() for parameter in parameters)
    state = 4 * _FLOAT32 * trained  # gradients, AdamW's two moments and the best values so far
    weight = model.get_output_embeddings().weight
    packed = 0
    if head is not None and head.readout.is_packed and not weight.requires_grad:
        packed = 2 * weight.numel() * _FLOAT32
    is_cpu = placement.device.type == "cpu"
    step = activations.count(
        size.rows_at_once,
        size.length,
        checkpointing=size.checkpointing,
        holes=_HOLES if is_cpu else 0.0,
    )
    one = activations.count(size.validation_rows, size.length, checkpointing=False)
    logits = size.validation_rows * size.length * len(weight)
    if head is not None:
        logits = count_logits(size.validation_rows, size.length, len(weight))
    validation = one * activations.block + logits * weight.element_size()
    # Beside moments and best values, the values.
    saving = _SAVED_TWICE * 4 * _FLOAT32 * trained if is_cpu else 0
    return int(state + packed + max(step, validation, saving))


def check_training(
    model: Any,
    head: Head | None,
    parameters: Sequence[nn.Parameter],
    size: TrainingSize,
    placement: Placement,
) -> tuple[int, int]:
    """Refuse a training that does not fit, before it starts.

    Args:
        model: What is trained, in the dtype in which it computes.
        head: Its parts, if it was split.
        parameters: What of it is trained.
        size: How much at once.
        placement: Where, and in which dtype.

    Returns:
        Bytes that it needs beside what is loaded, and bytes that are free.

    Raises:
        ComputeError: If it needs more than that; says which options make it fit.
    """
    activations = count_activations(model, head, size.length)

    def estimate(of: TrainingSize) -> int:
        return estimate_bytes(model, head, parameters, activations, of, placement)

    needed, free = estimate(size), find_free_bytes(placement.device)
    options = []
    if not size.checkpointing:
        options.append("--checkpointing")
    if size.rows_at_once > 1:
        options.append(f"--accumulation {size.rows}")
    least = estimate(replace(size, parts=size.rows, checkpointing=True))
    fix = f"With {' '.join(options)} it is about {format_bytes(least)}. " if options else ""
    if least > free or not options:
        shorter = "--dtype bfloat16, " if placement.dtype is torch.float32 else ""
        fix += f"Use {shorter}an adapter of fewer numbers, or a machine with more memory."
    else:
        fix += "Use these, or a smaller --batch."
    check_memory(needed, placement.device, what="Cannot train beside the base", fix=fix)
    return needed, free
