"""Products of layers that are given the same tensor, packed for few rows.

While decoding, a pass is mostly the reading of weights and the calling of operations. So layers
that are given the same tensor (queries, keys and values) multiply at once, and on a processor
their weights are packed for oneDNN, which reads them at the speed of the memory whatever the
number of rows up to about 16 (docs/causal_lm.md has the figures). A call of oneDNN takes 10
microseconds more than one of PyTorch's own library, so that few rows of a small weight are
multiplied by the latter, and many rows of any weight by the former, which is twice as fast.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.backends import mkldnn
from torch.nn import functional
from torch.nn.functional import pad

from molora_fed.errors import RoutingError

if TYPE_CHECKING:
    from molora_fed.inference.expert_layers import ExpertLinear

__all__ = ["FEW_ROWS", "Rows", "SharedInput", "find_even", "multiply", "multiply_and_add"]

FEW_ROWS = 64
"""Up to so many rows of a pass, weights are read packed and factors of all experts at once."""

_SMALL = 2**18  # a float32 weight of fewer numbers is not packed
_MUCH = 2**20  # multiplications from which on oneDNN repays its call with a float32 weight as it is
_WIDE = 1024  # outputs from which on experts multiply each their own factors B
_BLOCK_RANKS = 512  # up to so many, the 16-bit factors B of one group are one block-diagonal matrix


@dataclass
class Rows:
    """What the rows of the pass under way are; all layers of a model read the same.

    Attributes:
        expert: Index of each row's expert, (N,) int64; None where `gates` mix them.
        gates: Gates of the experts by row and position, (N, T, E); None where rows are experts.
        num_experts: E; 0 where no expert is added to the base.
        positions: T, of every row.
        is_folded: Whether rows are experts in order, as many rows of each: row e * B + b.
        merged: Weights of the experts' changes in every row, (E,), where they are read from weights
            they are merged into.
    """

    expert: Tensor | None = None
    gates: Tensor | None = None
    num_experts: int = 0
    positions: int = 1
    is_folded: bool = False
    merged: tuple[float, ...] | None = None
    _weights: dict[tuple[Any, ...], Tensor] = field(default_factory=dict, repr=False)

    @property
    def count(self) -> int:
        """N, rows of the pass."""
        rows = self.gates if self.expert is None else self.expert
        return 1 if rows is None else rows.shape[0]

    def check(self, inputs: Tensor) -> None:
        """Refuse a layer that is given other positions than the model.

        Args:
            inputs: What the layer is given, (N * T, D_in).

        Raises:
            RoutingError: If it is given more or fewer.
        """
        if inputs.shape[0] != self.count * self.positions:
            raise RoutingError(
                f"Cannot add experts to a layer: expected {self.count * self.positions} positions, "
                f"got {len(inputs)}. This model sends only some tokens through it; run its experts "
                "one by one."
            )

    def weigh(self, layout: tuple[int, ...], like: Tensor) -> Tensor:
        """Weight of every rank at every position of every row.

        Args:
            layout: The expert of each rank, R_all of them.
            like: Whose dtype and device.

        Returns:
            (N * T, R_all).
        """
        key = (layout, like.dtype)
        found = self._weights.get(key)
        if found is None:
            owner = torch.tensor(layout, device=like.device)
            if self.gates is not None:
                found = self.gates.flatten(0, 1)[:, owner].to(like.dtype)
            else:
                assert self.expert is not None
                own = (self.expert[:, None] == owner).to(like.dtype)
                found = own.repeat_interleave(self.positions, 0)
            self._weights[key] = found
        return found


def _can_pack(weight: Tensor) -> bool:
    """Whether oneDNN multiplies with this weight."""
    if weight.device.type != "cpu" or not mkldnn.is_available() or torch.is_grad_enabled():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def _is_worth_packing(like: Tensor, count: int) -> bool:
    """Whether few rows of a weight of so many numbers are multiplied faster if it is packed."""
    return (like.dtype != torch.float32 or count >= _SMALL) and _can_pack(like)


def _pack(weight: Tensor) -> Tensor:
    """A weight (D_out, D_in) laid out for few rows; the same where packing does not pay."""
    if not _is_worth_packing(weight, weight.numel()):
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 8)
    return packed


def _is_for_mkldnn(rows: int, weight: Tensor) -> bool:
    """Whether oneDNN is the faster way to multiply so many rows with a weight."""
    if weight.is_mkldnn:
        return True
    is_much = rows * weight.numel() >= _MUCH
    return is_much and weight.dtype == torch.float32 and _can_pack(weight)


def multiply(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`inputs @ weight.T + bias` of inputs (N, D_in), by oneDNN where that is the faster way."""
    if _is_for_mkldnn(inputs.shape[0], weight):
        found: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
        return found
    return functional.linear(inputs, weight, bias)


