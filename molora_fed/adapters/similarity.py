"""How alike two adapters are as changes of the base, whatever their kind, precision and scale."""

import torch
from torch import Tensor

from molora_fed.adapters.updates import Adapter, LinearUpdate

__all__ = ["compute_inner_product", "compute_similarity"]


def compute_inner_product(one: LinearUpdate, other: LinearUpdate) -> float:
    """Inner product of two weight differences (Frobenius), without multiplying factors out.

    Two updates of ranks R and S take O(R S (D_in + D_out)) steps, a dense one O(D_in D_out) times
    the other's rank. In float64, so that numbers near the end of float32 have squares.

    Args:
        one: (D_out, D_in).
        other: Of the same shape.
    """
    a, b, c, d = one.a, one.b, other.a, other.b
    if a is not None and b is not None and c is not None and d is not None:
        # <B A, D C> = <D^T B, C A^T>
        total = ((d.double().T @ b.double()) * (c.double() @ a.double().T)).sum()
    elif a is not None and b is not None:
        total = ((_dense(other) @ a.double().T) * b.double()).sum()
    elif c is not None and d is not None:
        total = ((_dense(one) @ c.double().T) * d.double()).sum()
    else:
        total = (_dense(one) * _dense(other)).sum()
    return float(total) * one.scale * other.scale


def _dense(update: LinearUpdate) -> Tensor:
    return torch.as_tensor(update.dense).double()


def compute_similarity(adapter: Adapter, other: Adapter) -> float:
    """The cosine of two adapters' weight differences in the middle of the first one's layers.

    Each layer's cosine, without its sign, counts as much as the layer's share of the first
    adapter's squared norm; what is returned is their weighted median, so that neither a factor, nor
    another factor for every layer, nor layers added or left out hide a copy. A layer that the
    other does not change, or of another shape, has cosine 0. Biases do not count.

    Args:
        adapter: Whose layers count.
        other: What it is compared with.

    Returns:
        In [0, 1]; 0 if the adapter changes nothing.

    Source: own definition; what copies and honest twins come to is in docs/protocol.md.
    """
    cosines = []
    for name, update in adapter.updates.items():
        squared = compute_inner_product(update, update)
        twin = other.updates.get(name)
        cosine = 0.0
        if twin is not None and twin.shape == update.shape and squared > 0:
            norm = squared**0.5 * max(compute_inner_product(twin, twin), 0.0) ** 0.5
            cosine = abs(compute_inner_product(update, twin)) / norm if norm > 0 else 0.0
        cosines.append((min(cosine, 1.0), max(squared, 0.0)))
    half = sum(weight for _, weight in cosines) / 2
    below = 0.0
    for cosine, weight in sorted(cosines):
        below += weight
        if below >= half > 0:
            return cosine
    return 0.0
