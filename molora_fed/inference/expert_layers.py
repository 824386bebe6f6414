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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from molora_fed.adapters.updates import Adapter, LinearUpdate
from molora_fed.inference.shared_inputs import (
    FEW_ROWS,
    Rows,
    SharedInput,
    find_even,
    multiply,
    multiply_and_add,
)
from molora_fed.models.layout import is_transposed
from molora_fed.models.states import evaluating, make_probe

__all__ = [
    "ExpertLinear",
    "LayerPlan",
    "find_shared_inputs",
    "plan_layers",
    "put_experts_in",
    "share_weights",
]


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
        self._even = find_even(self.owners)
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
            output = multiply(flat, self.matrix, self.bias)
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
        hidden = multiply(flat, self.a) * rows.weigh(self.owners, flat)
        return multiply_and_add(hidden, self.b, output)

    def _add_others(self, output: Tensor, flat: Tensor, rows: Rows) -> Tensor:
        """Add dense differences and those of biases."""
        rows.check(flat)
        output = output.clone()  # it may be a part of a group's output
        if rows.gates is not None:
            gates = rows.gates.flatten(0, 1).to(flat.dtype)
            for index, owner in enumerate(self.dense_owners):
                output += gates[:, owner, None] * multiply(flat, self.dense[index])
            return output + gates @ self.biases if self.has_biases else output
        assert rows.expert is not None
        expert = rows.expert.repeat_interleave(rows.positions)
        for index, owner in enumerate(self.dense_owners):
            chosen = (expert == owner).nonzero().squeeze(1)
            if len(chosen):
                output[chosen] += multiply(flat[chosen], self.dense[index])
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
