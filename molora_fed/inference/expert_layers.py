"""Linear layers that hold all experts' changes, and a base whose layers are replaced by them.

A pass has rows, each of one expert (or of a mixture of them). A layer computes

    y = W x + sum_r w[row, r] * b_r (a_r . x)

with the experts' low-rank factors one after the other along the rank: whatever the number of
experts, a layer takes one product with the base's weight and two with the factors. The weights of
the ranks say which experts a row is: 1 at its own expert's ranks and 0 elsewhere where rows are
experts, the gates where one row is a mixture on the product B A.

While decoding, a pass is mostly the reading of weights and the calling of operations. So layers
that are given the same tensor (queries, keys and values) multiply at once, and on a processor
their weights are packed for oneDNN, which reads them at the speed of the memory whatever the
number of rows up to about 16 (docs/causal_lm.md has the figures). A call of oneDNN takes 10
microseconds more than one of PyTorch's own library, so that few rows of a small weight are
multiplied by the latter, and many rows of any weight by the former, which is twice as fast.
"""

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends import mkldnn
from torch.nn import functional
from torch.nn.functional import pad
from transformers.pytorch_utils import Conv1D

from molora_fed.adapters.updates import Adapter, LinearUpdate
from molora_fed.errors import RoutingError
from molora_fed.models.layout import is_transposed
from molora_fed.models.states import evaluating, make_probe

__all__ = [
    "ExpertLinear",
    "LayerPlan",
    "Rows",
    "SharedInput",
    "find_shared_inputs",
    "plan_layers",
    "put_experts_in",
    "share_weights",
]

FEW_ROWS = 64
"""Up to so many rows of a pass, weights are read packed and factors of all experts at once."""

_SMALL = 2**18  # a float32 weight of fewer numbers is not packed
_MUCH = 2**20  # multiplications from which on oneDNN repays its call with a float32 weight as it is
_WIDE = 1024  # outputs from which on experts multiply each their own factors B
_BLOCK_RANKS = 512  # up to so many, the 16-bit factors B of one group are one block-diagonal matrix
_SELECTIONS = 4  # sets of experts whose factors are kept apart


@dataclass
class Rows:
    """What the rows of the pass under way are; all layers of a model read the same.

    Attributes:
        expert: Index of each row's expert, (N,) int64; None where `gates` mix them.
        gates: Gates of the experts by row and position, (N, T, E); None where rows are experts.
        num_experts: E; 0 where no expert is added to the base.
        positions: T, of every row.
        is_folded: Whether rows are experts in order, as many rows of each: row e * B + b.
        selection: Experts that occur, in rising order; None for all.
        is_merged: Whether the one expert that occurs is read from weights it is merged into.
    """

    expert: Tensor | None = None
    gates: Tensor | None = None
    num_experts: int = 0
    positions: int = 1
    is_folded: bool = False
    selection: tuple[int, ...] | None = None
    is_merged: bool = False
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


def _multiply(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
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


def _find_even(owners: tuple[int, ...]) -> tuple[int, int] | None:
    """First and number of experts if they are consecutive and have as many ranks each."""
    experts = sorted(set(owners))
    if not experts:
        return None
    ranks = len(owners) // len(experts)
    first, count = experts[0], len(experts)
    even = tuple(e for e in range(first, first + count) for _ in range(ranks))
    return (first, count) if owners == even else None


def _multiply_and_add(inputs: Tensor, weight: Tensor, other: Tensor) -> Tensor:
    """`other + inputs @ weight.T` of inputs (N, R), weight (D_out, R); `other` may be changed."""
    if _is_for_mkldnn(inputs.shape[0], weight):
        found: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, other, weight, None, "add")
        return found
    return other.addmm_(inputs, weight.t())


