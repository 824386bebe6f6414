"""Merges adapters on what they do to the weights, never on their factors."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from molora_fed.adapters.updates import Adapter, LinearUpdate
from molora_fed.errors import AdapterError, IncompatibleAdapterError
from molora_fed.files import canonical_json, hash_bytes

__all__ = ["average_adapters", "merge_average", "merge_products"]


def average_adapters(
    adapters: Sequence[Adapter], weights: Sequence[float] | None = None, *, name: str = "average"
) -> Adapter:
    """Average the weight differences `scale * B @ A` (and biases) of several adapters.

    The average of factors is something else: mean(B) @ mean(A) is not mean(B @ A). A module that
    an adapter does not change counts as a difference of zero. The order does not matter: terms are
    added in the order of the adapters' hashes.

    Args:
        adapters: Adapters of one base; kinds and ranks may differ.
        weights: One for each adapter, finite, summing to 1; equal by default.
        name: Name of the result, for errors and reports.

    Returns:
        A dense adapter of kind "delta", float32.

    Raises:
        AdapterError: If there is no adapter, or the weights do not fit.
        IncompatibleAdapterError: If shapes or base fingerprints differ.

    Source: own derivation; the mean of the fine-tuned weights, arXiv 2203.05482, on B @ A.
    """
    if weights is None:
        weights = [1.0 / max(len(adapters), 1)] * len(adapters)
    if not adapters or len(weights) != len(adapters) or not math.isclose(sum(weights), 1.0):
        raise AdapterError(
            f"Cannot average adapters: expected at least one and as many weights, summing to 1, "
            f"got {len(adapters)} adapters and weights {list(weights)}. Correct the weights."
        )
    terms = sorted(zip(adapters, weights, strict=True), key=lambda term: term[0].hash)
    ordered = [weight for _, weight in terms]

    def combine(differences: Sequence[Tensor], _which: str) -> Tensor:
        total = torch.zeros_like(differences[0])
        for difference, weight in zip(differences, ordered, strict=True):
            total.add_(difference, alpha=weight)
        return total

    return merge_products(
        [adapter for adapter, _ in terms], combine, name=name, recipe=["average", ordered]
    )


def merge_average(adapters: Sequence[Adapter], *, name: str, seed: int) -> Adapter:
    """Average with equal weights, as a registered merge; the seed decides nothing.

    Args:
        adapters: Adapters of one base; kinds and ranks may differ.
        name: Name of the result.
        seed: Unused: nothing is drawn.

    Raises:
        AdapterError: If there is no adapter.
        IncompatibleAdapterError: If shapes or base fingerprints differ.

    Source: see `average_adapters`.
    """
    return average_adapters(adapters, name=name)


def merge_products(
    adapters: Sequence[Adapter],
    combine: Callable[[Sequence[Tensor], str], Tensor],
    *,
    name: str,
    recipe: Sequence[Any],
) -> Adapter:
    """Merge adapters on their weight differences `scale * B @ A` (and biases), module by module.

    A module or bias that an adapter does not change is a difference of zero. The order of the
    adapters does not matter: `combine` gets them in the order of their hashes.

    Args:
        adapters: Adapters of one base; kinds and ranks may differ.
        combine: Turns one float32 difference per adapter, all of one shape, and the full name of
            the weight or bias into the merged difference, same shape.
        name: Name of the result, for errors and reports.
        recipe: JSON values that, with the adapters, decide the result; they decide its hash.

    Returns:
        A dense adapter of kind "delta", float32.

    Raises:
        AdapterError: If there is no adapter.
        IncompatibleAdapterError: If shapes or base fingerprints differ.
    """
    if not adapters:
        raise AdapterError(
            f"Cannot merge adapters into '{name}': expected at least one, got none. Name some."
        )
    _check_alike(adapters)
    ordered = sorted(adapters, key=lambda adapter: adapter.hash)
    updates = {}
    for module in dict.fromkeys(module for adapter in ordered for module in adapter.updates):
        found = [adapter.updates.get(module) for adapter in ordered]
        shape = next(update.shape for update in found if update is not None)
        dense = [torch.zeros(shape) if update is None else update.product() for update in found]
        biases = [
            None if update is None or update.bias is None else update.bias for update in found
        ]
        bias = None
        if any(part is not None for part in biases):
            whole = [torch.zeros(shape[0]) if part is None else part.float() for part in biases]
            bias = combine(whole, f"{module}.bias")
        updates[module] = LinearUpdate(dense=combine(dense, f"{module}.weight"), bias=bias)
    return Adapter(
        name=name,
        kind="delta",
        frozen_depth=min(adapter.frozen_depth for adapter in ordered),
        updates=updates,
        hash=hash_bytes(canonical_json([list(recipe), [adapter.hash for adapter in ordered]])),
        num_bytes=sum(t.nbytes for u in updates.values() for t in u.tensors().values()),
        base_weights=next((a.base_weights for a in ordered if a.base_weights), ""),
    )


def _check_alike(adapters: Sequence[Adapter]) -> None:
    """Refuse adapters of different bases."""
    bases = {a.base_weights: a.name for a in adapters if a.base_weights}
    if len(bases) > 1:
        found = ", ".join(f"'{n}' on {base[:12]}" for base, n in sorted(bases.items()))
        raise IncompatibleAdapterError(
            f"Cannot merge adapters: expected one base, got {found}. Leave the others out."
        )
    first: dict[str, tuple[str, tuple[int, ...]]] = {}
    for adapter in adapters:
        for module, update in adapter.updates.items():
            other, shape = first.setdefault(module, (adapter.name, update.shape))
            if shape != update.shape:
                raise IncompatibleAdapterError(
                    f"Cannot merge adapter '{adapter.name}': expected shape {shape} for "
                    f"'{module}' as in '{other}', got {update.shape}. Leave one of them out."
                )
