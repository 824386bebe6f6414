"""A population on disk: `population.json` and `population.safetensors`, whole or not there.

The tensors are named "<slot>.<module>.a" and "<slot>.<module>.b", as they are in memory; the card
holds everything else, and the hash of the weights. Equal populations give equal bytes.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors.torch import save
from torch import Tensor

from molora_fed.adapters.files import (
    ADAPTER_DTYPES,
    MAX_JSON_BYTES,
    TensorHeader,
    load_tensors,
)
from molora_fed.adapters.updates import LinearUpdate
from molora_fed.charter import AdapterRules
from molora_fed.errors import AdapterError
from molora_fed.population.contract import Birth, Population, Slot
from molora_fed.population.slots import check_slots
from molora_fed.storage.files import (
    canonical_json,
    hash_bytes,
    hash_file,
    replace_folder,
    write_bytes,
    write_json,
)
from molora_fed.storage.settings import read_model

__all__ = ["POPULATION_FILES", "fingerprint_population", "load_population", "save_population"]

_CARD = "population.json"
_WEIGHTS = "population.safetensors"
POPULATION_FILES = (_CARD, _WEIGHTS)
"""Names of a population's files, both in one folder."""

_FORMAT_VERSION = 1
_MAX_SLOTS = 1024
_TENSOR = re.compile(r"(?P<slot>0|[1-9][0-9]{0,3})\.(?P<module>.+)\.(?P<part>[ab])")
_Text = Field(max_length=256)


class _BirthCard(BaseModel):
    """A `Birth`, as JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    id: str = Field(min_length=1, max_length=256)
    operator: str = _Text
    parents: tuple[str, ...] = Field(max_length=64)
    generation: int = Field(ge=0)
    seed: int
    fitness_before: float | None


class _SlotCard(BaseModel):
    """A `Slot` without its tensors; scales that are not the most common one are by module."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    birth: _BirthCard
    domain: str | None = _Text
    stale: int = Field(ge=0)
    scale: float
    scales: dict[str, float]


class _Card(BaseModel):
    """Content of `population.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int = Field(ge=_FORMAT_VERSION, le=_FORMAT_VERSION)
    base_weights: str = Field(pattern=r"^([0-9a-f]{64})?$")
    frozen_depth: int = Field(ge=0)
    slots: tuple[_SlotCard, ...] = Field(min_length=1, max_length=_MAX_SLOTS)
    weights: str = Field(pattern=r"^[0-9a-f]{64}$")

    @model_validator(mode="after")
    def _check_ids(self) -> Self:
        ids = [slot.birth.id for slot in self.slots]
        if len(set(ids)) < len(ids):
            raise ValueError("two slots have one id")
        return self


def _encode(population: Population) -> tuple[dict[str, Any], bytes]:
    """The card, and the bytes of the weights' file."""
    check_slots(population)
    tensors: dict[str, Tensor] = {}
    slots = []
    for index, slot in enumerate(population.slots):
        for module, update in slot.updates.items():
            for part, tensor in update.tensors().items():
                # A copy: slots may share tensors in memory, which safetensors refuses.
                copy = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
                tensors[f"{index}.{module}.{part}"] = copy
        scales = {module: update.scale for module, update in sorted(slot.updates.items())}
        found = list(scales.values())
        common = min(set(found), key=lambda scale: (-found.count(scale), scale))
        birth = slot.birth
        slots.append(
            {
                "birth": {
                    "id": birth.id,
                    "operator": birth.operator,
                    "parents": list(birth.parents),
                    "generation": birth.generation,
                    "seed": birth.seed,
                    "fitness_before": birth.fitness_before,
                },
                "domain": slot.domain,
                "stale": slot.stale,
                "scale": common,
                "scales": {module: s for module, s in scales.items() if s != common},
            }
        )
    weights = save({key: tensors[key] for key in sorted(tensors)}, metadata={"format": "pt"})
    card = {
        "format_version": _FORMAT_VERSION,
        "base_weights": population.base_weights,
        "frozen_depth": population.frozen_depth,
        "slots": slots,
        "weights": hash_bytes(weights),
    }
    return card, weights


def fingerprint_population(population: Population) -> str:
    """SHA-256 of everything a population is, lower-case hex; equal before saving and after loading.

    Raises:
        PopulationError: If it is empty, or a slot is not low-rank or holds NaN or infinity.
    """
    card, _ = _encode(population)
    return hash_bytes(canonical_json(card))