@dataclass(frozen=True, eq=False)
class _Factors:
    """Low-rank factors of some experts for the layers of one group.

    Attributes:
        a: (R_all, D_in) over all layers.
        packed_a: The same, packed.
        b: By layer (R_layer, D_out); None where a layer has none; one block-diagonal
            (R_all, sum of D_out) where `is_block`.
        sizes: R_layer by layer.
        layout: The expert of each of the R_all ranks.
        even: First and number of the experts that change all layers, consecutive and with as many
            ranks each; None elsewhere.
        is_block: Whether `b` is one matrix for all layers.
        is_single: Whether all ranks are of one expert.
    """

    a: Tensor
    packed_a: Tensor
    b: tuple[Tensor | None, ...]
    sizes: tuple[int, ...]
    layout: tuple[int, ...]
    even: tuple[int, int] | None
    is_block: bool
    is_single: bool


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
        # Without and with the factors A of all experts.
        self._weights: dict[bool, tuple[Tensor, Tensor | None]] = {}
        self._num_ranks = sum(len(layer.owners) for layer in layers)
        count = (self._width + self._num_ranks) * layers[0].in_features
        self._is_packed = _is_worth_packing(layers[0].matrix, count)
        self._factors: OrderedDict[tuple[int, ...] | None, _Factors | None] = OrderedDict()
        self._merged: tuple[int, Tensor, Tensor | None] | None = None
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
        if rows.is_merged and rows.selection is not None:
            return self._split(_multiply(flat, *self._merge(rows.selection[0])))
        if not rows.num_experts:
            # Packed, the factors A are a part of the weight; kept apart, they took memory again.
            output = _multiply(flat, *self._get_weight(self._is_packed and self._num_ranks > 0))
            return self._split(output[:, : self._width])
        factors = self._select(rows.selection)
        has_all = rows.selection is None and factors is not None
        output = _multiply(flat, *self._get_weight(has_all))
        if factors is None:
            return self._split(output)
        rows.check(flat)
        if has_all:
            output, hidden = output.split_with_sizes([self._width, self._num_ranks], -1)
        if not has_all:
            hidden = _multiply(flat, factors.packed_a)
        own = hidden
        if not factors.is_single:
            own = hidden * rows.weigh(factors.layout, flat)
        if factors.is_block and factors.b[0] is not None:
            return self._split(output.add_(_multiply(own, factors.b[0])))
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

    def _get_weight(self, has_factors: bool) -> tuple[Tensor, Tensor | None]:
        """All layers' weights and biases, alone or with all experts' factors A; made once."""
        found = self._weights.get(has_factors)
        if found is not None:
            return found
        if self._num_ranks and not has_factors and not self._is_packed:
            weight, bias = self._get_weight(True)
            bias = None if bias is None else bias[: self._width]
            self._weights[False] = weight[: self._width], bias
        else:
            parts = [layer.matrix.detach() for layer in self.layers]
            bias = self._make_bias()
            if has_factors:
                parts += [layer.a.detach() for layer in self.layers if layer.owners]
                if bias is not None:
                    bias = pad(bias, (0, self._num_ranks))
            self._weights[has_factors] = _pack(torch.cat(parts)), bias
        return self._weights[has_factors]

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

    def _merge(self, expert: int) -> tuple[Tensor, Tensor | None]:
        """All layers' weights with one expert's product added, and biases; of one at a time."""
        if self._merged is None or self._merged[0] != expert:
            parts = []
            for layer in self.layers:
                ranks = [rank for rank, owner in enumerate(layer.owners) if owner == expert]
                weight = layer.matrix.detach()
                if ranks:
                    product = layer.b.detach()[:, ranks].float() @ layer.a.detach()[ranks].float()
                    weight = (weight.float() + product).to(weight.dtype)
                parts.append(weight)
            self._merged = None  # the former one's memory comes first
            self._merged = (expert, _pack(torch.cat(parts)), self._make_bias())
        return self._merged[1:]

    def _select(self, selection: tuple[int, ...] | None) -> _Factors | None:
        """The factors of some experts, made at their first use."""
        if selection in self._factors:
            if len(self._factors) > 1:
                self._factors.move_to_end(selection)
            return self._factors[selection]
        made = self._make_factors(selection)
        self._factors[selection] = made
        if len(self._factors) > _SELECTIONS:
            self._factors.popitem(last=False)
        return made

    def _make_factors(self, selection: tuple[int, ...] | None) -> _Factors | None:
        kept = [
            [r for r, e in enumerate(layer.owners) if selection is None or e in selection]
            for layer in self.layers
        ]
        layout = tuple(
            layer.owners[rank]
            for layer, ranks in zip(self.layers, kept, strict=True)
            for rank in ranks
        )
        if not layout:
            return None
        chosen = [(layer, ranks) for layer, ranks in zip(self.layers, kept, strict=True) if ranks]
        a = torch.cat([layer.a.detach()[ranks] for layer, ranks in chosen])
        b = [
            layer.b.detach()[:, ranks] if ranks else layer.matrix.new_zeros(layer.out_features, 0)
            for layer, ranks in zip(self.layers, kept, strict=True)
        ]
        # One product of 16-bit numbers costs its call, whatever its size.
        is_block = a.dtype != torch.float32 and len(layout) <= _BLOCK_RANKS
        if is_block:
            b = [torch.block_diag(*b)]
        evens = {_find_even(layer.owners) for layer, _ in chosen}
        return _Factors(
            a=a,
            packed_a=_pack(a),
            b=(_pack(b[0]),)
            if is_block
            else tuple(p.t().contiguous() if p.shape[1] else None for p in b),
            even=evens.pop() if len(evens) == 1 and selection is None else None,
            sizes=tuple(len(ranks) for ranks in kept),
            layout=layout,
            is_block=is_block,
            is_single=len(set(layout)) == 1 and selection is not None and len(selection) == 1,
        )


