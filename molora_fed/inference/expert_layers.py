"""Linear layers that hold all experts' changes, and a base whose layers are replaced by them.

A pass has rows, each of one expert (or of a mixture of them). A layer computes

    y = W x + sum_r w[row, r] * b_r (a_r . x)

with the experts' low-rank factors one after the other along the rank: whatever the number of
experts, a layer takes one product with the base's weight and two with the factors. The weights of
the ranks say which experts a row is: 1 at its own expert's ranks and 0 elsewhere where rows are
experts, the gates where one row is a mixture on the product B A.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from molora_fed.adapters.updates import Adapter, LinearUpdate
from molora_fed.models.layout import is_transposed
from molora_fed.models.states import evaluating, make_probe

__all__ = ["ExpertLinear", "Rows", "find_shared_inputs", "put_experts_in", "share_weights"]

FEW_ROWS = 16
"""Up to so many rows, `W x^T` is faster than `x W^T` in float32 on a processor (docs/serving.md)."""


@dataclass
class Rows:
    """What the rows of the pass under way are; all layers of a model read the same.

    Attributes:
        expert: Index of each row's expert, (N,) int64; None where `gates` mix them.
        gates: Gates of the experts by row and position, (N, T, E); None where rows are experts.
        num_experts: E.
        is_folded: Whether rows are experts in order, as many rows of each: row e * B + b.
    """

    expert: Tensor | None = None
    gates: Tensor | None = None
    num_experts: int = 0
    is_folded: bool = False
    _weights: dict[tuple[Any, ...], Tensor] = field(default_factory=dict, repr=False)

    def weigh(self, layout: tuple[int, ...], positions: int, like: Tensor) -> Tensor:
        """Weight of every rank at every position of every row.

        Args:
            layout: The expert of each rank, R_all of them.
            positions: T, of every row.
            like: Whose dtype and device.

        Returns:
            (N * T, R_all).
        """
        key = (layout, positions, like.dtype)
        found = self._weights.get(key)
        if found is None:
            owner = torch.tensor(layout, device=like.device)
            if self.gates is not None:
                found = self.gates.flatten(0, 1)[:, owner].to(like.dtype)
            else:
                assert self.expert is not None
                own = (self.expert[:, None] == owner).to(like.dtype)
                found = own.repeat_interleave(positions, 0)
            self._weights[key] = found
        return found


def multiply(inputs: Tensor, weight: Tensor) -> Tensor:
    """`inputs @ weight.T`, in the way that is fastest for few rows.

    In float32 on a processor the libraries' products of few rows are slow one way round, and
    those of a single row slower than those of two.

    Args:
        inputs: (N, D_in).
        weight: (D_out, D_in).

    Returns:
        (N, D_out); its memory may lie the other way round.
    """
    rows = inputs.shape[0]
    if rows > FEW_ROWS or inputs.dtype != torch.float32 or inputs.device.type != "cpu":
        return functional.linear(inputs, weight)
    if rows == 1:
        return torch.mm(weight, inputs.repeat(2, 1).t())[:, :1].t()
    return torch.mm(weight, inputs.t()).t()


class SharedInput:
    """Layers that are given the same tensor, as queries, keys and values are.

    The product with their factors A is made once for all of them.

    Attributes:
        layers: The layers, in the order they are called in.
    """

    def __init__(self, layers: Sequence["ExpertLinear"]) -> None:
        self.layers = tuple(layers)
        self._factors: Tensor | None = None
        self._layout: tuple[int, ...] = ()
        self._at: dict[int, slice] = {}
        self._inputs: Tensor | None = None
        self._found: Tensor | None = None

    def pack(self) -> None:
        """Lay the layers' factors A one after the other; the layers keep views of it."""
        whole = torch.cat([layer.a.detach() for layer in self.layers])
        at = 0
        for layer in self.layers:
            part = slice(at, at + len(layer.a))
            layer.a.data = whole[part]
            self._at[id(layer)] = part
            at = part.stop
        self._factors = whole
        self._layout = tuple(owner for layer in self.layers for owner in layer.owners)

    def unpack(self) -> None:
        """Forget what was laid out."""
        self._factors = self._inputs = self._found = None

    def multiply(self, layer: "ExpertLinear", inputs: Tensor, rows: Rows, positions: int) -> Tensor:
        """A layer's weighted products `w * (A x)`, (N * T, R_all)."""
        if self._factors is None:
            self.pack()
        assert self._factors is not None
        if self._inputs is not inputs:
            flat = inputs.reshape(-1, inputs.shape[-1])
            weights = rows.weigh(self._layout, positions, flat)
            self._found = multiply(flat, self._factors) * weights
            self._inputs = inputs
        assert self._found is not None
        found = self._found[:, self._at[id(layer)]]
        if layer is self.layers[-1]:
            self._inputs = self._found = None
        return found


