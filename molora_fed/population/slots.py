"""Makes, checks and describes populations of low-rank adapters."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from molora_fed.adapters.compatibility import find_misfits
from molora_fed.adapters.updates import Adapter, LinearUpdate, truncate
from molora_fed.errors import PopulationError
from molora_fed.models.base import Base
from molora_fed.models.layout import adaptable_modules, weight_of
from molora_fed.population.contract import Birth, Population, Slot
from molora_fed.storage.files import canonical_json, hash_bytes
from molora_fed.storage.seeds import derive_seed

__all__ = [
    "FRESH_ALPHA",
    "Filling",
    "check_population",
    "check_slots",
    "make_fresh_updates",
    "make_population",
    "slot_adapter",
]

Filling = Literal["clone", "fresh"]
"""What slots without an adapter get: copies of the adapters in turn, or fresh adapters."""

FRESH_ALPHA = 16
"""Alpha of a fresh adapter; its scale is alpha / sqrt(R), as in the adapter kind `lora`."""

_SHOWN = 5


def make_population(
    base: Base,
    adapters: Sequence[tuple[str, str | None, Adapter]],
    *,
    num_slots: int,
    rank: int | None = None,
    filling: Filling = "clone",
    frozen_depth: int | None = None,
    seed: int = 0,
) -> Population:
    """The first generation: one slot an adapter, in their order, and the rest filled.

    Low-rank updates of at most the rank keep their factors; others, and dense ones, become their
    best approximation of that rank (truncated SVD). A slot has no biases: those of a `delta` are
    left out.

    Args:
        base: The base they fit.
        adapters: Name (a contribution's id, say), domain and adapter of each; may be empty if
            slots are filled fresh.
        num_slots: P, at least the number of adapters.
        rank: Largest rank of a slot, and the rank of fresh ones; None keeps ranks as they are,
            and gives fresh slots the largest of them.
        filling: What the slots beyond the adapters get.
        frozen_depth: K; the smallest of the adapters' by default, 0 without any.
        seed: Decides the numbers of fresh adapters.

    Raises:
        PopulationError: If P is too small, nothing can fill it, a rank is needed and not given,
            or an adapter does not fit.
    """
    depth = min((a.frozen_depth for *_, a in adapters), default=0)
    depth = depth if frozen_depth is None else frozen_depth
    _check_request(adapters, num_slots, rank, filling)
    slots = [
        Slot(
            birth=Birth(id=f"g0-s{index}", operator="admitted", parents=(name,), seed=seed),
            domain=domain,
            updates=_shorten(name, adapter, rank),
        )
        for index, (name, domain, adapter) in enumerate(adapters)
    ]
    known = [u.rank or 0 for slot in slots for u in slot.updates.values()]
    fresh_rank = rank or max(known, default=0)
    for index in range(len(slots), num_slots):
        if filling == "clone":
            parent = slots[index % len(adapters)]
            birth = Birth(f"g0-s{index}", "clone", (parent.birth.id,), seed=seed)
            slots.append(Slot(birth=birth, domain=parent.domain, updates=dict(parent.updates)))
        else:
            modules = adaptable_modules(base.model, depth)
            shapes = {name: tuple(weight_of(module).shape) for name, module in modules.items()}
            drawn = derive_seed(seed, index)
            updates = make_fresh_updates(shapes, fresh_rank, drawn)
            birth = Birth(f"g0-s{index}", "fresh", seed=seed)
            slots.append(Slot(birth=birth, domain=None, updates=updates))
    population = Population(base.weights, depth, tuple(slots))
    stated = {f"'{n}' on {a.base_weights[:12]}" for n, _, a in adapters if a.base_weights}
    if any(a.base_weights not in ("", base.weights) for *_, a in adapters):
        raise PopulationError(
            f"Cannot make a population: expected adapters of base {base.weights[:12]}, got "
            f"{', '.join(sorted(stated))}. Leave the others out."
        )
    check_population(population, base.model)
    return population


def _check_request(
    adapters: Sequence[tuple[str, str | None, Adapter]],
    num_slots: int,
    rank: int | None,
    filling: str,
) -> None:
    """Refuse what cannot become a population, before anything is computed."""
    if filling not in ("clone", "fresh"):
        raise PopulationError(
            f"Cannot make a population: expected filling 'clone' or 'fresh', got '{filling}'. "
            "Choose one of them."
        )
    if num_slots < max(len(adapters), 1):
        raise PopulationError(
            f"Cannot make a population: expected at least {max(len(adapters), 1)} slots for "
            f"{len(adapters)} adapters, got {num_slots}. Raise the number of slots."
        )
    if rank is not None and rank < 1:
        raise PopulationError(
            f"Cannot make a population: expected a rank of at least 1, got {rank}. "
            "Choose another rank."
        )
    if not adapters and (filling == "clone" or rank is None):
        raise PopulationError(
            "Cannot make a population: expected adapters, or fresh filling and a rank, got "
            "neither. Name adapters, or choose fresh slots and their rank."
        )


def _shorten(name: str, adapter: Adapter, rank: int | None) -> dict[str, LinearUpdate]:
    """Low-rank updates of at most a rank, float32, without biases."""
    updates = {}
    for module, update in adapter.updates.items():
        if update.rank is None and rank is None:
            raise PopulationError(
                f"Cannot make a slot of adapter '{name}': expected a rank for its dense "
                f"difference of '{module}', got none. Choose the slots' rank."
            )
        if update.rank is None or (rank is not None and update.rank > rank):
            a, b = truncate(update.product(), rank or 1)
            updates[module] = LinearUpdate(a=a, b=b)
        else:
            factors: Any = update
            updates[module] = LinearUpdate(
                a=factors.a.float().clone(), b=factors.b.float().clone(), scale=update.scale
            )
    return updates


def make_fresh_updates(
    shapes: Mapping[str, tuple[int, ...]], rank: int, seed: int
) -> dict[str, LinearUpdate]:
    """Updates that change nothing yet: A random, B zero, scale 16 / sqrt(R).

    Args:
        shapes: (D_out, D_in) by full module name, in a fixed order.
        rank: R.
        seed: Decides A.

    Raises:
        PopulationError: If the rank is not positive.

    Source: arXiv 2106.09685 (A as PEFT draws it, uniform within 1 / sqrt(D_in)).
    """
    if rank < 1:
        raise PopulationError(
            f"Cannot make a fresh adapter: expected a rank of at least 1, got {rank}. "
            "Choose another rank."
        )
    generator = torch.Generator().manual_seed(seed)
    updates = {}
    for name, (rows, columns) in shapes.items():
        a = (2 * torch.rand(rank, columns, generator=generator) - 1) / math.sqrt(columns)
        scale = FRESH_ALPHA / math.sqrt(rank)
        updates[name] = LinearUpdate(a=a, b=torch.zeros(rows, rank), scale=scale)
    return updates


def slot_adapter(population: Population, slot: int) -> Adapter:
    """One slot as an adapter, e.g. to apply it alone or to save it in PEFT's format.

    Args:
        population: The population.
        slot: Index of the slot.

    Returns:
        An adapter of kind "lora", named by the id of the slot's birth, of the slot's own tensors.
    """
    chosen = population.slots[slot]
    tensors = [
        tensor
        for _, update in sorted(chosen.updates.items())
        for _, tensor in sorted(update.tensors().items())
    ]
    scales = {name: update.scale for name, update in chosen.updates.items()}
    hashes = [hash_bytes(_to_bytes(tensor)) for tensor in tensors]
    return Adapter(
        name=chosen.birth.id,
        kind="lora",
        frozen_depth=population.frozen_depth,
        updates=chosen.updates,
        hash=hash_bytes(canonical_json([scales, hashes])),
        num_bytes=sum(tensor.nbytes for tensor in tensors),
        base_weights=population.base_weights,
    )


def _to_bytes(tensor: Tensor) -> bytes:
    """A tensor's numbers, of any dtype."""
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def check_slots(population: Population) -> None:
    """Refuse a population that is malformed, whatever its base; all offenders are collected first.

    Args:
        population: The population.

    Raises:
        PopulationError: If there is no slot, two have one id, or a slot changes nothing, is not
            low-rank, has rank 0 or biases, or holds NaN or infinity.
    """
    _refuse(_find_faults(population), "finite low-rank updates in every slot")


def check_population(population: Population, model: Any) -> None:
    """Refuse a population that cannot run inside a model; all offenders are collected first.

    Args:
        population: The population.
        model: The base model, as loaded.

    Raises:
        PopulationError: If it is malformed (see `check_slots`) or a slot does not fit the model.
    """
    faults = _find_faults(population)
    for slot in population.slots:
        if not slot.updates:
            continue
        adapter = Adapter(
            name=slot.birth.id,
            kind="lora",
            frozen_depth=population.frozen_depth,
            updates=slot.updates,
            hash="",
            num_bytes=0,
        )
        faults += [f"slot '{slot.birth.id}': {fault}" for fault in find_misfits(adapter, model)]
    what = f"finite low-rank updates of linear layers of '{type(model).__name__}'"
    _refuse(faults, what)


def _refuse(faults: list[str], expected: str) -> None:
    if faults:
        more = len(faults) - _SHOWN
        shown = "; ".join(faults[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")
        raise PopulationError(
            f"Cannot use a population: expected {expected}, got {shown}. "
            "Leave these slots out or make them again."
        )


def _find_faults(population: Population) -> list[str]:
    """What is wrong with a population by itself."""
    if not population.slots:
        return ["no slot"]
    ids = [slot.birth.id for slot in population.slots]
    faults = [f"two slots of id '{i}'" for i in dict.fromkeys(ids) if ids.count(i) > 1]
    for slot in population.slots:
        found = [] if slot.updates else ["no update"]
        for name, update in slot.updates.items():
            if update.rank is None:
                found.append(f"{name}: a dense difference")
            elif update.rank < 1:
                found.append(f"{name}: rank 0")
            if update.bias is not None:
                found.append(f"{name}: a change of the bias")
            tensors = update.tensors().values()
            if not math.isfinite(update.scale) or not all(t.isfinite().all() for t in tensors):
                found.append(f"{name}: NaN or infinity")
        faults += [f"slot '{slot.birth.id}': {fault}" for fault in found]
    return faults
