"""Probes of routers: whether gates are what their contract says, asked of the gates alone.

Fusing and evolving ask before they publish anything, and the conformance checks of
`molora_fed.testing` ask on made-up numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from molora_fed.bank.views import RouterView
    from molora_fed.routing.contract import OutputRouter

__all__ = [
    "change_future",
    "columns_of",
    "find_distribution_fault",
    "find_leak",
    "find_step_fault",
    "same_views",
    "step_through",
    "take_rows",
]

View = TypeVar("View")

_SUM_TOLERANCE = 1e-3
_SUM_TOLERANCE_16_BIT = 2e-2  # 256 numbers to a power of two
_STEP_TOLERANCE = 1e-2
_MAY_DIFFER = 0.02  # of the positions: where two experts tie, rounding decides for one of them


def columns_of(view: Any) -> dict[str, Tensor]:
    """The columns a view has, by name."""
    columns = {f.name: getattr(view, f.name) for f in fields(view)}
    return {name: column for name, column in columns.items() if column is not None}


def take_rows(view: View, index: Tensor) -> View:
    """The view of some of its texts, in the order of `index`."""
    return type(view)(**{name: column[index] for name, column in columns_of(view).items()})


def same_views(one: Any, other: Any) -> bool:
    """Whether two views hold the same numbers."""
    first, second = columns_of(one), columns_of(other)
    return all(torch.equal(first[name], second[name]) for name in first)


def change_future(view: View, now: int) -> View:
    """The view with everything after position `now` replaced; it shares no memory."""
    changed = {}
    for name, column in columns_of(view).items():
        future = column[:, now + 1 :]
        other = ~future if future.dtype == torch.bool else future.flip(0) * -2 + 1
        changed[name] = torch.cat([column[:, : now + 1], other], dim=1)
    return type(view)(**changed)


def find_distribution_fault(gates: Any, shape: Sequence[int]) -> str | None:
    """Describe why gates are no distribution over experts, or return None.

    Args:
        gates: What a router gave.
        shape: (B, T, E) that they must have: finite, non-negative, summing to 1 over E.
    """
    if not isinstance(gates, Tensor) or not gates.is_floating_point():
        return f"expected gates as a tensor of floats, got {_describe(gates)}"
    if tuple(gates.shape) != tuple(shape):
        return f"expected gates of shape {tuple(shape)}, got {tuple(gates.shape)}"
    values = gates.detach().float()
    if not bool(values.isfinite().all()):
        return "expected finite gates, got NaN or infinity"
    if bool((values < 0).any()):
        return f"expected gates that are not negative, got {float(values.min()):.4g}"
    sums = values.sum(-1)
    is_short = gates.dtype in (torch.float16, torch.bfloat16)
    if bool(((sums - 1).abs() > (_SUM_TOLERANCE_16_BIT if is_short else _SUM_TOLERANCE)).any()):
        return (
            "expected gates that sum to 1 over the experts, got sums from "
            f"{float(sums.min()):.4g} to {float(sums.max()):.4g}"
        )
    return None


def find_leak(
    compute_gates: Callable[[Any], Tensor], view: Any, *, tolerance: float = 1e-5
) -> str | None:
    """Describe where gates depend on what comes after them, or return None.

    Args:
        compute_gates: Gates (B, T, ...) of a view.
        view: Texts of two tokens at least; it stays as it is.
        tolerance: Largest difference that is taken for rounding.
    """
    length = view.document_starts.shape[1]
    full = compute_gates(view)
    for now in sorted({0, min(1, length - 2), length // 2, length - 2}):
        if now < 0:
            continue
        changed = compute_gates(change_future(view, now))[:, : now + 1]
        if not torch.allclose(changed.float(), full[:, : now + 1].float(), rtol=0, atol=tolerance):
            return f"expected gates at position {now} to ignore later ones, got others"
    return None


def step_through(
    router: "OutputRouter", view: "RouterView", pieces: Sequence[int] = (1, 1, 2, 5)
) -> Tensor:
    """Gates (B, T, E) computed as decoding does: a piece of tokens at a time, the rest at last."""
    batch, length = view.document_starts.shape
    state = router.init_state(batch)
    gates, start = [], 0
    for piece in (*pieces, length):
        stop = min(start + piece, length)
        if stop > start:
            part, state = router.step(view.at(start, stop), state)
            gates.append(part)
        start = stop
    return torch.cat(gates, dim=1)


def find_step_fault(router: "OutputRouter", view: "RouterView") -> str | None:
    """Describe how decoding differs from the full form, or return None.

    Args:
        router: A causal router.
        view: Texts to compare on.
    """
    full, found = router.gates(view), step_through(router, view)
    if found.shape != full.shape:
        return f"expected step to give gates of shape {tuple(full.shape)}, got {tuple(found.shape)}"
    differs = ((found.float() - full.float()).abs().amax(-1) > _STEP_TOLERANCE).float().mean()
    if float(differs) <= _MAY_DIFFER:
        return None
    return (
        "expected step to give the gates of the full form, got others at "
        f"{100 * float(differs):.0f} % of the tokens"
    )


def _describe(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
