"""The one forward pass that every loss, bank column and reported figure comes from."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from molora_fed.errors import ShapeError
from molora_fed.models.head import Head, find_head
from molora_fed.models.states import Capture, capture_states, evaluating, resuming
from molora_fed.types import Progress

__all__ = [
    "LOGITS_AT_ONCE",
    "Pass",
    "Resume",
    "compute_block_losses",
    "count_logits",
    "run_blocks",
]

LOGITS_AT_ONCE = 2**26  # logits of whole blocks held at once
_ROWS_AT_ONCE = 8  # of a processor: what becomes of their logits stays in a core's cache


@dataclass(frozen=True)
class Pass:
    """What one batch of blocks gave.

    Attributes:
        start: Index of the batch's first block.
        logprob: `log p(x_t | x_<t)` in nats, (B, T) float32 on the model's device; 0 at t = 0.
        hidden: State that enters the output head, (B, T, D), or None.
        prefix: State that enters decoder block `prefix_depth`, (B, T, D), or None.
    """

    start: int
    logprob: Tensor
    hidden: Tensor | None
    prefix: Tensor | None


@dataclass(frozen=True)
class Resume:
    """Frozen blocks that were run before.

    Attributes:
        depth: Index of the first block that computes.
        read: States that entered it, (B, T, D), for blocks `start` to `stop` of the tokens.
    """

    depth: int
    read: Callable[[int, int], Tensor]


def run_blocks(
    model: Any,
    tokens: NDArray[np.int32] | Tensor,
    *,
    batch: int = 16,
    capture: Capture | None = None,
    resume: Resume | None = None,
    progress: Progress | None = None,
) -> Iterator[Pass]:
    """Run a causal language model over blocks, without gradients and in evaluation mode.

    Train mode, `requires_grad` and hooks are as before whenever the iterator is not running.

    Args:
        model: Any Hugging Face causal language model.
        tokens: Token ids, (N, T), integer.
        batch: Blocks per forward pass; one value wherever figures are compared.
        capture: Hidden states to keep.
        resume: Blocks not to run again; only where `can_resume` holds.
        progress: Receives blocks done and blocks in all.

    Yields:
        One `Pass` per batch, in order.

    Raises:
        ShapeError: If `tokens` is not (N, T >= 2) or holds an id outside the vocabulary.
        RoutingError: If the state asked for does not exist in this model.
    """
    kept = capture or Capture()
    ids = torch.as_tensor(tokens)
    _check_tokens(model, ids)
    device = next(model.parameters()).device
    head = find_head(model)
    for start in range(0, len(ids), batch):
        rows = ids[start : start + batch].to(device=device, dtype=torch.long)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(evaluating(model))
            if resume is not None:
                given = resume.read(start, start + len(rows)).to(device)
                stack.enter_context(resuming(model, resume.depth, given))
            if head is None:
                states = stack.enter_context(capture_states(model, kept))
                logits = model(input_ids=rows, use_cache=False).logits
                logprob = _target_logprob(logits, rows)
            else:
                # The decoder's output is what enters the head.
                only_prefix = Capture(prefix_depth=kept.prefix_depth)
                states = stack.enter_context(capture_states(model, only_prefix))
                hidden = head.decoder(input_ids=rows, use_cache=False).last_hidden_state
                logprob = _read_logprob(head, hidden, rows)
                if kept.hidden:
                    states["hidden"] = hidden
        yield Pass(start, logprob, states.get("hidden"), states.get("prefix"))
        if progress is not None:
            progress(min(start + batch, len(ids)), len(ids))


def _check_tokens(model: Any, ids: Tensor) -> None:
    if ids.ndim != 2 or ids.shape[1] < 2:
        raise ShapeError(
            f"Cannot run blocks: expected token ids of shape (N, T) with T >= 2, "
            f"got {tuple(ids.shape)}. Prepare the corpus again."
        )
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < vocabulary):
        raise ShapeError(
            f"Cannot run blocks: expected token ids from 0 to {vocabulary - 1}, got "
            f"{int(ids.min())} to {int(ids.max())}. Tokenize with the base's own tokenizer."
        )


def count_logits(rows: int, length: int, vocabulary: int) -> int:
    """Logits that exist at once while the losses of blocks are read from a head.

    Args:
        rows: Blocks of a forward pass.
        length: T.
        vocabulary: V.
    """
    return min(rows, max(1, LOGITS_AT_ONCE // (length * vocabulary))) * length * vocabulary


def _read_logprob(head: Head, hidden: Tensor, rows: Tensor) -> Tensor:
    """As `_target_logprob`, of states (B, T, D) and some blocks' logits at a time."""
    size = rows.shape[1] * len(head.readout.weight)
    count = max(1, LOGITS_AT_ONCE // size)
    parts = zip(hidden.split(count), rows.split(count), strict=True)
    return torch.cat([_target_logprob(head.compute_logits(part), own) for part, own in parts])


def _target_logprob(logits: Tensor, rows: Tensor) -> Tensor:
    """Log-probability of each token given those before it, (B, T) float32; 0 at t = 0."""
    logprob = torch.zeros(rows.shape, dtype=torch.float32, device=logits.device)
    count = _ROWS_AT_ONCE if logits.device.type == "cpu" else rows.shape[1]
    for row, target, out in zip(logits, rows, logprob, strict=True):
        parts = zip(row[:-1].split(count), target[1:].split(count), strict=True)
        out[1:] = torch.cat([_log_softmax_at(part, own) for part, own in parts])
    return logprob


def _log_softmax_at(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities of targets (R,) under logits (R, V)."""
    if logits.dtype is torch.float32 or logits.device.type != "cpu":
        return -nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    # Of shorter logits there is a float32 copy to write over: no second one is made.
    values = logits.float()
    torch.log_softmax(values, -1, out=values)
    return values.gather(1, targets[:, None]).squeeze(1)


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
    steps = run_blocks(model, tokens, batch=batch, progress=progress)
    rows = [-step.logprob[:, 1:].cpu() for step in steps]
    if not rows:
        return torch.zeros((0, tokens.shape[1] - 1))
    return torch.cat(rows)
