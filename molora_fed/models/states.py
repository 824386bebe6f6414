"""States inside a model while it runs: kept from a pass, or put in place of its first blocks."""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from molora_fed.errors import RoutingError
from molora_fed.models.layout import decoder_blocks

__all__ = [
    "Capture",
    "can_reset",
    "can_resume",
    "capture_states",
    "compute_positions",
    "evaluating",
    "make_probe",
    "resuming",
]

_PROBE_TOKENS = 16


@dataclass(frozen=True)
class Capture:
    """Which hidden states a pass keeps beside the log-probabilities.

    Attributes:
        hidden: Keep the state that enters the output head.
        prefix_depth: Keep the state that enters decoder block `prefix_depth`; None keeps none.
    """

    hidden: bool = False
    prefix_depth: int | None = None


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
    _, blocks = decoder_blocks(model)
    if not 0 <= depth < len(blocks):
        raise RoutingError(
            f"Cannot read prefix states of '{type(model).__name__}': expected a frozen depth "
            f"below its {len(blocks)} blocks, got {depth}. Lower the frozen depth."
        )
    return blocks[depth]


@contextmanager
def resuming(model: Any, depth: int, states: Tensor) -> Iterator[None]:
    """Run a model from block `depth` on: what the blocks before it would give is known.

    Args:
        model: A causal language model of which `can_resume` holds.
        depth: Index of the first block that computes, at least 1.
        states: What enters it, (B, T, D), for the very tokens that the model is given.
    """
    skipped = _list_blocks(model)[:depth]
    try:
        for block in skipped[:-1]:
            block.forward = _keep_states
        skipped[-1].forward = lambda hidden, *_, **__: states.to(hidden)
        yield
    finally:
        for block in skipped:
            block.__dict__.pop("forward", None)


def _keep_states(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden


@torch.no_grad()
def can_resume(model: Any, depth: int) -> bool:
    """Whether a model that begins at block `depth` gives the same logits; found by trying it.

    Not so where later blocks use more of earlier ones than the last one's output.

    Args:
        model: A causal language model.
        depth: Index of the first block that would compute.
    """
    if depth < 1:
        return False
    rows = make_probe(model)
    with evaluating(model), capture_states(model, Capture(prefix_depth=depth)) as states:
        whole = model(input_ids=rows, use_cache=False).logits
    try:
        with evaluating(model), resuming(model, depth, states["prefix"]):
            return torch.equal(model(input_ids=rows, use_cache=False).logits, whole)
    except Exception:  # blocks that return something else break the model around them
        return False


def compute_positions(starts: Tensor) -> Tensor:
    """Positions that begin at 0 wherever a document does.

    Given these and no mask, transformers has every token attend to its own document alone.

    Args:
        starts: True at the first token of each document, (B, T) bool; at 0 it counts as one.

    Returns:
        Tokens since the last start, (B, T) int64.
    """
    places = torch.arange(starts.shape[1], device=starts.device).expand(starts.shape)
    return places - torch.where(starts, places, 0).cummax(dim=1).values


@torch.no_grad()
def can_reset(model: Any) -> bool:
    """Whether a model keeps documents of one block apart by their positions; found by trying it.

    Not so where anything but attention carries state from token to token, or where positions
    cannot be given.

    Args:
        model: A causal language model; in the dtype in which it computes.
    """
    rows = make_probe(model)
    first = rows.shape[1] // 3
    starts = torch.zeros_like(rows, dtype=torch.bool)
    starts[:, first] = True
    with evaluating(model):
        together = model(input_ids=rows, use_cache=False).logits[:, first:]
        dtype, together = together.dtype, together.float()
        alone = model(input_ids=rows[:, first:], use_cache=False).logits.float()
        try:
            found = model(
                input_ids=rows, position_ids=compute_positions(starts), use_cache=False
            ).logits[:, first:]
        except (TypeError, ValueError):  # it takes no positions
            return False
    # Of the first document's effect on the second, rounding alone may be left.
    bound = 1e-3 if dtype in (torch.float32, torch.float64) else 0.05
    return bool((found.float() - alone).norm() <= bound * (together - alone).norm())


def make_probe(model: Any) -> Tensor:
    """Token ids (1, 16) to compare numbers on."""
    table = model.get_input_embeddings().weight
    return (torch.arange(_PROBE_TOKENS, device=table.device) * 7919 % len(table))[None]


def _list_blocks(model: Any) -> list[nn.Module]:
    return list(decoder_blocks(model)[1])
