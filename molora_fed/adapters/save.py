"""Writes an adapter that is in memory: a merged one, or one made for a test."""

from pathlib import Path
from typing import Any

from molora_fed.adapters.compatibility import check_adapter_fits
from molora_fed.adapters.delta_files import write_delta
from molora_fed.adapters.files import AdapterMeta
from molora_fed.adapters.layout import is_transposed
from molora_fed.adapters.low_rank_files import write_low_rank
from molora_fed.adapters.updates import Adapter

__all__ = ["save_adapter"]


def save_adapter(adapter: Adapter, model: Any, folder: Path) -> None:
    """Write an adapter so that `load_adapter` gives the same numbers back.

    Low-rank updates without bias changes go to PEFT's format, anything else to differences.

    Args:
        adapter: What to write.
        model: The base model it fits.
        folder: Target, replaced whole or not at all.

    Raises:
        IncompatibleAdapterError: If it does not fit the model.
        StorageError: If the disk refuses.
    """
    check_adapter_fits(adapter, model)
    updates = adapter.updates
    if all(update.rank is not None and update.bias is None for update in updates.values()):
        kind = adapter.kind if adapter.kind != "delta" else "svd"
        transposed = all(is_transposed(model.get_submodule(name)) for name in updates)
        meta = _meta(adapter, kind)
        write_low_rank(folder, updates, meta, transposed=transposed, use_rslora=False)
    else:
        write_delta(folder, updates, _meta(adapter, "delta"))


def _meta(adapter: Adapter, kind: str) -> AdapterMeta:
    return AdapterMeta(
        kind=kind, frozen_depth=adapter.frozen_depth, base_weights=adapter.base_weights
    )
