"""What a router costs: seconds to fit, seconds a token, and memory beside the bank."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from molora_fed.bank import CalibrationBank
from molora_fed.routing.contract import OutputRouter, RouterOptions
from molora_fed.testing.banks import ALL_READINGS, build_synthetic_bank

__all__ = ["RouterCost", "measure_router"]

REPEATS = 3
SHAPE: dict[str, Any] = {
    "num_experts": 4,
    "blocks_per_domain": 16,
    "block_size": 128,
    "hidden_size": 64,
}
"""Of the made-up bank: small, and large enough that fitting takes longer than starting."""


@dataclass(frozen=True)
class RouterCost:
    """What a router costs on one bank and one machine.

    Attributes:
        fit_seconds: To fit it, the fastest of a few times.
        token_seconds: A token while generating one text, the fastest of a few times; of a router
            that cannot generate, a token of whole blocks.
        peak_bytes: Largest memory that tensors took at once while it was fitted, without the bank.
    """

    fit_seconds: float
    token_seconds: float
    peak_bytes: int

    def relative_to(self, other: "RouterCost") -> dict[str, float]:
        """Each figure by its name as a multiple of another router's, of the same bank."""
        own, others = vars(self), vars(other)
        return {name: own[name] / max(others[name], 1e-9) for name in own}


class _Memory(TorchDispatchMode):
    """Counts the bytes of tensors that are made while it is on, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._living = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor) and _key(leaf) not in given:
                storage = leaf.untyped_storage()
                self._living[storage] = storage.nbytes()
        self.peak = max(self.peak, sum(self._living.values()))
        return found


def _key(tensor: Tensor) -> int:
    storage: UntypedStorage = tensor.untyped_storage()
    return storage._cdata


def measure_router(
    router: type[OutputRouter],
    options: RouterOptions | None = None,
    *,
    bank: CalibrationBank | None = None,
) -> RouterCost:
    """Measure a router on a bank.

    Figures of one process on one bank can be compared with each other, and with nothing else: see
    `RouterCost.relative_to`.

    Args:
        router: The class that is registered.
        options: Its options; its defaults if None.
        bank: Fitted on; a made-up one of 64 blocks if None.

    Raises:
        RoutingError: If it cannot be fitted.
    """
    chosen = router.Options() if options is None else options
    if bank is None:
        readings = router.reads(chosen) & ALL_READINGS
        bank = build_synthetic_bank(**SHAPE, readings=readings)
    used = bank
    with _Memory() as memory:
        fitted = router.fit(used, chosen, 0)
    # A bank keeps what routers derive from it: the fit above was the slow first one.
    return RouterCost(
        fit_seconds=_time(lambda: router.fit(used, chosen, 0)),
        token_seconds=_time(lambda: _generate(fitted, used)) / used.block_size,
        peak_bytes=memory.peak,
    )


def _time(work: Callable[[], Any]) -> float:
    """Seconds of the fastest of a few times."""
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)


@torch.no_grad()
def _generate(router: OutputRouter, bank: CalibrationBank) -> None:
    """Go through one block as decoding does, a token at a time."""
    view = bank.view(slice(0, 1))
    if not router.causal:
        router.gates(view)
        return
    state = router.init_state(1)
    for now in range(bank.block_size):
        _, state = router.step(view.at(now, now + 1), state)