def _add_by_expert(
    output: Tensor, hidden: Tensor, at: int, b: Tensor, num_experts: int, even: tuple[int, int]
) -> None:
    """Add each expert's own product in place: its rows' own ranks times its own factor B.

    Args:
        output: (E * n, D_out).
        hidden: Products of all rows with the factors A of all experts, (E * n, ranks).
        at: Where this layer's ranks begin in `hidden`.
        b: (R_layer, D_out).
        num_experts: E.
        even: First and number of the experts that have factors.
    """
    first, count = even
    rows = len(output) // num_experts
    ranks = len(b) // count
    step = hidden.stride(0)
    # Expert i's rows and ranks: n rows further down and R ranks further right than i - 1's.
    own = hidden.as_strided(
        (count, rows, ranks),
        (rows * step + ranks, step, 1),
        hidden.storage_offset() + first * rows * step + at,
    )
    part = output.unflatten(0, (num_experts, rows))[first : first + count]
    part.baddbmm_(own, b.unflatten(0, (count, ranks)))


def find_even(owners: tuple[int, ...]) -> tuple[int, int] | None:
    """First and number of experts if they are consecutive and have as many ranks each."""
    experts = sorted(set(owners))
    if not experts:
        return None
    ranks = len(owners) // len(experts)
    first, count = experts[0], len(experts)
    even = tuple(e for e in range(first, first + count) for _ in range(ranks))
    return (first, count) if owners == even else None


def multiply_and_add(inputs: Tensor, weight: Tensor, other: Tensor) -> Tensor:
    """`other + inputs @ weight.T` of inputs (N, R), weight (D_out, R); `other` may be changed."""
    if _is_for_mkldnn(inputs.shape[0], weight):
        found: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, other, weight, None, "add")
        return found
    return other.addmm_(inputs, weight.t())


@dataclass(frozen=True, eq=False)
class _Factors:
    """All experts' factors B for the layers of one group, and how their ranks lie.

    Attributes:
        b: By layer (R_layer, D_out); None where a layer has none; one block-diagonal
            (R_all, sum of D_out) where `is_block`.
        sizes: R_layer by layer.
        layout: The expert of each of the R_all ranks.
        even: First and number of the experts that change all layers, consecutive and with as many
            ranks each; None elsewhere.
        is_block: Whether `b` is one matrix for all layers.
    """

    b: tuple[Tensor | None, ...]
    sizes: tuple[int, ...]
    layout: tuple[int, ...]
    even: tuple[int, int] | None
    is_block: bool


