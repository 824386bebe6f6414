"""Plugins in a fusion: each is run under the guard, and what it gives is checked.

A router or merge that is only compared becomes a row "failed: ..." and takes nothing away from the
others; the published router's failure ends the fusion in one line.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from molora_fed.adapters.updates import Adapter
from molora_fed.bank import Bank, CalibrationBank, HeldOutBank
from molora_fed.errors import MoloraError, StorageError
from molora_fed.evaluation.evaluate import Evaluation, evaluate
from molora_fed.forecasting.records import FAILED
from molora_fed.fusion.collapse import GuardedRouter
from molora_fed.fusion.plan import FusionPlan
from molora_fed.guard import guarded, refuse
from molora_fed.options import Choice, open_choice
from molora_fed.plugins import Entry
from molora_fed.routing.contract import OutputRouter
from molora_fed.routing.probes import find_leak, find_step_fault
from molora_fed.routing.top_k import TopKRouter
from molora_fed.types import Progress

__all__ = [
    "NotMeasured",
    "evaluate_routers",
    "find_changes",
    "fit_watched",
    "label_merge",
    "measure_merges",
]

PROBED_BLOCKS = 2


@dataclass
class NotMeasured:
    """What a fusion has no figures for, and why.

    Attributes:
        reasons: By kind and key, see `Choice`; one line each, "failed: ..." where a plugin failed.
    """

    reasons: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, kind: str, name: str, why: str) -> None:
        """Note why there is nothing."""
        self.reasons.setdefault(kind, {})[name] = why

    @contextmanager
    def skipping(self, kind: str, name: str, *, unless: bool = False) -> Iterator[None]:
        """Turn a failure into a reason; a full disk stays an error.

        Args:
            kind: E.g. "router".
            name: Its key.
            unless: Whether the failure ends the run all the same.
        """
        try:
            yield
        except StorageError:
            raise
        except MoloraError as error:
            if unless:
                raise
            self.add(kind, name, f"{FAILED}{error}")


@contextmanager
def watch_bank(entry: Entry, bank: Bank, place: str) -> Iterator[None]:
    """Run a router's code under the guard, and see that it leaves the bank as it was.

    Raises:
        PluginError: If it fails, or changes a column.
    """
    before = bank.stamp()
    try:
        with guarded(entry, place):
            yield
    finally:  # a change may be why it failed, so it is what is told
        changed = sorted(find_changes(before, bank))
        if changed:
            raise refuse(
                entry,
                place,
                expected="a bank that stays as it was (change copies: `.clone()`)",
                got=f"changes of {', '.join(changed)}",
            )


def find_changes(before: Mapping[str, tuple[int, ...]], bank: Bank) -> list[str]:
    """Columns of a bank that were changed since a stamp was taken."""
    now = bank.stamp()
    return [name for name, stamp in before.items() if now.get(name) != stamp]


def check_fitted(entry: Entry, router: OutputRouter, bank: CalibrationBank) -> None:
    """Ask a fitted router, before anything is published, what only its author could promise.

    A router that is declared not to be causal is not asked: it cannot generate.

    Raises:
        PluginError: If gates depend on later tokens, or decoding gives others than the full form.
    """
    if not router.causal:
        return
    view = bank.view(slice(0, PROBED_BLOCKS))
    # Where two gates tie, rounding decides which are the k largest: the gates below are compared.
    plain = router.inner if isinstance(router, TopKRouter) else router
    with watch_bank(entry, bank, "gates"):
        fault = find_leak(router.gates, view)
    if fault is None:
        with watch_bank(entry, bank, "step"):
            fault = find_step_fault(plain, view)
    if fault is not None:
        expected, _, got = fault.removeprefix("expected ").rpartition(", got ")
        raise refuse(entry, "gates", expected=expected, got=got)


def evaluate_routers(
    open_bank: Callable[[], HeldOutBank],
    plan: FusionPlan,
    routers: Mapping[str, OutputRouter],
    needed: frozenset[str],
    baselines: Mapping[str, Tensor],
    missing: NotMeasured,
    *,
    seed: int,
    progress: Progress | None,
) -> Evaluation:
    """Evaluate on held-out blocks; without a compared router that fails there.

    Args:
        open_bank: Opens the held-out bank; again, after a router changed what it was handed.
        plan: The fusion's plan.
        routers: Fitted routers by key.
        needed: Routers whose failure ends the fusion.
        baselines: Losses of models that are no experts.
        missing: Receives the routers that fail.
        seed: Of the bootstrap.
        progress: Receives routers done and in all.

    Raises:
        PluginError: If a needed router fails.
    """
    left = dict(routers)
    while True:
        bank, running = open_bank(), ""

        @contextmanager
        def watch(name: str, bank: HeldOutBank = bank) -> Iterator[None]:
            nonlocal running
            running = name
            with watch_bank(plan.router_entry(name), bank, "evaluation"):
                yield

        evaluation: Evaluation | None = None
        try:
            evaluation = evaluate(bank, left, baselines, seed=seed, progress=progress, watch=watch)
        except MoloraError as error:
            if running not in left or running in needed or isinstance(error, StorageError):
                raise
            missing.add("router", running, f"{FAILED}{error}")
            del left[running]
        if evaluation is not None:
            return evaluation


def label_merge(choice: Choice) -> str:
    """A merge's name in reports."""
    return "weight_average" if choice.key == choice.name == "average" else choice.key


def measure_merges(
    plan: FusionPlan,
    bank: HeldOutBank,
    merges: Sequence[Choice],
    missing: NotMeasured,
    *,
    seed: int,
) -> dict[str, Tensor]:
    """Losses (N, T-1) of merges by their name in reports; each gets adapters of its own.

    Args:
        plan: The fusion's plan.
        bank: Held-out bank.
        merges: Which merges.
        missing: Receives the merges that fail.
        seed: Of merges that draw.
    """
    found: dict[str, Tensor] = {}
    registry = plan.plugins.merges
    for choice in merges:
        entry, key = registry.entry(choice.name), choice.key
        with missing.skipping("merge", key), guarded(entry, "merging"):
            specialists = [adapter for adapter in plan.load_adapters() if adapter is not None]
            shapes = {m: u.shape for a in specialists for m, u in a.updates.items()}
            merge = open_choice(registry, choice, key="fusion.merges")
            merged = merge(specialists, name=key, seed=seed)
            fault = _find_merge_fault(merged, shapes)
            if fault is not None:
                raise refuse(entry, "merging", expected=fault[0], got=fault[1])
            found[label_merge(choice)] = bank.add_column(key, merged)
    return found


def _find_merge_fault(merged: Any, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, str] | None:
    """What a merge should have given and what it gave, or None."""
    if not isinstance(merged, Adapter):
        return "an Adapter", type(merged).__name__
    for module, update in merged.updates.items():
        if module not in shapes:
            return "updates of modules that an adapter changes", module
        if tuple(update.shape) != tuple(shapes[module]):
            return f"an update {tuple(shapes[module])} of {module}", str(tuple(update.shape))
        if not all(bool(tensor.isfinite().all()) for tensor in update.tensors().values()):
            return f"a finite update of {module}", "NaN or infinity"
    return None


def fit_watched(
    entry: Entry, bank: CalibrationBank, fit: Callable[[], GuardedRouter[Any]]
) -> GuardedRouter[Any]:
    """Fit a router under the guard and probe it.

    Raises:
        PluginError: If it fails, changes the bank, or breaks its contract.
    """
    with watch_bank(entry, bank, "fit"):
        found = fit()
    check_fitted(entry, found.router, bank)
    return found