def save_population(population: Population, folder: Path) -> str:
    """Write a population; the same one gives the same bytes.

    Args:
        population: What to write, tensors in the dtype they have.
        folder: Target, replaced whole or not at all.

    Returns:
        Its fingerprint.

    Raises:
        PopulationError: If it is empty, or a slot is not low-rank or holds NaN or infinity.
        StorageError: On I/O errors.
    """
    card, weights = _encode(population)
    with replace_folder(folder) as target:
        write_bytes(target / _WEIGHTS, weights)
        write_json(target / _CARD, card)
    return hash_bytes(canonical_json(card))


def load_population(folder: Path, *, rules: AdapterRules | None = None) -> Population:
    """Read a population whose sender is not trusted.

    Args:
        folder: Folder with the population's files.
        rules: The charter's limits: rank, frozen depth, and bytes of one adapter for each slot;
            checked before anything is allocated.

    Returns:
        The population, on the CPU. Whether it fits a base says `check_population`.

    Raises:
        AdapterError: If a file is missing, malformed, too large, not of the other file, or against
            the rules.
        PopulationError: If a slot holds NaN or infinity.
    """
    name = str(folder)
    card = _read_card(folder)
    if rules is not None and card.frozen_depth < rules.frozen_depth:
        raise _unreadable(
            folder, f"a frozen depth of at least {rules.frozen_depth}", str(card.frozen_depth)
        )
    tensors = load_tensors(
        folder / _WEIGHTS,
        name,
        max_bytes=None if rules is None else rules.max_bytes * len(card.slots),
        check=lambda headers: _check_headers(headers, card, rules, folder),
    )
    if hash_file(folder / _WEIGHTS) != card.weights:
        raise _unreadable(folder, f"weights of hash {card.weights[:12]}", "others")
    factors: list[dict[str, dict[str, Tensor]]] = [{} for _ in card.slots]
    for key, tensor in tensors.items():
        index, module, part = _split(key)
        factors[index].setdefault(module, {})[part] = tensor
    population = Population(
        base_weights=card.base_weights,
        frozen_depth=card.frozen_depth,
        slots=tuple(_build(one, found) for one, found in zip(card.slots, factors, strict=True)),
    )
    check_slots(population)
    return population


def _build(card: _SlotCard, factors: Mapping[str, Mapping[str, Tensor]]) -> Slot:
    updates = {
        module: LinearUpdate(**pair, scale=card.scales.get(module, card.scale))
        for module, pair in factors.items()
    }
    birth = Birth(**dict(card.birth))
    return Slot(birth=birth, domain=card.domain, updates=updates, stale=card.stale)


def _unreadable(folder: Path, expected: str, got: str) -> AdapterError:
    return AdapterError(
        f"Cannot read population '{folder}': expected {expected}, got {got}. "
        "Copy the folder again, or evolve again."
    )


def _read_card(folder: Path) -> _Card:
    return read_model(
        folder / _CARD,
        _Card,
        what=f"Cannot read population '{folder}'",
        error=AdapterError,
        fix="Copy the folder again, or evolve again.",
        max_bytes=MAX_JSON_BYTES,
    )


def _split(key: str) -> tuple[int, str, str]:
    """Slot, module and part that a tensor's name says; slot -1 if it says none."""
    match = _TENSOR.fullmatch(key)
    if match is None:
        return -1, key, ""
    return int(match["slot"]), match["module"], match["part"]


def _check_headers(
    headers: Mapping[str, TensorHeader], card: _Card, rules: AdapterRules | None, folder: Path
) -> None:
    """Judge names, shapes and ranks by the header alone."""
    offenders: list[str] = []
    pairs: list[dict[str, dict[str, TensorHeader]]] = [{} for _ in card.slots]
    for key, header in headers.items():
        index, module, part = _split(key)
        if not 0 <= index < len(pairs) or len(header.shape) != 2 or 0 in header.shape:
            offenders.append(f"'{key}' of shape {header.shape}")
        else:
            pairs[index].setdefault(module, {})[part] = header
    for index, pair_of in enumerate(pairs):
        for module, pair in pair_of.items():
            if pair.keys() != {"a", "b"} or pair["a"].shape[0] != pair["b"].shape[1]:
                offenders.append(f"no matching factors of '{index}.{module}'")
            elif rules is not None and pair["a"].shape[0] > rules.max_rank:
                offenders.append(
                    f"'{index}.{module}' of rank {pair['a'].shape[0]} above the charter's "
                    f"{rules.max_rank}"
                )
        extra = sorted(card.slots[index].scales.keys() - pair_of.keys())
        offenders += [f"a scale, but no factors of '{index}.{module}'" for module in extra]
        if not pair_of:
            offenders.append(f"no factors of slot {index}")
    if offenders:
        raise _unreadable(
            folder,
            f"factors a (R, D_in) and b (D_out, R) of {', '.join(ADAPTER_DTYPES)} for each slot",
            "; ".join(offenders[:5]),
        )
