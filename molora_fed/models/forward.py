"""The one forward pass that every loss, bank column and reported figure comes from."""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from molora_fed.errors import RoutingError, ShapeError
from molora_fed.types import Progress

__all__ = [
    "Capture",
    "Pass",
    "capture_states",
    "compute_block_losses",
    "evaluating",
    "run_blocks",
]


@dataclass(frozen=True)
class Capture:
    """Which hidden states a pass keeps beside the log-probabilities.

    Attributes:
        hidden: Keep the state that enters the output head.
        prefix_depth: Keep the state that enters decoder block `prefix_depth`; None keeps none.
    """

    hidden: bool = False
    prefix_depth: int | None = None


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


def run_blocks(
    model: Any,
    tokens: NDArray[np.int32] | Tensor,
    *,
    batch: int = 16,
    capture: Capture | None = None,
    progress: Progress | None = None,
) -> Iterator[Pass]:
    """Run a causal language model over blocks, without gradients and in evaluation mode.

    Train mode, `requires_grad` and hooks are as before whenever the iterator is not running.

    Args:
        model: Any Hugging Face causal language model.
        tokens: Token ids, (N, T), integer.
        batch: Blocks per forward pass; one value wherever figures are compared.
        capture: Hidden states to keep.
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
    for start in range(0, len(ids), batch):
        rows = ids[start : start + batch].to(device=device, dtype=torch.long)
        with torch.inference_mode(), evaluating(model), capture_states(model, kept) as states:
            logits = model(input_ids=rows, use_cache=False).logits
            logprob = _target_logprob(logits, rows)
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


def _target_logprob(logits: Tensor, rows: Tensor) -> Tensor:
    """Log-probability of each token given those before it, (B, T) float32; 0 at t = 0."""
    logprob = torch.zeros(rows.shape, dtype=torch.float32, device=logits.device)
    # One row at a time: the float32 copy over the vocabulary is then (T, V), not (B, T, V).
    for row, target, out in zip(logits, rows, logprob, strict=True):
        out[1:] = -nn.functional.cross_entropy(row[:-1].float(), target[1:], reduction="none")
    return logprob


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; each module's own mode is restored after."""
    training = [module for module in model.modules() if module.training]
    if not training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def capture_states(model: Any, capture: Capture) -> Iterator[dict[str, Tensor]]:
    """Collect the states asked for while the model runs; hooks are gone after."""
    states: dict[str, Tensor] = {}
    with contextlib.ExitStack() as stack:
        if capture.hidden:
            stack.callback(_keep_input(_output_head(model), "hidden", states).remove)
        if capture.prefix_depth is not None:
            block = _decoder_block(model, capture.prefix_depth)
            stack.callback(_keep_input(block, "prefix", states).remove)
        yield states


def _keep_input(module: nn.Module, name: str, states: dict[str, Tensor]) -> Any:
    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states[name] = args[0] if args else kwargs["hidden_states"]

    return module.register_forward_pre_hook(keep, with_kwargs=True)


def _output_head(model: Any) -> nn.Module:
    head = model.get_output_embeddings()
    if head is None:
        raise RoutingError(
            f"Cannot read hidden states of '{type(model).__name__}': expected an output head, "
            "got none. Use a causal language model."
        )
    return head


def _decoder_block(model: Any, depth: int) -> nn.Module:
    from molora_fed.models.layout import decoder_blocks

    _, blocks = decoder_blocks(model)
    if not 0 <= depth < len(blocks):
        raise RoutingError(
            f"Cannot read prefix states of '{type(model).__name__}': expected a frozen depth "
            f"below its {len(blocks)} blocks, got {depth}. Lower the frozen depth."
        )
    return blocks[depth]


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
