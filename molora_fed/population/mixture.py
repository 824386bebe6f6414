"""All slots of a population inside a base model's layers, in one pass.

`y = W x + sum_i g_i s_i B_i (A_i x)`: the slots' factors lie one after the other along the rank,
so that a layer takes two products for all of them, whatever their number and ranks.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from molora_fed.adapters.updates import LinearUpdate
from molora_fed.errors import PopulationError
from molora_fed.models.layout import weight_of
from molora_fed.population.contract import Population, Slot
from molora_fed.population.slots import check_population

__all__ = ["Mixture"]


@dataclass(frozen=True)
class _Part:
    """Where one slot's factors of a layer lie: ranks `start` to `stop`."""

    slot: int
    start: int
    stop: int
    scale: float


class _Factors(nn.Module):
    """Factors of all slots that change one layer, slot after slot.

    Attributes:
        a: (R_all, D_in) float32, trainable.
        b: (D_out, R_all) float32, trainable.
        slot_of_rank: Index of each rank's slot, (R_all,) int64.
        scale_of_rank: Scale of each rank's slot, (R_all,) float32.
    """

    slot_of_rank: Tensor
    scale_of_rank: Tensor

    def __init__(self, updates: list[tuple[int, LinearUpdate]], device: torch.device) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": torch.float32}
        chosen: list[Any] = [update for _, update in updates]
        self.a = nn.Parameter(torch.cat([u.a.detach().to(**place) for u in chosen]))
        self.b = nn.Parameter(torch.cat([u.b.detach().to(**place) for u in chosen], dim=1))
        self.parts: list[_Part] = []
        start = 0
        for slot, update in updates:
            stop = start + (update.rank or 0)
            self.parts.append(_Part(slot, start, stop, update.scale))
            start = stop
        ranks = [part.stop - part.start for part in self.parts]
        slots = [part.slot for part in self.parts for _ in range(part.stop - part.start)]
        scales = torch.tensor([update.scale for update in chosen], dtype=torch.float32)
        scale_of_rank = scales.repeat_interleave(torch.tensor(ranks)).to(device)
        self.register_buffer("slot_of_rank", torch.tensor(slots, device=device))
        self.register_buffer("scale_of_rank", scale_of_rank)

    def read(self, slot: int) -> LinearUpdate | None:
        """The update of one slot as it is now, on the CPU; None if it changes nothing here."""
        for part in self.parts:
            if part.slot == slot:
                a = self.a.detach()[part.start : part.stop]
                b = self.b.detach()[:, part.start : part.stop]
                return LinearUpdate(a=a.cpu().clone(), b=b.cpu().clone(), scale=part.scale)
        return None