class SharedInput:
    """Layers that are given the same tensor, as queries, keys and values are.

    The first of them that is called multiplies for all.

    Attributes:
        layers: The layers, in the order they are called in.
    """

    def __init__(self, layers: Sequence["ExpertLinear"]) -> None:
        self.layers = tuple(layers)
        self._place = {id(layer): index for index, layer in enumerate(layers)}
        self._sizes = [layer.out_features for layer in layers]
        self._width = sum(self._sizes)
        self._weight: tuple[Tensor, Tensor | None] | None = None
        self._num_ranks = sum(len(layer.owners) for layer in layers)
        count = (self._width + self._num_ranks) * layers[0].in_features
        self._is_packed = _is_worth_packing(layers[0].matrix, count)
        self._factors: _Factors | None = None
        self._merged: tuple[tuple[float, ...], Tensor, Tensor | None] | None = None
        self._inputs: Tensor | None = None
        self._found: tuple[Tensor, ...] = ()

    def multiply(self, layer: "ExpertLinear", inputs: Tensor, rows: Rows) -> Tensor:
        """A layer's output (N * T, D_out) for inputs (N, T, D_in) or (N * T, D_in)."""
        if len(self.layers) == 1:
            return self._multiply_all(inputs, rows)[0]
        if self._inputs is not inputs:
            self._found = self._multiply_all(inputs, rows)
            self._inputs = inputs
        found = self._found[self._place[id(layer)]]
        if layer is self.layers[-1]:
            self._inputs, self._found = None, ()
        return found

    def _multiply_all(self, inputs: Tensor, rows: Rows) -> tuple[Tensor, ...]:
        flat = inputs.reshape(-1, inputs.shape[-1])
        if rows.merged is not None:
            return self._split(multiply(flat, *self._merge(rows.merged)))
        weight, bias = self._get_weight()
        if not rows.num_experts and not self._is_packed:
            bias = None if bias is None else bias[: self._width]
            return self._split(multiply(flat, weight[: self._width], bias))
        output = multiply(flat, weight, bias)
        if not self._num_ranks:
            return self._split(output)
        # Packed, the factors A are a part of the weight; kept apart, they took memory again.
        output, hidden = output.split_with_sizes([self._width, self._num_ranks], -1)
        if not rows.num_experts:
            return self._split(output)
        rows.check(flat)
        factors = self._get_factors()
        own = hidden * rows.weigh(factors.layout, flat)
        if factors.is_block and factors.b[0] is not None:
            return self._split(output.add_(multiply(own, factors.b[0])))
        outputs, at = self._split(output), 0
        for part, b, ranks in zip(outputs, factors.b, factors.sizes, strict=True):
            if b is None:
                continue
            if factors.even is not None and rows.is_folded and part.shape[1] >= _WIDE:
                _add_by_expert(part, hidden, at, b, rows.num_experts, factors.even)
            else:
                part.addmm_(own[:, at : at + ranks], b)
            at += ranks
        return outputs

    def _split(self, output: Tensor) -> tuple[Tensor, ...]:
        """The layers' own outputs."""
        if len(self.layers) == 1:
            return (output,)
        return tuple(output.split_with_sizes(self._sizes, -1))

    def _get_weight(self) -> tuple[Tensor, Tensor | None]:
        """All layers' weights with all experts' factors A below, and biases; made once."""
        if self._weight is None:
            parts = [layer.matrix.detach() for layer in self.layers]
            parts += [layer.a.detach() for layer in self.layers if layer.owners]
            bias = self._make_bias()
            if bias is not None:
                bias = pad(bias, (0, self._num_ranks))
            self._weight = _pack(torch.cat(parts)), bias
        return self._weight

    def _make_bias(self) -> Tensor | None:
        """All layers' biases, zeros where one has none; None if none has one."""
        biases = [layer.bias for layer in self.layers]
        if all(bias is None for bias in biases):
            return None
        return torch.cat(
            [
                layer.matrix.new_zeros(layer.out_features) if bias is None else bias.detach()
                for layer, bias in zip(self.layers, biases, strict=True)
            ]
        )

    def _merge(self, weights: tuple[float, ...]) -> tuple[Tensor, Tensor | None]:
        """All layers' weights with the experts' weighed products, and biases; of one at a time."""
        if self._merged is None or self._merged[0] != weights:
            parts = []
            for layer in self.layers:
                ranks = [rank for rank, owner in enumerate(layer.owners) if weights[owner]]
                weight = layer.matrix.detach()
                if ranks:
                    share = [weights[layer.owners[rank]] for rank in ranks]
                    b = layer.b.detach()[:, ranks].float() * torch.tensor(share).to(weight.device)
                    product = b @ layer.a.detach()[ranks].float()
                    weight = (weight.float() + product).to(weight.dtype)
                parts.append(weight)
            self._merged = None  # the former one's memory comes first
            self._merged = (weights, _pack(torch.cat(parts)), self._make_bias())
        return self._merged[1:]

    def _get_factors(self) -> _Factors:
        """All experts' factors B, made once."""
        if self._factors is None:
            self._factors = self._make_factors()
        return self._factors

    def _make_factors(self) -> _Factors:
        changed = [layer for layer in self.layers if layer.owners]
        layout = tuple(owner for layer in changed for owner in layer.owners)
        b = [
            layer.b.detach() if layer.owners else layer.matrix.new_zeros(layer.out_features, 0)
            for layer in self.layers
        ]
        # One product of 16-bit numbers costs its call, whatever its size.
        is_block = b[0].dtype != torch.float32 and len(layout) <= _BLOCK_RANKS
        evens = {find_even(layer.owners) for layer in changed}
        return _Factors(
            b=(_pack(torch.block_diag(*b)),)
            if is_block
            else tuple(part.t().contiguous() if part.shape[1] else None for part in b),
            even=evens.pop() if len(evens) == 1 else None,
            sizes=tuple(part.shape[1] for part in b),
            layout=layout,
            is_block=is_block,
        )
