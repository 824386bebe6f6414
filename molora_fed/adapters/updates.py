"""An adapter in memory: a change of each linear layer's weight, and averages of such changes.

Everything is kept in nn.Linear orientation, (D_out, D_in), whatever the module stores.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from molora_fed.errors import AdapterError, IncompatibleAdapterError
from molora_fed.storage.files import canonical_json, hash_bytes

__all__ = [
    "Adapter",
    "LinearUpdate",
    "Spectrum",
    "average_adapters",
    "decompose",
    "decompose_update",
    "merge_average",
    "merge_products",
    "truncate",
]


@dataclass(frozen=True, eq=False)
class LinearUpdate:
    """The change of one linear layer: `scale * b @ a`, or `dense`; and of its bias.

    Attributes:
        a: Low-rank factor A, (R, D_in); None if dense.
        b: Low-rank factor B, (D_out, R); None if dense.
        scale: Factor of the product, unitless; 1 if dense.
        dense: Weight difference, (D_out, D_in); None if low-rank.
        bias: Bias difference, (D_out,); None if the bias does not change.
    """

    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    dense: Tensor | None = None
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        a, b = self.a, self.b
        if a is not None and b is not None and self.dense is None:
            if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
                raise AdapterError(
                    "Cannot build an update: expected factors (R, D_in) and (D_out, R), got "
                    f"{tuple(a.shape)} and {tuple(b.shape)}. Correct the factors."
                )
        elif a is not None or b is not None or self.dense is None or self.scale != 1.0:
            raise AdapterError(
                "Cannot build an update: expected both factors, or one dense difference of scale "
                "1, got something else. Pass a and b, or dense alone."
            )

    @property
    def rank(self) -> int | None:
        """R of a low-rank update; None if dense."""
        return None if self.a is None else int(self.a.shape[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """(D_out, D_in) of the weight it changes."""
        if self.a is not None and self.b is not None:
            return (int(self.b.shape[0]), int(self.a.shape[1]))
        return () if self.dense is None else tuple(self.dense.shape)

    def product(self) -> Tensor:
        """The weight difference itself, (D_out, D_in) float32."""
        if self.a is not None and self.b is not None:
            return torch.mul(self.b.float() @ self.a.float(), self.scale)
        return torch.as_tensor(self.dense).float()

    def tensors(self) -> dict[str, Tensor]:
        """The tensors it is made of, by attribute name."""
        parts = {"a": self.a, "b": self.b, "dense": self.dense, "bias": self.bias}
        return {name: tensor for name, tensor in parts.items() if tensor is not None}


@dataclass(frozen=True, eq=False)
class Adapter:
    """A whole adapter: what it changes, and where it came from.

    Attributes:
        name: Name for people, used in errors.
        kind: Adapter kind, e.g. "lora".
        frozen_depth: K it declares; blocks below it are not changed.
        updates: Updates by full module name of the base, e.g. "model.layers.0.mlp.up_proj".
        hash: SHA-256 by content (of its files, where it has files), lower-case hex.
        num_bytes: Bytes of its weights file, or of its tensors where it has none.
        base_weights: Fingerprint of the base it says it was trained on; empty if it does not say.
        targets: Module names or name endings its config declares as changed; every linear layer
            that matches must have an update. None if the config restricts them further.
    """

    name: str
    kind: str
    frozen_depth: int
    updates: Mapping[str, LinearUpdate] = field(repr=False)
    hash: str
    num_bytes: int
    base_weights: str = ""
    targets: tuple[str, ...] | None = field(default=None, repr=False)

    @property
    def max_rank(self) -> int:
        """Largest rank of its low-rank updates; 0 if all are dense."""
        return max((update.rank or 0 for update in self.updates.values()), default=0)


@dataclass(frozen=True, eq=False)
class Spectrum:
    """A matrix as its singular value decomposition, `(u * values) @ vh`.

    Attributes:
        u: Left singular vectors, (D_out, N) float32; N = min(D_out, D_in), or R of factors.
        values: Singular values, falling, (N,).
        vh: Right singular vectors, (N, D_in) float32.
    """

    u: Tensor
    values: Tensor
    vh: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(D_out, D_in) of the matrix."""
        return (self.u.shape[0], self.vh.shape[1])

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """The best factors A (R, D_in), B (D_out, R); a smaller dimension lowers R.

        Both carry the root of the singular values, so that their numbers are of like size.
        """
        kept = min(rank, len(self.values))
        roots = self.values[:kept].sqrt()
        return roots[:, None] * self.vh[:kept], self.u[:, :kept] * roots


def decompose(difference: Tensor) -> Spectrum:
    """Singular value decomposition of a difference, (D_out, D_in) float32."""
    return Spectrum(*torch.linalg.svd(difference, full_matrices=False))


def decompose_update(update: LinearUpdate) -> Spectrum:
    """Singular value decomposition of an update's weight difference, (D_out, D_in).

    Of factors it takes O(R^2 (D_in + D_out)) steps: they are not multiplied out.

    Args:
        update: Its bias does not count.
    """
    if update.a is None or update.b is None:
        return decompose(update.product())
    left, upper = torch.linalg.qr(update.b.float())
    right, lower = torch.linalg.qr(update.a.float().T)
    inner = decompose(torch.mul(upper @ lower.T, update.scale))
    return Spectrum(left @ inner.u, inner.values, inner.vh @ right.T)


def truncate(difference: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of a matrix by factors of at most rank R (truncated SVD).

    Args:
        difference: (D_out, D_in) float32.
        rank: R; a smaller dimension of the matrix lowers it.

    Returns:
        A (R, D_in) and B (D_out, R) with B @ A the approximation, see `Spectrum.factors`.
    """
    return decompose(difference).factors(rank)


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