class ExpertLinear(nn.Module):
    """A linear layer of the base with all experts' changes of it.

    Attributes:
        weight: The base's, as its own layer keeps it: (D_out, D_in), or (D_in, D_out).
        bias: The base's, (D_out,), or None.
        a: Factors A of all experts, (R_all, D_in); missing where nobody has any.
        b: Factors B with their scales, (D_out, R_all).
        dense: Weight differences of experts that have one, (n, D_out, D_in).
        biases: Bias differences by expert, (E, D_out).
        owners: The expert of each rank, R_all of them.
        dense_owners: The expert of each dense difference.
        rows: What the rows of the pass under way are.
        group: The layers that are given the same tensor; None while nothing is packed.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        *,
        transposed: bool,
        owners: Sequence[int] = (),
        dense_owners: Sequence[int] = (),
        has_biases: bool = False,
        num_experts: int = 1,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.transposed = transposed
        self.out_features, self.in_features = self.matrix.shape
        self.owners = tuple(owners)
        self.dense_owners = tuple(dense_owners)
        self.has_biases = has_biases
        place: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}

        def make(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, **place), requires_grad=False)

        if self.owners:
            self.a = make(len(self.owners), self.in_features)
            self.b = make(self.out_features, len(self.owners))
        if self.dense_owners:
            self.dense = make(len(self.dense_owners), self.out_features, self.in_features)
        if has_biases:
            self.biases = make(num_experts, self.out_features)
        self._even = _find_even(self.owners)
        self._has_others = bool(dense_owners) or has_biases
        self.rows = Rows()
        self.group: SharedInput | None = None

    @property
    def matrix(self) -> Tensor:
        """The base's weight, (D_out, D_in)."""
        return self.weight.t() if self.transposed else self.weight

    def fill(self, updates: Sequence[LinearUpdate | None]) -> None:
        """Copy the experts' changes in, one an expert or None; scales go into B."""
        at = dense = 0
        for expert, update in enumerate(updates):
            if update is None:
                continue
            if update.a is not None and update.b is not None:
                part = slice(at, at + len(update.a))
                self.a.data[part] = update.a
                self.b.data[:, part] = update.b.float().to(self.b.device) * update.scale
                at = part.stop
            elif update.dense is not None:
                self.dense.data[dense] = update.dense
                dense += 1
            if update.bias is not None:
                self.biases.data[expert] = update.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """The layer's output for inputs (N, T, D_in), or (N * T, D_in) in some models."""
        rows = self.rows
        positions = inputs.shape[:-1].numel()
        if self.group is not None and positions <= FEW_ROWS:
            output = self.group.multiply(self, inputs, rows)
            flat = inputs.reshape(-1, self.in_features) if self._has_others else inputs
        else:
            flat = inputs.reshape(-1, self.in_features)
            output = _multiply(flat, self.matrix, self.bias)
            if self.owners and rows.num_experts:
                rows.check(flat)
                output = self._add_low_rank(output, flat, rows)
        if self._has_others and rows.num_experts:
            output = self._add_others(output, flat, rows)
        return output.view(*inputs.shape[:-1], self.out_features)

    def _add_low_rank(self, output: Tensor, flat: Tensor, rows: Rows) -> Tensor:
        """Add the ranks' products: by expert where rows are, by weight of each rank elsewhere."""
        experts = rows.num_experts
        if rows.is_folded and self._even is not None:
            first, count = self._even
            inputs = flat.unflatten(0, (experts, -1))[first : first + count]
            a = self.a.unflatten(0, (count, -1)).transpose(1, 2)
            b = self.b.unflatten(1, (count, -1)).permute(1, 2, 0)
            part = output.unflatten(0, (experts, -1))[first : first + count]
            part.baddbmm_(torch.bmm(inputs, a), b)
            return output
        hidden = _multiply(flat, self.a) * rows.weigh(self.owners, flat)
        return _multiply_and_add(hidden, self.b, output)

    def _add_others(self, output: Tensor, flat: Tensor, rows: Rows) -> Tensor:
        """Add dense differences and those of biases."""
        rows.check(flat)
        assert rows.expert is not None
        expert = rows.expert.repeat_interleave(rows.positions)
        output = output.clone()  # it may be a part of a group's output
        for index, owner in enumerate(self.dense_owners):
            chosen = (expert == owner).nonzero().squeeze(1)
            if len(chosen):
                output[chosen] += _multiply(flat[chosen], self.dense[index])
        if self.has_biases:
            # A row of the base beside the experts has an index of its own, and no bias.
            known = (expert >= 0) & (expert < len(self.biases))
            output[known] += self.biases[expert[known]]
        return output


