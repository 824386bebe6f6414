"""PEFT's LoRA format, written and read without running PEFT's code on files from outside.

Reading accepts what `PeftModel.from_pretrained` would turn into `scale * B @ A` on linear layers,
and refuses every feature that would make it something else, instead of leaving it out silently.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from molora_fed.adapters.files import (
    CONFIG_FILE,
    AdapterMeta,
    TensorHeader,
    hash_adapter_files,
    load_json,
    load_meta,
    load_tensors,
    write_adapter_folder,
)
from molora_fed.adapters.kept_weights import check_kept_weights
from molora_fed.adapters.limits import BaseLimits
from molora_fed.adapters.peft_config import read_settings
from molora_fed.adapters.peft_folder import (
    LoraFolder,
    check_has_adapter,
    check_plain,
    find_weight_files,
    open_lora_folder,
)
from molora_fed.adapters.updates import Adapter, LinearUpdate
from molora_fed.charter import AdapterRules

__all__ = ["LoadedLora", "load_low_rank", "read_lora", "write_low_rank"]


@dataclass(frozen=True, eq=False)
class LoadedLora:
    """A LoRA as it was read, and what was done to read it.

    Attributes:
        adapter: The low-rank changes.
        source: Its config and headers.
        magnitudes: DoRA's magnitudes by module, (D_out,); empty for a plain LoRA.
    """

    adapter: Adapter
    source: LoraFolder
    magnitudes: Mapping[str, Tensor]


def write_low_rank(
    folder: Path,
    updates: Mapping[str, LinearUpdate],
    meta: AdapterMeta,
    *,
    transposed: bool,
    use_rslora: bool,
    base_name: str | None = None,
) -> None:
    """Write low-rank updates so that plain `PeftModel.from_pretrained` loads them.

    Ranks and scales may differ by module; the most common of each goes to the config's head and
    the others to PEFT's patterns.

    Args:
        folder: Target, replaced whole or not at all.
        updates: Low-rank updates by full module name.
        meta: Content of `molora_adapter.json`.
        transposed: Whether the modules are Conv1D (PEFT's `fan_in_fan_out`).
        use_rslora: Whether the scale is written as alpha / sqrt(R) or as alpha / R.
        base_name: Name of the base on the Hub, for PEFT.

    Raises:
        StorageError: On I/O errors.
    """
    ranks = {name: update.rank or 0 for name, update in updates.items()}
    alphas = {}
    for name, update in updates.items():
        divisor = math.sqrt(ranks[name]) if use_rslora else ranks[name]
        alpha = update.scale * divisor
        # Rounding restores the whole number that the scale was made from.
        alphas[name] = round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha
    rank = _most_common(ranks.values())
    alpha = _most_common(alphas.values())
    config = {
        "alpha_pattern": {n: a for n, a in alphas.items() if a != alpha},
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {n: r for n, r in ranks.items() if r != rank},
        "target_modules": sorted(updates),
        "task_type": "CAUSAL_LM",
        "use_rslora": use_rslora,
    }
    tensors = {}
    for name, update in updates.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = update.a
        tensors[f"base_model.model.{name}.lora_B.weight"] = update.b
    write_adapter_folder(folder, config, tensors, meta)


def _most_common(values: Any) -> Any:
    """The value that occurs most often, the smallest among equals."""
    counted = list(values)
    return min(set(counted), key=lambda value: (-counted.count(value), value))


def load_low_rank(folder: Path, rules: AdapterRules | None, name: str) -> Adapter:
    """Read a LoRA folder of PEFT's format; safe on files from outside.

    Args:
        folder: The adapter's folder.
        rules: Limits on rank and bytes, checked before anything is allocated; as `BaseLimits` they
            decide how names are read, too, and whole weights are compared with the base's.
        name: The adapter's name, for errors.

    Raises:
        AdapterError: If a file is missing, malformed, too large, unsafe, or asks for a feature
            that is not a low-rank change of linear layers.
    """
    return read_lora(folder, rules, name).adapter


def read_lora(
    folder: Path,
    rules: AdapterRules | None,
    name: str,
    *,
    with_magnitudes: bool = False,
    drop_saved: bool = False,
) -> LoadedLora:
    """Read a LoRA folder from anywhere; see `load_low_rank`.

    Args:
        folder: The adapter's folder.
        rules: Limits on rank and bytes, and the base.
        name: The adapter's name, for errors.
        with_magnitudes: Whether DoRA is read, for who makes something else of it.
        drop_saved: Whether whole weights in the file are left out, whatever they hold.

    Raises:
        AdapterError: See `load_low_rank`.
    """
    limits = rules if isinstance(rules, BaseLimits) else None
    sources: list[LoraFolder] = []

    def check(headers: Mapping[str, TensorHeader]) -> list[str]:
        source = open_lora_folder(
            folder,
            name,
            base=None if limits is None else limits.base_layers,
            max_rank=None if rules is None else rules.max_rank,
            headers=headers,
        )
        check_plain(source, name, has_base=limits is not None, with_magnitudes=with_magnitudes)
        sources.append(source)
        pairs = source.layout.pairs.values()
        return [key for pair in pairs for key in (pair.a, pair.b, pair.magnitude) if key]

    check_has_adapter(folder, name)
    read_settings(load_json(folder / CONFIG_FILE, name), name)  # before its tensors are looked at
    paths = find_weight_files(folder, name)
    tensors = load_tensors(
        paths, name, max_bytes=None if rules is None else rules.max_bytes, check=check
    )
    source = sources[0]
    settings, layout = source.settings, source.layout
    if limits is not None and not drop_saved:
        check_kept_weights(folder, paths, layout.kept, layout.headers, settings, limits, name)
    meta = load_meta(folder, name)
    adapter = Adapter(
        name=name,
        kind=meta.kind,
        frozen_depth=meta.frozen_depth,
        updates={
            module: LinearUpdate(
                a=tensors[pair.a], b=tensors[pair.b], scale=pair.scale(settings.use_rslora)
            )
            for module, pair in layout.pairs.items()
        },
        hash=hash_adapter_files(folder, paths),
        num_bytes=source.num_bytes,
        base_weights=meta.base_weights,
        targets=settings.targets,
    )
    magnitudes = {m: tensors[p.magnitude] for m, p in layout.pairs.items() if p.magnitude}
    return LoadedLora(adapter, source, magnitudes)