class Mixture(nn.Module):
    """A population's factors as trainable parameters, added to a base model while in use.

    The model is not part of this module: `parameters()` are the slots' factors alone, in float32,
    and the model's weights, `requires_grad` and train mode are never touched.

    Example:
        mixture = Mixture(base.model, population)
        with mixture.mixed(gates):  # (B, T, P)
            logits = base.model(input_ids=tokens).logits

    Attributes:
        num_slots: P.
        names: Full names of the layers that at least one slot changes, in the model's order.
        layers: Their factors, in the same order.
    """

    def __init__(self, model: Any, population: Population) -> None:
        """Lay the slots' factors out; memory is that of the factors.

        Args:
            model: The base model, as loaded.
            population: Low-rank slots that fit it.

        Raises:
            PopulationError: If the population has no slot, or one that is not low-rank, has rank
                0, holds NaN or infinity, or does not fit the model.
        """
        super().__init__()
        check_population(population, model)
        self.num_slots = population.num_slots
        changed = {name for slot in population.slots for name in slot.updates}
        # In a list, so that the base does not become a part of this module.
        self._targets = [(n, m) for n, m in model.named_modules() if n in changed]
        self.names = tuple(name for name, _ in self._targets)
        self.layers = nn.ModuleList(
            _Factors(
                [
                    (index, slot.updates[name])
                    for index, slot in enumerate(population.slots)
                    if name in slot.updates
                ],
                weight_of(module).device,
            )
            for name, module in self._targets
        )
        # Layers laid out alike, mostly all of them, share their expanded gates.
        layouts: dict[tuple[_Part, ...], int] = {}
        self._layouts = [layouts.setdefault(tuple(f.parts), len(layouts)) for f in self.layers]
        self._in_use = False

    @contextmanager
    def mixed(self, gates: Tensor | None = None) -> Iterator[None]:
        """Add the slots' updates to the model's layers inside; differentiable.

        Args:
            gates: (B, T, P) for the very tokens that the model is given (while decoding with a
                cache: the new ones), or (P,) for the same gates everywhere; None is all ones.

        Raises:
            PopulationError: If the mixture is in use already, or the gates' shape is another. The
                same inside, where the model is given other positions than the gates.
        """
        self._check_use(gates)
        handles = []
        expanded: dict[int, Tensor] = {}
        self._in_use = True
        try:
            layers = zip(self._targets, self.layers, self._layouts, strict=True)
            for (name, module), factors, layout in layers:
                if layout not in expanded:
                    expanded[layout] = _expand_gates(gates, factors, weight_of(module).dtype)
                hook = _build_hook(name, factors, expanded[layout])
                handles.append(module.register_forward_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._in_use = False

    def _check_use(self, gates: Tensor | None) -> None:
        if self._in_use:
            raise PopulationError(
                "Cannot mix slots: expected the mixture not to be in use, got a second use at "
                "once. Leave the first context."
            )
        if gates is not None and (gates.ndim not in (1, 3) or gates.shape[-1] != self.num_slots):
            raise PopulationError(
                f"Cannot mix slots: expected gates (B, T, {self.num_slots}) or "
                f"({self.num_slots},), got {tuple(gates.shape)}. Use a router of as many slots."
            )

    def read_slots(self, population: Population) -> Population:
        """The population with its slots' factors as they are now, float32 on the CPU.

        Args:
            population: The one this mixture was built from, or one whose slots change the same
                layers at the same ranks; all but the factors is taken from it.

        Raises:
            PopulationError: If it is laid out otherwise.
        """
        if population.num_slots != self.num_slots:
            raise PopulationError(
                f"Cannot read slots: expected a population of {self.num_slots}, got "
                f"{population.num_slots}. Pass the one the mixture was built from."
            )
        slots = tuple(
            replace(slot, updates=self._read_updates(index, slot))
            for index, slot in enumerate(population.slots)
        )
        return replace(population, slots=slots)

    def _read_updates(self, index: int, slot: Slot) -> dict[str, LinearUpdate]:
        updates = {}
        for name, factors in zip(self.names, self.layers, strict=True):
            update = factors.read(index)
            if update is not None:
                updates[name] = update
        found = {name: update.rank for name, update in updates.items()}
        if found != {name: update.rank for name, update in slot.updates.items()}:
            raise PopulationError(
                f"Cannot read slot '{slot.birth.id}': expected the layers and ranks the mixture "
                "was built with, got others. Pass the population it was built from."
            )
        return updates


def _expand_gates(gates: Tensor | None, factors: Any, dtype: torch.dtype) -> Tensor:
    """Gate times scale of every rank, (B, T, R_all), or (R_all,) if equal everywhere."""
    scales: Tensor = factors.scale_of_rank
    if gates is None:
        return scales.to(dtype)
    chosen = gates.to(scales.device).index_select(-1, factors.slot_of_rank)
    return (chosen * scales).to(dtype)


def _build_hook(name: str, factors: Any, gates: Tensor) -> Callable[..., Tensor]:
    """The hook that adds all slots' gated products to a layer's output.

    At one token a pass is mostly the calling of operations, so there are as few as can be.
    """
    a, b = factors.a.to(gates.dtype), factors.b.to(gates.dtype)

    def add_products(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        inputs = args[0]  # (B, T, D_in), or (B * T, D_in) in some models
        weights = gates
        if gates.ndim > 1 and gates.shape[:-1] != inputs.shape[:-1]:
            weights = _fold_gates(name, gates, inputs)
        hidden = functional.linear(inputs, a) * weights
        return functional.linear(hidden, b).add_(output)

    return add_products


def _fold_gates(name: str, gates: Tensor, inputs: Tensor) -> Tensor:
    """Gates in the shape in which a layer gets its positions."""
    if gates.shape[:-1].numel() != inputs.shape[:-1].numel() or inputs.ndim != 2:
        raise PopulationError(
            f"Cannot mix slots at '{name}': expected as many positions as gates, "
            f"{tuple(gates.shape[:-1])}, got {tuple(inputs.shape[:-1])}. "
            "Give gates for the tokens of this pass alone."
        )
    return gates.flatten(0, -2)
