"""The two formats of updates, written and read: factors and differences, each also in few bits."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from molora_fed.adapters.compatibility import check_adapter_fits
from molora_fed.adapters.contract import LinearOptions
from molora_fed.adapters.delta_files import load_delta, write_delta
from molora_fed.adapters.files import AdapterMeta
from molora_fed.adapters.low_rank_files import load_low_rank, write_low_rank
from molora_fed.adapters.quantised_files import (
    Bits,
    is_quantised,
    load_quantised,
    write_quantised,
)
from molora_fed.adapters.updates import Adapter, LinearUpdate
from molora_fed.charter import AdapterRules
from molora_fed.models.layout import is_transposed

__all__ = [
    "choose_factor_kind",
    "load_differences",
    "load_factors",
    "save_adapter",
    "write_differences",
    "write_factors",
]

# What is written of adapters that no training of a kind made: merges, approximations, copies.
_DEFAULT_FACTORS = ("lora", "svd")
_DEFAULT_DIFFERENCES = "delta"

_BITS: dict[str, Bits] = {"int2": 2, "int4": 4, "int8": 8}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def save_adapter(
    adapter: Adapter, model: Any, folder: Path, *, options: LinearOptions | None = None
) -> None:
    """Write an adapter so that `load_adapter` gives the same numbers back.

    Low-rank updates without bias changes go to PEFT's format, anything else to differences.

    Args:
        adapter: What to write.
        model: The base model it fits.
        folder: Target, replaced whole or not at all.
        options: Precision and group; without them numbers stay as exact as they are. With int8,
            int4 or int2 the quantised format is taken and numbers are rounded.

    Raises:
        IncompatibleAdapterError: If it does not fit the model.
        StorageError: On I/O errors.
    """
    check_adapter_fits(adapter, model)
    low_rank = all(u.rank is not None and u.bias is None for u in adapter.updates.values())
    kind = choose_factor_kind(adapter.kind) if low_rank else _DEFAULT_DIFFERENCES
    meta = AdapterMeta(
        kind=kind, frozen_depth=adapter.frozen_depth, base_weights=adapter.base_weights
    )
    if not low_rank:
        write_differences(folder, adapter.updates, meta, options=options)
        return
    transposed = all(is_transposed(model.get_submodule(name)) for name in adapter.updates)
    write_factors(folder, adapter.updates, meta, options=options, transposed=transposed)


def choose_factor_kind(kind: str) -> str:
    """The kind that factors are written as which another kind's training or a merge gave.

    Args:
        kind: What the adapter is in memory; a kind of a plugin may have files of its own.
    """
    return kind if kind in _DEFAULT_FACTORS else _DEFAULT_FACTORS[-1]


def write_factors(
    folder: Path,
    updates: Mapping[str, LinearUpdate],
    meta: AdapterMeta,
    *,
    options: LinearOptions | None = None,
    transposed: bool = False,
    use_rslora: bool = False,
    base_name: str | None = None,
) -> None:
    """Write low-rank updates: PEFT's format, or the quantised one for a precision of few bits.

    Args:
        folder: Target, replaced whole or not at all.
        updates: Factors A (R, D_in) and B (D_out, R) by full module name, without biases.
        meta: Content of `molora_adapter.json`; `AdapterKind.describe` gives it.
        options: Precision and group; None keeps the numbers as they are.
        transposed: Whether the modules are Conv1D, for PEFT.
        use_rslora: How PEFT's config states the scale, see `write_low_rank`.
        base_name: Name of the base on the Hub, for PEFT.

    Raises:
        AdapterError: If numbers to be rounded are not finite.
        StorageError: On I/O errors.
    """
    if _write_few_bits(folder, updates, meta, options):
        return
    if options is not None:
        updates = {n: _cast(u, _DTYPES[options.precision]) for n, u in updates.items()}
    write_low_rank(
        folder,
        updates,
        meta,
        transposed=transposed,
        use_rslora=use_rslora,
        base_name=base_name,
    )


def write_differences(
    folder: Path,
    updates: Mapping[str, LinearUpdate],
    meta: AdapterMeta,
    *,
    options: LinearOptions | None = None,
) -> None:
    """Write updates as dense differences, or in the quantised format for a precision of few bits.

    Args:
        folder: Target, replaced whole or not at all.
        updates: Changes by full module name: dense ones (D_out, D_in) and biases (D_out,).
        meta: Content of `molora_adapter.json`; `AdapterKind.describe` gives it.
        options: Precision and group; None writes float32.

    Raises:
        AdapterError: If numbers to be rounded are not finite.
        StorageError: On I/O errors.
    """
    if _write_few_bits(folder, updates, meta, options):
        return
    dtype = torch.float32 if options is None else _DTYPES[options.precision]
    write_delta(folder, updates, meta, dtype=dtype)


def load_factors(folder: Path, limits: AdapterRules | None, name: str) -> Adapter:
    """Read what `write_factors` wrote; safe on files from outside.

    Args:
        folder: The adapter's folder.
        limits: Limits on rank and bytes, checked before anything is allocated.
        name: The adapter's name, for errors.

    Raises:
        AdapterError: If the files are malformed, unsafe or beyond the limits.
    """
    if is_quantised(folder, name):
        return load_quantised(folder, limits, name)
    return load_low_rank(folder, limits, name)


def load_differences(folder: Path, limits: AdapterRules | None, name: str) -> Adapter:
    """Read what `write_differences` wrote; safe on files from outside. See `load_factors`."""
    if is_quantised(folder, name):
        return load_quantised(folder, limits, name)
    return load_delta(folder, limits, name)


def _write_few_bits(
    folder: Path,
    updates: Mapping[str, LinearUpdate],
    meta: AdapterMeta,
    options: LinearOptions | None,
) -> bool:
    """Write the quantised format if the precision asks for it."""
    if options is None or options.precision not in _BITS:
        return False
    bits = _BITS[options.precision]
    write_quantised(folder, updates, meta, bits=bits, group=options.group)
    return True


def _cast(update: LinearUpdate, dtype: torch.dtype) -> LinearUpdate:
    parts = {name: tensor.to(dtype) for name, tensor in update.tensors().items()}
    return LinearUpdate(**parts, scale=update.scale)