def share_weights(model: Any) -> Any:
    """A copy of a model's modules that holds the very same weights."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


@dataclass(frozen=True)
class LayerPlan:
    """Which experts change one layer, and how.

    Attributes:
        ranks: Rank by expert; 0 is a dense difference, None no change.
        has_biases: Whether an expert changes the bias.
    """

    ranks: tuple[int | None, ...]
    has_biases: bool


def plan_layers(adapters: Sequence[Adapter | None]) -> dict[str, LayerPlan]:
    """Which experts change which layers, by full module name.

    Args:
        adapters: One an expert; None is the base itself.
    """
    names = {name for adapter in adapters if adapter is not None for name in adapter.updates}
    plans = {}
    for name in sorted(names):
        updates = [None if a is None else a.updates.get(name) for a in adapters]
        ranks = tuple(
            None if u is None or (u.a is None and u.dense is None) else (u.rank or 0)
            for u in updates
        )
        plans[name] = LayerPlan(ranks, any(u is not None and u.bias is not None for u in updates))
    return plans


def put_experts_in(
    model: Any, plans: Mapping[str, LayerPlan], num_experts: int
) -> dict[str, ExpertLinear]:
    """Replace every linear layer of a model by one that can hold all experts' changes.

    Args:
        model: The model, changed in place: a copy made by `share_weights`.
        plans: What experts change, by full module name.
        num_experts: E.

    Returns:
        The new layers by full module name, in the model's order; their factors are zero.
    """
    chosen = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    nothing = LayerPlan((None,) * num_experts, False)
    layers = {}
    for name, module in chosen:
        plan = plans.get(name, nothing)
        layer = ExpertLinear(
            module.weight,
            module.bias,
            transposed=is_transposed(module),
            owners=[e for e, rank in enumerate(plan.ranks) for _ in range(rank or 0)],
            dense_owners=[e for e, rank in enumerate(plan.ranks) if rank == 0],
            has_biases=plan.has_biases,
            num_experts=num_experts,
        )
        model.set_submodule(name, layer)
        layers[name] = layer
    return layers


@torch.no_grad()
def find_shared_inputs(model: Any, layers: Sequence[ExpertLinear]) -> list[SharedInput]:
    """Find layers that are given the same tensor, by running the model on a few tokens.

    Args:
        model: The model, with layers that hold experts' changes.
        layers: Its linear layers.

    Returns:
        All layers that were called, by the tensor they were given; none where a layer is called
        more than once a pass.
    """
    calls: list[tuple[ExpertLinear, Tensor]] = []  # the tensors are kept, so that none is reused
    handles = [
        layer.register_forward_pre_hook(lambda module, args: calls.append((module, args[0])))
        for layer in layers
    ]
    try:
        with evaluating(model):
            model(input_ids=make_probe(model), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    groups: list[list[ExpertLinear]] = []
    last: Tensor | None = None
    for layer, inputs in calls:
        if inputs is last:
            groups[-1].append(layer)
        else:
            groups.append([layer])
        last = inputs
    if len({id(layer) for layer, _ in calls}) != len(calls):
        return []  # a layer that is called twice a pass
    return [SharedInput(group) for group in groups]
