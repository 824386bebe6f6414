"""Probes of an adapter router on made-up states, before it trains and before it is published."""

import copy
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from molora_fed.bank.views import GateReading, GateView
from molora_fed.guard import guarded, refuse
from molora_fed.routing.probes import find_leak

if TYPE_CHECKING:
    from molora_fed.plugins import Entry
    from molora_fed.population.contract import AdapterRouter

__all__ = ["build_synthetic_view", "check_built", "check_trained", "find_range_fault"]

_BLOCKS, _LENGTH = 3, 12


def build_synthetic_view(
    readings: frozenset[GateReading] = frozenset(get_args(GateReading)),
    *,
    batch: int = _BLOCKS,
    length: int = _LENGTH,
    width: int = 8,
    seed: int = 0,
) -> GateView:
    """Make up a view of packed texts, some of several documents.

    Args:
        readings: Columns the view has.
        batch: B.
        length: T.
        width: D.
        seed: Of all numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    starts = torch.rand((batch, length), generator=generator) < 0.2
    starts[:, 0] = True
    states = {
        name: torch.randn((batch, length, width), generator=generator)
        for name in sorted(get_args(GateReading))
    }
    return GateView(starts, **{name: states[name] for name in readings})


def find_range_fault(gates: Any, shape: tuple[int, ...]) -> str | None:
    """Describe why gates are none of slots, or return None.

    Args:
        gates: What an adapter router gave.
        shape: (B, T, P) that they must have, each finite and in [0, 1].
    """
    if not isinstance(gates, Tensor):
        return f"expected gates as a tensor, got {type(gates).__name__}"
    if tuple(gates.shape) != shape:
        return f"expected gates of shape {shape}, got {tuple(gates.shape)}"
    if not bool(((gates >= 0) & (gates <= 1)).all()):
        return "expected finite gates between 0 and 1, got others"
    return None


def check_trained(entry: "Entry", router: "AdapterRouter") -> None:
    """Ask a router for gates of made-up states; the router stays as it is.

    Raises:
        PluginError: If gates are out of range, or depend on later tokens.
    """
    probed = copy.deepcopy(router).cpu().eval()
    with guarded(entry, "gates"), torch.no_grad():
        view = _view_of(probed)
        shape = (*view.document_starts.shape, probed.num_slots)
        fault = find_range_fault(probed(view), shape) or find_leak(probed, view)
    _refuse(entry, "gates", fault)


def check_built(entry: "Entry", router: "AdapterRouter") -> None:
    """Ask a fresh router, and one with other parameters, all that an evolution rests on.

    Raises:
        PluginError: If gates are out of range or depend on later tokens, nothing can be learned, or
            a newborn does not get its parent's gate.
    """
    check_trained(entry, router)
    moved = copy.deepcopy(router)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for values in moved.parameters():  # at its start a router may gate all slots alike
            values += 0.5 * torch.randn(values.shape, generator=generator).to(values)
    check_trained(entry, moved)
    with guarded(entry, "training"):
        fault = _find_learning_fault(copy.deepcopy(moved).cpu())
    _refuse(entry, "training", fault)
    if router.num_slots > 1:
        with guarded(entry, "reset_slot"), torch.no_grad():
            fault = _find_birth_fault(copy.deepcopy(moved).cpu().eval())
        _refuse(entry, "reset_slot", fault)


def _view_of(router: "AdapterRouter") -> GateView:
    readings = frozenset(type(router).reads(router.options))
    return build_synthetic_view(readings, width=router.width)


def _find_learning_fault(router: "AdapterRouter") -> str | None:
    gates = router(_view_of(router))
    weights = torch.arange(1.0, router.num_slots + 1)
    if not gates.requires_grad:
        return "expected gates with a gradient in the router's parameters, got none"
    (gates * weights).sum().backward()
    gradients = [p.grad for p in router.parameters() if p.requires_grad and p.grad is not None]
    if gradients and all(bool(g.isfinite().all()) for g in gradients):
        return None
    return "expected finite gradients of its parameters, got others"


def _find_birth_fault(router: "AdapterRouter") -> str | None:
    view = _view_of(router)
    router.reset_slot(0, 1, seed=0)
    gates = router(view)
    if torch.allclose(gates[..., 0], gates[..., 1], rtol=0, atol=1e-5):
        return None
    return "expected a newborn's gate to be its parent's, got another"


def _refuse(entry: "Entry", place: str, fault: str | None) -> None:
    if fault is not None:
        expected, _, got = fault.removeprefix("expected ").rpartition(", got ")
        raise refuse(entry, place, expected=expected, got=got)
