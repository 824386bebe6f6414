"""What an adapter is in memory: per linear layer, a low-rank or dense change of its weight.

Everything is kept in nn.Linear orientation, (D_out, D_in), whatever the module stores.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from molora_fed.errors import AdapterError

__all__ = ["Adapter", "LinearUpdate", "Spectrum", "decompose", "truncate"]


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
        u: Left singular vectors, (D_out, min(D_out, D_in)) float32.
        values: Singular values, falling.
        vh: Right singular vectors, (min(D_out, D_in), D_in) float32.
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


def truncate(difference: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of a matrix by factors of at most rank R (truncated SVD).

    Args:
        difference: (D_out, D_in) float32.
        rank: R; a smaller dimension of the matrix lowers it.

    Returns:
        A (R, D_in) and B (D_out, R) with B @ A the approximation, see `Spectrum.factors`.
    """
    return decompose(difference).factors(rank)