class ExpertLinear(nn.Module):
    """A linear layer of the base with all experts' changes of it.

    Attributes:
        weight: The base's, as its own layer keeps it: (D_out, D_in), or (D_in, D_out).
        bias: The base's, (D_out,), or None.
        a: Factors A of all experts, (R_all, D_in); no rows where nobody changes the layer.
        b: Factors B with their scales, (D_out, R_all).
        dense: Weight differences of experts that have one, (n, D_out, D_in), or None.
        biases: Bias differences by expert, (E, D_out), or None.
        owners: The expert of each rank, R_all of them.
        dense_owners: The expert of each dense difference.
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
        self.in_features, self.out_features = (
            weight.shape if transposed else (weight.shape[1], weight.shape[0])
        )
        self.owners = tuple(owners)
        self.dense_owners = tuple(dense_owners)
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
        self.has_biases = has_biases
        self.rows = Rows()
        self.group: SharedInput | None = None

    def fill(self, updates: Sequence[LinearUpdate | None]) -> None:
        """Copy the experts' changes in, one an expert or None; scales go into B."""
        at = 0
        dense = 0
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
        flat = inputs.reshape(-1, self.in_features)
        weight = self.weight.t() if self.transposed else self.weight
        output = multiply(flat, weight)
        if self.bias is not None:
            output = output + self.bias
        rows = self.rows
        if self.owners and rows.num_experts:
            self._add_low_rank(output, inputs, flat, rows)
        if (self.dense_owners or self.has_biases) and rows.num_experts:
            self._add_others(output, flat, rows)
        return output.view(*inputs.shape[:-1], self.out_features)

    def _add_low_rank(self, output: Tensor, inputs: Tensor, flat: Tensor, rows: Rows) -> None:
        """Add the ranks' products in place."""
        count = len(rows.gates) if rows.gates is not None else len(rows.expert)  # type: ignore[arg-type]
        positions = len(flat) // count
        experts = rows.num_experts
        if rows.is_folded and len(flat) > FEW_ROWS and self._is_even(experts):
            ranks = len(self.owners) // experts
            inputs = flat.view(experts, -1, self.in_features)
            a = self.a.view(experts, ranks, -1).transpose(1, 2)
            b = self.b.view(-1, experts, ranks).permute(1, 2, 0)
            output.view(experts, -1, self.out_features).baddbmm_(torch.bmm(inputs, a), b)
            return
        if self.group is not None:
            hidden = self.group.multiply(self, inputs, rows, positions)
        else:
            hidden = multiply(flat, self.a) * rows.weigh(self.owners, positions, flat)
        output.addmm_(hidden, self.b.t())

    def _is_even(self, experts: int) -> bool:
        ranks, rest = divmod(len(self.owners), experts)
        return not rest and self.owners == tuple(e for e in range(experts) for _ in range(ranks))

    def _add_others(self, output: Tensor, flat: Tensor, rows: Rows) -> None:
        """Add dense differences and those of biases in place."""
        assert rows.expert is not None
        expert = rows.expert.repeat_interleave(len(flat) // len(rows.expert))
        for index, owner in enumerate(self.dense_owners):
            chosen = (expert == owner).nonzero().squeeze(1)
            if len(chosen):
                output[chosen] += multiply(flat[chosen], self.dense[index])
        if self.has_biases:
            output += self.biases[expert]


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
        layers: Those that are changed by low-rank factors.
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
    seen = [layer for layer, _ in calls]
    if len(set(seen)) != len(seen):
        return []  # a layer that is called twice a pass
    return [SharedInput(group) for group in groups if len(group) > 1]
