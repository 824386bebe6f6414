"""The format of differences: of weights and biases, under the modules' own names."""

from collections.abc import Mapping
from pathlib import Path

import torch

from molora_fed.adapters.files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterMeta,
    TensorHeader,
    build_loaded,
    describe_unreadable,
    load_json,
    load_tensors,
    write_adapter_folder,
)
from molora_fed.adapters.updates import Adapter, LinearUpdate
from molora_fed.charter import AdapterRules
from molora_fed.storage.untrusted import clean

__all__ = ["load_delta", "write_delta"]

_FORMAT = "delta"  # in the config; the first kind that was written so


def write_delta(
    folder: Path,
    updates: Mapping[str, LinearUpdate],
    meta: AdapterMeta,
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write updates as dense differences; low-rank ones are multiplied out.

    Args:
        folder: Target, replaced whole or not at all.
        updates: Updates by full module name.
        meta: Content of `molora_adapter.json`.
        dtype: Element type of the file.

    Raises:
        StorageError: On I/O errors.
    """
    tensors = {f"{name}.weight": update.product().to(dtype) for name, update in updates.items()}
    tensors |= {f"{n}.bias": u.bias.to(dtype) for n, u in updates.items() if u.bias is not None}
    config = {"kind": _FORMAT, "tensors": sorted(tensors)}
    write_adapter_folder(folder, config, tensors, meta)


def _check_headers(headers: Mapping[str, TensorHeader], declared: list[str], name: str) -> None:
    """Judge names and numbers of dimensions by the header alone."""
    offenders = [f"extra tensor '{key}'" for key in sorted(headers.keys() - set(declared))]
    offenders += [f"missing tensor '{clean(k)}'" for k in sorted(set(declared) - headers.keys())]
    for key, header in headers.items():
        module, _, part = key.rpartition(".")
        dimensions = {"weight": 2, "bias": 1}.get(part)
        if dimensions != len(header.shape) or not module:
            offenders.append(f"'{key}' of shape {header.shape}")
        elif part == "bias" and f"{module}.weight" not in headers:
            offenders.append(f"'{key}' without '{module}.weight'")
    if offenders or not headers:
        raise describe_unreadable(
            name,
            expected=f"the (D_out, D_in) weights and (D_out,) biases '{CONFIG_FILE}' lists",
            got="; ".join(offenders[:5]) or "no tensor",
            fix="Export the adapter again.",
        )


def load_delta(folder: Path, rules: AdapterRules | None, name: str) -> Adapter:
    """Read a folder written by `write_delta`; safe on files from outside.

    Args:
        folder: The adapter's folder.
        rules: Limits on bytes.
        name: The adapter's name, for errors.

    Raises:
        AdapterError: If a file is missing, malformed, too large or unsafe.
    """
    config = load_json(folder / CONFIG_FILE, name)
    declared = config.get("tensors")
    if (
        set(config) != {"kind", "tensors"}
        or config["kind"] != _FORMAT
        or not isinstance(declared, list)
        or not all(isinstance(key, str) for key in declared)
    ):
        raise describe_unreadable(
            name,
            expected=f"kind '{_FORMAT}' and a list of tensors in '{CONFIG_FILE}'",
            got=f"keys {clean(', '.join(sorted(config)))}",
            fix="Export the adapter again.",
        )

    tensors = load_tensors(
        folder / WEIGHTS_FILE,
        name,
        max_bytes=None if rules is None else rules.max_bytes,
        check=lambda headers: _check_headers(headers, declared, name),
    )
    modules = [key.removesuffix(".weight") for key in tensors if key.endswith(".weight")]
    updates = {
        m: LinearUpdate(dense=tensors[f"{m}.weight"], bias=tensors.get(f"{m}.bias"))
        for m in modules
    }
    return build_loaded(folder, updates, name)
