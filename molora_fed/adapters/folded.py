"""Runs E experts of one base model at once, folded into the batch.

Row e * B + b of the batch is expert e on input b. Every linear layer multiplies its base weight
once for all rows and adds each expert's update as one batched product over experts; blocks that no
expert changes run once for all of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from molora_fed.adapters.compatibility import check_adapter_fits
from molora_fed.adapters.updates import Adapter, LinearUpdate
from molora_fed.errors import RoutingError
from molora_fed.models.layout import block_index, decoder_blocks, weight_of

__all__ = ["FoldedExperts"]


@dataclass(frozen=True)
class _Term:
    """A batched product added to a layer's output, for some of the experts.

    Attributes:
        experts: Which experts, as a slice (no copy of their rows) or an index (n,).
        factors: (n, D_in, R) and (n, R, D_out), or one dense (n, D_in, D_out); none for a bias.
        bias: (n, 1, D_out), or None.
    """

    experts: slice | Tensor
    factors: tuple[Tensor, ...]
    bias: Tensor | None = None

    def add_to(self, output: Tensor, inputs: Tensor) -> None:
        """Add this term in place; output (E, N, D_out), inputs (E, N, D_in)."""
        if not isinstance(self.experts, slice):
            rows = output[self.experts]
            self._add(rows, inputs[self.experts])
            output[self.experts] = rows
        else:
            self._add(output[self.experts], inputs[self.experts])

    def _add(self, output: Tensor, inputs: Tensor) -> None:
        if self.bias is not None:
            output += self.bias
        if self.factors:
            for factor in self.factors[:-1]:
                inputs = torch.bmm(inputs, factor)
            output.baddbmm_(inputs, self.factors[-1])


def _experts_index(experts: list[int], device: Any) -> slice | Tensor:
    """A slice if the experts are consecutive, else an index."""
    if experts[-1] - experts[0] + 1 == len(experts):
        return slice(experts[0], experts[-1] + 1)
    return torch.tensor(experts, device=device)


def _build_terms(updates: Sequence[LinearUpdate | None], module: nn.Module) -> list[_Term]:
    """Stack the experts' updates of one layer, in its dtype and on its device.

    Ranks are padded with zeros to the largest; scales go into B.
    """
    weight = weight_of(module)
    place = {"device": weight.device, "dtype": weight.dtype}
    low_rank = [e for e, u in enumerate(updates) if u is not None and u.rank is not None]
    dense = [e for e, u in enumerate(updates) if u is not None and u.dense is not None]
    biased = [e for e, u in enumerate(updates) if u is not None and u.bias is not None]
    columns, terms = weight.shape, []
    if low_rank:
        chosen: Any = [updates[e] for e in low_rank]
        rank = max(update.rank for update in chosen)
        a = torch.zeros(len(chosen), columns[1], rank, **place)
        b = torch.zeros(len(chosen), rank, columns[0], **place)
        for i, update in enumerate(chosen):
            a[i, :, : update.rank] = update.a.T
            b[i, : update.rank] = update.b.T.float().to(weight.device) * update.scale
        terms.append(_Term(_experts_index(low_rank, weight.device), (a, b)))
    if dense:
        chosen = [updates[e] for e in dense]
        stacked = torch.stack([update.dense.T.to(**place) for update in chosen])
        terms.append(_Term(_experts_index(dense, weight.device), (stacked,)))
    if biased:
        chosen = [updates[e] for e in biased]
        stacked = torch.stack([update.bias[None].to(**place) for update in chosen])
        terms.append(_Term(_experts_index(biased, weight.device), (), stacked))
    return terms


class FoldedExperts:
    """Makes a base model compute all experts in one forward pass, while used as a context.

    The model's weights, `requires_grad` and train mode are never touched: updates are added to
    the layers' outputs by hooks, which leave with the context. Caches of keys and values work as
    usual; those of the shared first blocks have B rows instead of E * B.

    Example:
        with FoldedExperts(model, [None, legal, python]) as folded:
            logits = folded.split(model(folded.expand(tokens)).logits)  # (E, B, T, V)

    Attributes:
        model: The base model.
        num_experts: E.
        shared_depth: Blocks before this one are changed by no expert and run once for all.
    """

    def __init__(self, model: Any, adapters: Sequence[Adapter | None]) -> None:
        """Stack the experts' updates; memory is that of the updates.

        Args:
            model: The base model, as loaded.
            adapters: One an expert, in the fused model's order; None is the base itself.

        Raises:
            IncompatibleAdapterError: If an adapter does not fit the model.
            RoutingError: If there is no expert.
        """
        if not adapters:
            raise RoutingError(
                "Cannot fold experts: expected at least one adapter, got none. Pass the experts."
            )
        for adapter in adapters:
            if adapter is not None:
                check_adapter_fits(adapter, model, finite=False)
        self.model = model
        self.num_experts = len(adapters)
        prefix, blocks = decoder_blocks(model)
        self._blocks = blocks
        changed = {name for adapter in adapters if adapter is not None for name in adapter.updates}
        self._terms: list[tuple[str, nn.Module, list[_Term]]] = []
        for name, module in model.named_modules():
            if name in changed:
                updates = [None if a is None else a.updates.get(name) for a in adapters]
                self._terms.append((name, module, _build_terms(updates, module)))
        self.shared_depth = self._find_shared_depth(
            [index for name in changed if (index := block_index(name, prefix)) is not None]
        )
        self._handles: list[Any] = []
        self._rows = 0
        self._positions = 0

    def _find_shared_depth(self, changed: list[int]) -> int:
        """K of the shared first blocks; 0 where later blocks reuse earlier blocks' keys."""
        config = self.model.config.get_text_config()
        if self.num_experts == 1 or getattr(config, "num_kv_shared_layers", None):
            return 0
        return min(changed, default=0)

    def expand(self, tokens: Tensor) -> Tensor:
        """Repeat a batch for every expert.

        Args:
            tokens: Token ids, mask or the like, (B, ...).

        Returns:
            (E * B, ...), row e * B + b is row b.
        """
        return tokens.repeat(self.num_experts, *(1 for _ in tokens.shape[1:]))

    def split(self, rows: Tensor) -> Tensor:
        """View (E * B, ...) as (E, B, ...)."""
        return rows.unflatten(0, (self.num_experts, -1))

    def __enter__(self) -> Self:
        """Install the hooks.

        Raises:
            RoutingError: If these experts are installed already.
        """
        if self._handles:
            raise RoutingError(
                "Cannot fold experts: expected them not to be in use, got a second use at once. "
                "Leave the first context."
            )
        add = self._handles.append
        add(self.model.register_forward_pre_hook(self._begin, with_kwargs=True))
        for name, module, terms in self._terms:
            add(module.register_forward_hook(self._build_hook(name, terms)))
        if self.shared_depth:
            for block in self._blocks[: self.shared_depth]:
                add(block.register_forward_pre_hook(self._collapse, with_kwargs=True))
            first_own = self._blocks[self.shared_depth]
            add(first_own.register_forward_pre_hook(self._spread, with_kwargs=True))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the hooks."""
        while self._handles:
            self._handles.pop().remove()

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the size of this pass, and check that the rows are folded."""
        inputs = args[0] if args else kwargs.get("input_ids")
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        experts = self.num_experts
        if inputs is None or inputs.shape[0] % experts:
            raise RoutingError(
                f"Cannot run folded experts: expected a multiple of {experts} rows, got "
                f"{None if inputs is None else inputs.shape[0]}. Use `expand` on the input."
            )
        self._rows, self._positions = inputs.shape[0], inputs.shape[0] * inputs.shape[1]
        if self.shared_depth:
            folded = self.split(inputs)
            if not torch.equal(folded, folded[:1].expand_as(folded)):
                raise RoutingError(
                    "Cannot run folded experts: expected every expert to read the same tokens, "
                    f"as they share {self.shared_depth} blocks, got different ones. "
                    "Use `expand` on the input."
                )

    def _build_hook(self, name: str, terms: list[_Term]) -> Callable[..., None]:
        """The hook that adds a layer's terms to its output, in place."""

        def add_terms(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            inputs = args[0]
            if inputs.shape[:-1].numel() != self._positions:
                raise RoutingError(
                    f"Cannot fold experts at '{name}': expected {self._positions} positions, got "
                    f"{inputs.shape[:-1].numel()}. This model sends only some tokens through it; "
                    "run its experts one by one."
                )
            experts = self.num_experts
            inputs = inputs.reshape(experts, -1, inputs.shape[-1])  # (E, B * T, D_in)
            folded = output.view(experts, -1, output.shape[-1])  # (E, B * T, D_out)
            for term in terms:
                term.add_to(folded, inputs)

        return add_terms

    def _collapse(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Keep one expert's rows of everything a shared block is given."""
        kept = self._rows // self.num_experts

        def take(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(take(part) for part in value)
            # Position vectors (T,) have no rows, whatever their length.
            is_rows = isinstance(value, Tensor) and value.ndim > 1 and len(value) == self._rows
            return value[:kept] if is_rows else value

        return take(args), {name: take(value) for name, value in kwargs.items()}

    def _spread(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Repeat the shared blocks' result for every expert."""
        if args:
            return (self.expand(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self.expand(kwargs["hidden_states"])}
