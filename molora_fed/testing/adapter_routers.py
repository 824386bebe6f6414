"""Conformance checks of adapter routers, on made-up states.

`check_adapter_router_conformance(MyRouter)` is the whole test a plugin's adapter router needs; it
proves causality by changing the future.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch
from safetensors.torch import load, save
from torch import Tensor

from molora_fed.bank.views import GateReading, GateView
from molora_fed.errors import PopulationError
from molora_fed.population.contract import AdapterRouter, AdapterRouterOptions
from molora_fed.population.router_probes import build_synthetic_view, find_range_fault
from molora_fed.routing.probes import find_leak, same_views
from molora_fed.testing.findings import CheckResult, examine, refuse_broken

__all__ = [
    "build_synthetic_view",
    "check_adapter_router_conformance",
    "examine_adapter_router",
]

NUM_SLOTS, WIDTH = 4, 8
TOLERANCE = 1e-6


def check_adapter_router_conformance(
    router: type[AdapterRouter], options: AdapterRouterOptions | None = None
) -> None:
    """Check an adapter router class against the whole contract, on made-up states.

    Args:
        router: The class that is registered.
        options: Its options; its defaults if None.

    Raises:
        PluginError: Naming every rule that is broken, with what was found.
    """
    title, page = f"Adapter router '{router.__name__}'", "docs/hooks/adapter-routers.md"
    refuse_broken(title, examine_adapter_router(router, options), page=page)


def examine_adapter_router(
    router: type[AdapterRouter], options: AdapterRouterOptions | None = None
) -> tuple[CheckResult, ...]:
    """What `check_adapter_router_conformance` finds, one result a check.

    Args:
        router: The class that is registered.
        options: Its options; its defaults if None.
    """
    chosen = router.Options() if options is None else options
    reads, known = router.reads(chosen), frozenset(get_args(GateReading))
    if not reads <= known:
        problem = f"expected reads among {sorted(known)}, got {sorted(reads)}"
        return (CheckResult("reads columns that views have", problem),)
    return examine(_CHECKS, _Case(router, chosen, reads))


@dataclass(frozen=True)
class _Case:
    router: type[AdapterRouter]
    options: AdapterRouterOptions
    reads: frozenset[GateReading]

    def build(self, seed: int = 0) -> AdapterRouter:
        """A router whose parameters are far from a start, where slots may be all alike."""
        router = self.build_fresh(seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for values in router.parameters():
                values += 0.5 * torch.randn(values.shape, generator=generator)
        return router

    def build_fresh(self, seed: int = 0) -> AdapterRouter:
        return self.router.build(NUM_SLOTS, WIDTH, self.options, seed)

    @property
    def view(self) -> GateView:
        return build_synthetic_view(self.reads, width=WIDTH)


_Check = Callable[[_Case], str | None]


def _gates_lie_between_0_and_1(case: _Case) -> str | None:
    wanted = (*case.view.document_starts.shape, NUM_SLOTS)
    for router in (case.build_fresh(), case.build()):
        for share in (0.0, 0.5, 1.0):
            router.set_progress(share)
            if (fault := find_range_fault(router(case.view), wanted)) is not None:
                return fault
    return None


def _build_is_deterministic(case: _Case) -> str | None:
    states = []
    with torch.random.fork_rng(devices=[]):
        for other in (0, 991):  # a build that draws from the global generator differs
            torch.manual_seed(other)
            states.append(case.build_fresh(seed=5).state_dict())
    if _same_states(*states):
        return None
    return "expected the same router from the same seed, got another"


def _sees_no_future(case: _Case) -> str | None:
    return find_leak(case.build(), case.view, tolerance=TOLERANCE)


def _starts_over_with_a_document(case: _Case) -> str | None:
    """What was read of a former document must not matter beyond what the states carry."""
    view, router = case.view, case.build()
    half = view.document_starts.shape[1] // 2
    starts = view.document_starts.clone()
    starts[:, half] = True
    columns = {name: getattr(view, name) for name in case.reads}
    alone = GateView(starts[:, half:], **{n: c[:, half:] for n, c in columns.items()})
    if _close(router(GateView(starts, **columns))[:, half:], router(alone)):
        return None
    return "expected gates that forget at a document's start, got others"


def _learns(case: _Case) -> str | None:
    router = case.build()
    trained = [p for p in router.parameters() if p.requires_grad]
    weights = torch.randn((NUM_SLOTS,), generator=torch.Generator().manual_seed(3))
    (router(case.view) * weights).sum().backward()
    finite = all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trained)
    if trained and finite and any(bool(p.grad.any()) for p in trained):
        return None
    return "expected finite gradients for all parameters, not all zero, got others"


def _progress_has_no_history(case: _Case) -> str | None:
    once, back = case.build(), case.build()
    for share in (0.0, 1.0, 0.3):
        back.set_progress(share)
    once.set_progress(0.3)
    if torch.equal(once(case.view), back(case.view)):
        return None
    return "expected gates that depend on the last progress only, got others"


def _survives_saving(case: _Case) -> str | None:
    router = case.build()
    router.set_progress(0.7)
    state = load(save({n: t.detach().contiguous() for n, t in router.state_dict().items()}))
    loaded = case.build_fresh(seed=8)
    loaded.load_state_dict(state)
    if torch.equal(loaded(case.view), router(case.view)):
        return None
    return "expected the same gates after saving and loading, got others"


def _inherits_the_parents_gate(case: _Case) -> str | None:
    router = case.build()
    router.reset_slot(1, 3, seed=0)
    gates = router(case.view)
    if not torch.equal(gates[..., 1], gates[..., 3]):
        return "expected a newborn's gate to be its parent's, got another"
    before = router.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    router.reset_slot(2, 2, seed=0)
    if _same_states(before, router.state_dict()):
        return None
    return "expected a slot that is its own parent to stay, got a change"


def _resets_by_seed(case: _Case) -> str | None:
    states = []
    with torch.random.fork_rng(devices=[]):
        for other in (0, 991):
            torch.manual_seed(other)
            router = case.build()
            router.reset_slot(1, None, seed=5)
            states.append({n: t.clone() for n, t in router.state_dict().items()})
    if not _same_states(*states):
        return "expected the same fresh slot from the same seed, got another"
    if _same_states(states[0], case.build().state_dict()):
        return "expected a fresh slot to differ from the one before, got the same"
    return None


def _refuses_slots_it_lacks(case: _Case) -> str | None:
    for slot, parent in ((NUM_SLOTS, None), (0, NUM_SLOTS), (-1, None)):
        try:
            case.build().reset_slot(slot, parent, seed=0)
        except PopulationError:
            continue
        return f"expected PopulationError for slot {slot} and parent {parent}, got none"
    return None


def _leaves_inputs_alone(case: _Case) -> str | None:
    view, router = case.view, case.build()
    before = {name: tensor.clone() for name, tensor in router.state_dict().items()}
    router(view)
    if same_views(view, case.view) and _same_states(before, router.state_dict()):
        return None
    return "expected view and router as they were after computing gates, got changed"


_CHECKS: tuple[_Check, ...] = (
    _gates_lie_between_0_and_1,
    _build_is_deterministic,
    _sees_no_future,
    _starts_over_with_a_document,
    _learns,
    _progress_has_no_history,
    _survives_saving,
    _inherits_the_parents_gate,
    _resets_by_seed,
    _refuses_slots_it_lacks,
    _leaves_inputs_alone,
)


def _same_states(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def _close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found.float(), expected.float(), rtol=0.0, atol=TOLERANCE)
