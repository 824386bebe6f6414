"""Averages adapters on what they do to the weights, never on their factors."""

import math
from collections.abc import Sequence

import torch

from molora_fed.adapters.updates import Adapter, LinearUpdate
from molora_fed.errors import AdapterError, IncompatibleAdapterError
from molora_fed.files import canonical_json, hash_bytes

__all__ = ["average_adapters"]


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
    _check_alike(adapters)
    updates = {}
    for module in dict.fromkeys(module for adapter, _ in terms for module in adapter.updates):
        found = [(a.updates[module], w) for a, w in terms if module in a.updates]
        dense = torch.zeros(found[0][0].shape)
        for update, weight in found:
            dense.add_(update.product(), alpha=weight)
        biases = [(u.bias.float(), w) for u, w in found if u.bias is not None]
        bias = torch.stack([b * w for b, w in biases]).sum(dim=0) if biases else None
        updates[module] = LinearUpdate(dense=dense, bias=bias)
    return Adapter(
        name=name,
        kind="delta",
        frozen_depth=min(adapter.frozen_depth for adapter in adapters),
        updates=updates,
        hash=hash_bytes(canonical_json(["average", [[a.hash, w] for a, w in terms]])),
        num_bytes=sum(t.nbytes for u in updates.values() for t in u.tensors().values()),
        base_weights=next((a.base_weights for a in adapters if a.base_weights), ""),
    )


def _check_alike(adapters: Sequence[Adapter]) -> None:
    """Refuse adapters of different bases."""
    bases = {a.base_weights: a.name for a in adapters if a.base_weights}
    if len(bases) > 1:
        found = ", ".join(f"'{n}' on {base[:12]}" for base, n in sorted(bases.items()))
        raise IncompatibleAdapterError(
            f"Cannot average adapters: expected one base, got {found}. Leave the others out."
        )
    first: dict[str, tuple[str, tuple[int, ...]]] = {}
    for adapter in adapters:
        for module, update in adapter.updates.items():
            other, shape = first.setdefault(module, (adapter.name, update.shape))
            if shape != update.shape:
                raise IncompatibleAdapterError(
                    f"Cannot average adapter '{adapter.name}': expected shape {shape} for "
                    f"'{module}' as in '{other}', got {update.shape}. Leave one of them out."
                )
