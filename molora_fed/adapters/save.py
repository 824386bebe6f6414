"""Writes updates that are in memory: in PEFT's format, as differences, or with few bits."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from molora_fed.adapters.compatibility import check_adapter_fits
from molora_fed.adapters.contract import LinearOptions
from molora_fed.adapters.delta_files import write_delta
from molora_fed.adapters.files import AdapterMeta
from molora_fed.adapters.low_rank_files import write_low_rank
from molora_fed.adapters.quantised_files import Bits, write_quantised
from molora_fed.adapters.updates import Adapter, LinearUpdate
from molora_fed.models.layout import is_transposed

__all__ = ["save_adapter", "write_updates"]

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
    kind = "delta" if not low_rank else adapter.kind if adapter.kind != "delta" else "svd"
    meta = AdapterMeta(
        kind=kind, frozen_depth=adapter.frozen_depth, base_weights=adapter.base_weights
    )
    transposed = all(is_transposed(model.get_submodule(name)) for name in adapter.updates)
    write_updates(folder, adapter.updates, meta, options=options, transposed=transposed)


def write_updates(
    folder: Path,
    updates: Mapping[str, LinearUpdate],
    meta: AdapterMeta,
    *,
    options: LinearOptions | None = None,
    transposed: bool = False,
    use_rslora: bool = False,
    base_name: str | None = None,
) -> None:
    """Write updates in the format that their kind and the wanted precision ask for.

    Args:
        folder: Target, replaced whole or not at all.
        updates: Updates by full module name.
        meta: Content of `molora_adapter.json`; kind "delta" takes the format of differences.
        options: Precision and group; None keeps the numbers of factors as they are.
        transposed: Whether the modules are Conv1D, for PEFT.
        use_rslora: How PEFT's config states the scale, see `write_low_rank`.
        base_name: Name of the base on the Hub, for PEFT.

    Raises:
        AdapterError: If numbers to be rounded are not finite.
        StorageError: On I/O errors.
    """
    precision = None if options is None else options.precision
    if options is not None and options.precision in _BITS:
        bits = _BITS[options.precision]
        write_quantised(folder, updates, meta, bits=bits, group=options.group)
    elif meta.kind == "delta":
        write_delta(folder, updates, meta, dtype=_DTYPES[precision or "float32"])
    else:
        if precision is not None:
            updates = {name: _cast(u, _DTYPES[precision]) for name, u in updates.items()}
        write_low_rank(
            folder,
            updates,
            meta,
            transposed=transposed,
            use_rslora=use_rslora,
            base_name=base_name,
        )


def _cast(update: LinearUpdate, dtype: torch.dtype) -> LinearUpdate:
    parts = {name: tensor.to(dtype) for name, tensor in update.tensors().items()}
    return LinearUpdate(**parts, scale=update.scale)
