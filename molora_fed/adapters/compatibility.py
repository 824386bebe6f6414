"""Whether an adapter fits a base model, and the model with it applied."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from molora_fed.adapters.peft_config import matches_target
from molora_fed.adapters.updates import Adapter, LinearUpdate
from molora_fed.charter import AdapterRules
from molora_fed.errors import AdapterError, IncompatibleAdapterError
from molora_fed.models.layout import (
    adaptable_modules,
    bias_of,
    block_index,
    decoder_blocks,
    weight_of,
)

__all__ = [
    "applied",
    "check_adapter_fits",
    "check_effect",
    "count_changed",
    "find_misfits",
    "find_non_finite",
]


_SHOWN = 5


def find_non_finite(adapter: Adapter) -> list[str]:
    """Name every tensor that holds NaN or infinity, e.g. "model.layers.0.mlp.up_proj.a"."""
    return [
        f"{name}.{part}"
        for name, update in adapter.updates.items()
        for part, tensor in update.tensors().items()
        if not bool(torch.isfinite(tensor).all())
    ]


def count_changed(adapter: Adapter) -> int:
    """Number of modules whose change is not exactly zero: neither factor, or no difference is."""
    return sum(_is_change(update) for update in adapter.updates.values())


def _is_change(update: LinearUpdate) -> bool:
    if update.bias is not None and bool(update.bias.any()):
        return True
    parts = [part for part in (update.a, update.b, update.dense) if part is not None]
    return update.scale != 0 and all(bool(part.any()) for part in parts)


def find_misfits(adapter: Adapter, model: Any, *, rules: AdapterRules | None = None) -> list[str]:
    """Say everything about names, shapes, dtypes and ranks that does not fit the model.

    Args:
        adapter: The adapter to check.
        model: The base model, as loaded.
        rules: The charter's rules; without them only the adapter's own frozen depth counts.

    Returns:
        One phrase per offender ("... expected ..., got ..."); empty if it fits.
    """
    depth = max(adapter.frozen_depth, rules.frozen_depth if rules else 0)
    prefix, blocks = decoder_blocks(model)
    if depth >= len(blocks):
        return [f"frozen depth: expected below the base's {len(blocks)} blocks, got {depth}"]
    allowed = adaptable_modules(model, depth)
    modules = dict(model.named_modules())
    offenders: list[str] = []
    if rules is not None and adapter.kind not in rules.kinds:
        offenders.append(f"kind: expected one of {', '.join(rules.kinds)}, got {adapter.kind}")
    if rules is not None and adapter.max_rank > rules.max_rank:
        offenders.append(f"rank: expected at most {rules.max_rank}, got {adapter.max_rank}")
    if not adapter.updates:
        offenders.append("updates: expected at least one, got none")
    for name, update in adapter.updates.items():
        module = allowed.get(name)
        if module is None:
            index = block_index(name, prefix)
            if index is not None and index < depth:
                got = f"block {index} below the frozen depth {depth}"
            else:
                got = "another module" if name in modules else "none of that name"
            offenders.append(f"{name}: expected a linear layer in blocks >= {depth}, got {got}")
        else:
            offenders += _compare(name, update, module)
    if adapter.targets is not None:
        targets = frozenset(adapter.targets)
        offenders += [
            f"{name}: expected an update, as its config names this module, got none"
            for name in adaptable_modules(model, 0)
            if name not in adapter.updates and matches_target(name, targets)
        ]
    return offenders


def _compare(name: str, update: LinearUpdate, module: Any) -> list[str]:
    """Phrases on what of one update does not fit its module."""
    offenders = []
    shape = tuple(weight_of(module).shape)
    if update.shape != shape:
        offenders.append(f"{name}: expected a change of shape {shape}, got {update.shape}")
    if not weight_of(module).dtype.is_floating_point:
        offenders.append(f"{name}: expected a floating-point weight, got {module.weight.dtype}")
    for part, tensor in update.tensors().items():
        if not tensor.dtype.is_floating_point:
            offenders.append(f"{name}.{part}: expected floating point, got {tensor.dtype}")
    if update.bias is not None:
        bias = bias_of(module)
        expected = None if bias is None else tuple(bias.shape)
        if expected != tuple(update.bias.shape):
            offenders.append(
                f"{name}.bias: expected {expected or 'no bias'}, got {tuple(update.bias.shape)}"
            )
    return offenders


def check_adapter_fits(
    adapter: Adapter,
    model: Any,
    *,
    rules: AdapterRules | None = None,
    finite: bool = True,
) -> None:
    """Refuse an adapter that does not fit; all offenders are collected first.

    Args:
        adapter: The adapter to check.
        model: The base model, as loaded.
        rules: The charter's rules, if a charter applies.
        finite: Whether every number is read, too, to refuse NaN and infinity, and an adapter that
            changes nothing.

    Raises:
        IncompatibleAdapterError: Naming the adapter and every offender, in one line.
        AdapterError: If it changes nothing.
    """
    offenders = find_misfits(adapter, model, rules=rules)
    if finite:
        offenders += [
            f"{name}: expected finite numbers, got NaN or infinity"
            for name in find_non_finite(adapter)
        ]
    if offenders:
        more = len(offenders) - _SHOWN
        shown = "; ".join(offenders[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")
        raise IncompatibleAdapterError(
            f"Cannot use adapter '{adapter.name}' on base '{type(model).__name__}': {shown}. "
            "Export it again from training on this base."
        )
    if finite:
        check_effect(adapter)


def check_effect(adapter: Adapter) -> int:
    """Refuse an adapter that changes nothing.

    Returns:
        The number of modules that it changes.

    Raises:
        AdapterError: If every product is exactly zero.
    """
    changed = count_changed(adapter)
    if changed:
        return changed
    raise AdapterError(
        f"Cannot use adapter '{adapter.name}': expected a change of the base, got one that changes "
        f"0 of {len(adapter.updates)} modules (lora_B or every difference is zero). It was saved "
        "before training, or from another model than the one trained: save the trained one."
    )


@contextmanager
def applied(model: Any, adapter: Adapter | None) -> Iterator[Any]:
    """Run a block with the adapter's updates added to the model's weights, in place.

    The weights return bit-exactly (from copies, not by subtraction); `requires_grad`, train mode
    and the adapter are untouched. One copy of the changed weights is held meanwhile.

    Args:
        model: The base model, as loaded.
        adapter: What to add; None adds nothing, so that the base can be an expert.

    Yields:
        The model itself.

    Raises:
        IncompatibleAdapterError: If the adapter does not fit the model; nothing is changed.
    """
    if adapter is None:
        yield model
        return
    check_adapter_fits(adapter, model, finite=False)
    saved: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for name, update in adapter.updates.items():
                module = model.get_submodule(name)
                _add(weight_of(module), update.product(), saved)
                if update.bias is not None:
                    _add(bias_of(module), update.bias, saved)
        yield model
    finally:
        with torch.no_grad():
            for target, copy in saved:
                target.copy_(copy)


def _add(target: Tensor, difference: Tensor, saved: list[tuple[Tensor, Tensor]]) -> None:
    """Add in float32, so that a bfloat16 weight is rounded once."""
    saved.append((target, target.detach().clone()))
    total = target.detach().float() + difference.to(device=target.device, dtype=torch.float32)
    target.copy_(total)
