"""An adapter made elsewhere, written in this library's own form, which plain PEFT loads.

A LoRA keeps its factors bit by bit. DoRA is no low-rank change: its exact difference to the base
is written as kind `delta`, or the best factors of it as kind `svd`, with what these lose.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from molora_fed.adapters.compatibility import check_adapter_fits, check_effect
from molora_fed.adapters.files import AdapterMeta, describe_unreadable, load_adapter
from molora_fed.adapters.inspection import check_folder, is_own_format
from molora_fed.adapters.limits import BaseLimits
from molora_fed.adapters.low_rank_files import LoadedLora, read_lora
from molora_fed.adapters.peft_folder import read_claims
from molora_fed.adapters.save import write_differences, write_factors
from molora_fed.adapters.updates import Adapter, LinearUpdate, truncate
from molora_fed.errors import ConfigError
from molora_fed.models.layout import is_transposed, weight_of

__all__ = ["Converted", "convert_adapter"]

DEFAULT_RANK = 64
# Kinds that are written: the factors as they are, the best ones of the difference, all of it.
_DEFAULT_KEPT, _DEFAULT_SHORTENED, _DEFAULT_WHOLE = "lora", "svd", "delta"


@dataclass(frozen=True, eq=False)
class Converted:
    """What was written.

    Attributes:
        adapter: The adapter as it is in the new folder.
        changed: Modules whose change is not exactly zero.
        loss_fraction: Share of the difference that the new form loses, by Frobenius norm; 0 if
            it is exact.
        dropped: Keys of tensors that were left out.
        notes: What reading it took.
    """

    adapter: Adapter
    changed: int
    loss_fraction: float
    dropped: tuple[str, ...]
    notes: tuple[str, ...]


def convert_adapter(
    folder: Path,
    out: Path,
    *,
    model: Any = None,
    tokenizer: Any = None,
    kind: str | None = None,
    rank: int | None = None,
    drop_saved: bool = False,
    replaces: bool = False,
    name: str | None = None,
) -> Converted:
    """Read an adapter from anywhere and write it in the normal form.

    Args:
        folder: Its folder.
        out: Target; refused if it holds something.
        model: The base model; without it names are taken as they are below PEFT's prefix.
        tokenizer: The base's tokenizer, to name tokens in errors.
        kind: "lora" (default), or "svd" or "delta" of the exact difference, which needs the base.
        rank: R of kind "svd"; `DEFAULT_RANK` by default.
        drop_saved: Whether whole weights in the file are left out, whatever they hold.
        replaces: Whether the target may hold what an earlier run left there.
        name: Name for errors; the folder's path by default.

    Raises:
        AdapterError: If it cannot be used; in one line, with what repairs it.
        ConfigError: If the target holds something, or a kind needs a base that is not given.
        StorageError: On I/O errors; the target is whole or not there.
    """
    name = str(folder) if name is None else name
    kind = kind or _DEFAULT_KEPT
    what = f"Cannot convert adapter '{name}'"
    known = (_DEFAULT_KEPT, _DEFAULT_SHORTENED, _DEFAULT_WHOLE)
    if kind not in known:
        raise ConfigError(
            f"{what}: expected kind {', '.join(known[:-1])} or {known[-1]}, got '{kind}'. "
            "Choose one of these."
        )
    if kind != _DEFAULT_KEPT and model is None:
        raise ConfigError(
            f"{what}: expected a base to compute kind {kind} on, got none. Say where with --base."
        )
    if not replaces and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"{what}: expected a new or empty folder '{out}', got one that holds something. "
            "Choose another."
        )
    check_folder(folder, name)
    if is_own_format(folder, name):
        raise describe_unreadable(
            name,
            expected="a LoRA of PEFT's format",
            got="differences or quantised numbers, in this library's own form",
            fix="Use it as it is.",
        )
    limits = None if model is None else BaseLimits.of(None, model, tokenizer)
    loaded = read_lora(
        folder, limits, name, with_magnitudes=kind != _DEFAULT_KEPT, drop_saved=drop_saved
    )
    adapter = loaded.adapter
    if model is not None:
        check_adapter_fits(adapter, model)
    check_effect(adapter)
    claims = read_claims(folder, name)
    base_name = claims.base if claims.base and not claims.base.startswith("…") else None
    kept = loaded.source.layout.kept
    updates, loss = _change_kind(loaded, kind, rank or DEFAULT_RANK, model)
    is_flagged = bool(loaded.source.config.get("fan_in_fan_out"))
    meta = AdapterMeta(
        kind=adapter.kind if kind == _DEFAULT_KEPT else kind,
        frozen_depth=adapter.frozen_depth,
        base_weights=adapter.base_weights,
    )
    if kind == _DEFAULT_WHOLE:
        write_differences(out, updates, meta)
    else:
        write_factors(
            out,
            updates,
            meta,
            transposed=is_flagged if model is None else _is_all_transposed(model, updates),
            use_rslora=loaded.source.settings.use_rslora and kind == _DEFAULT_KEPT,
            base_name=base_name,
        )
    written = load_adapter(out, name=name)
    return Converted(
        adapter=written,
        changed=check_effect(written),
        loss_fraction=loss,
        dropped=tuple(each.key for each in kept),
        notes=loaded.source.layout.notes,
    )


def _is_all_transposed(model: Any, updates: Mapping[str, LinearUpdate]) -> bool:
    return all(is_transposed(model.get_submodule(module)) for module in updates)


def _change_kind(
    loaded: LoadedLora, kind: str, rank: int, model: Any
) -> tuple[Mapping[str, LinearUpdate], float]:
    """Updates of the wanted kind, and the share of the difference that is lost, in [0, 1]."""
    if kind == _DEFAULT_KEPT:
        return loaded.adapter.updates, 0.0
    updates = {}
    total = lost = 0.0
    for module, update in loaded.adapter.updates.items():
        difference = _compute_difference(update, loaded.magnitudes.get(module), module, model)
        if kind == _DEFAULT_WHOLE:
            updates[module] = LinearUpdate(dense=difference)
            continue
        a, b = truncate(difference, rank)
        updates[module] = LinearUpdate(a=a.contiguous(), b=b.contiguous())
        total += float(difference.double().square().sum())
        lost += float((difference - b @ a).double().square().sum())
    return updates, (lost / total) ** 0.5 if total else 0.0


def _compute_difference(
    update: LinearUpdate, magnitude: torch.Tensor | None, module: str, model: Any
) -> torch.Tensor:
    """The exact weight difference, (D_out, D_in) float32.

    Of DoRA: `m * (W + P) / |W + P| - W`, P the product and |.| the norm of each row.

    Source: arXiv 2402.09353, eq. 5; rows are outputs, as PEFT computes it.
    """
    product = update.product()
    if magnitude is None:
        return product
    weight = weight_of(model.get_submodule(module)).detach().float()
    moved = weight + product
    norms = moved.norm(dim=1, keepdim=True)
    return magnitude.float().reshape(-1, 1) / norms * moved - weight
