"""How a hidden state enters a decoder block: through which norm, into which linear layers.

For routers that compare hidden states with what adapters read, as Arrow does (arXiv 2405.11157).
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from molora_fed.models.layout import decoder_blocks, is_transposed
from molora_fed.models.states import evaluating, make_probe

__all__ = ["BlockInput", "InputNorm", "find_block_input"]

_TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4}
_ROUNDED = 3e-2  # of numbers of half precision


@dataclass(frozen=True, eq=False)
class InputNorm:
    """A block's input norm: LayerNorm or RMSNorm.

    Attributes:
        weight: (D,) float32, what normalised states are multiplied with.
        bias: (D,) float32; zeros where there is none.
        epsilon: Added to the mean square.
        is_centred: Whether the mean is taken off first: LayerNorm, not RMSNorm.
    """

    weight: Tensor
    bias: Tensor
    epsilon: float
    is_centred: bool

    def __call__(self, hidden: Tensor) -> Tensor:
        """What the linear layers read of hidden states (..., D), float32."""
        states = hidden.float()
        if self.is_centred:
            states = states - states.mean(-1, keepdim=True)
        scale = (states.square().mean(-1, keepdim=True) + self.epsilon).rsqrt()
        return states * scale * self.weight.to(states.device) + self.bias.to(states.device)


@dataclass(frozen=True, eq=False)
class BlockInput:
    """Where `RouterView.prefix_hidden` goes: into decoder block K.

    Attributes:
        block: Full name of the block, e.g. "model.layers.4"; empty of made-up experts.
        modules: Full names of the block's linear layers that read the state, through `norm` where
            there is one: queries, keys and values mostly. D inputs each; in the order in which
            they run. Empty where the block has another form.
        norm: What comes before these; None if they read the state as it is.
    """

    block: str = ""
    modules: tuple[str, ...] = ()
    norm: InputNorm | None = None

    def normalise(self, hidden: Tensor) -> Tensor:
        """What `modules` read of states that enter the block, (..., D) float32."""
        return hidden.float() if self.norm is None else self.norm(hidden)


@dataclass(eq=False)
class _Call:
    """One call of a module; the tensors are kept, so that no address is used again meanwhile."""

    name: str
    module: nn.Module
    given: Tensor
    output: Any = None


def find_block_input(model: Any, depth: int) -> BlockInput:
    """How states enter a decoder block, found by running a few tokens and looking at who reads.

    Args:
        model: A causal language model; it stays as it is.
        depth: K.

    Raises:
        BaseCheckpointError: If the model has no list of decoder blocks.
    """
    prefix, blocks = decoder_blocks(model)
    name, block = f"{prefix}.{depth}", blocks[depth]
    calls: list[_Call] = []
    with contextlib.ExitStack() as stack:
        for inner, module in block.named_modules(prefix=name):
            _watch(inner, module, calls, stack)
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        model(make_probe(model), use_cache=False)
    state, inside = calls[0].given, calls[1:]
    plain = _list_readers(state, inside)
    if plain:
        return BlockInput(name, plain)
    for call in inside:
        if not _is_same(call.given, state) or not isinstance(call.output, Tensor):
            continue
        readers = _list_readers(call.output, inside)
        norm = _read_norm(call) if readers else None
        if norm is not None:
            return BlockInput(name, readers, norm)
    return BlockInput(name)


def _watch(name: str, module: nn.Module, calls: list[_Call], stack: contextlib.ExitStack) -> None:
    """Note the calls of a module in the order in which they begin."""

    def begin(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else kwargs.get("hidden_states")
        if isinstance(given, Tensor):
            calls.append(_Call(name, module, given))

    def end(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for call in calls:
            if call.module is module:
                call.output = output

    stack.callback(module.register_forward_pre_hook(begin, with_kwargs=True).remove)
    stack.callback(module.register_forward_hook(end).remove)


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape[-1] == other.shape[-1]


def _list_readers(state: Tensor, calls: list[_Call]) -> tuple[str, ...]:
    """Linear layers that are given the very state."""
    return tuple(
        call.name
        for call in calls
        if (isinstance(call.module, nn.Linear) or is_transposed(call.module))
        and _is_same(call.given, state)
    )


def _read_norm(call: _Call) -> InputNorm | None:
    """The form and numbers of a norm, held against what it gave; None if it has another form."""
    weight = getattr(call.module, "weight", None)
    if not isinstance(weight, Tensor) or weight.shape != call.given.shape[-1:]:
        return None
    bias = getattr(call.module, "bias", None)
    shift = torch.zeros_like(weight) if bias is None else bias
    names = ("variance_epsilon", "eps", "epsilon")
    epsilon = next((float(getattr(call.module, n)) for n in names if hasattr(call.module, n)), 0.0)
    tolerance = _TOLERANCES.get(call.output.dtype, _ROUNDED)
    for is_centred in (False, True):
        for offset in (0.0, 1.0):  # some keep what is added to one
            norm = InputNorm(
                (weight.detach().float() + offset).cpu(),
                shift.detach().float().cpu(),
                epsilon,
                is_centred,
            )
            found, expected = norm(call.given), call.output.float()
            if torch.allclose(found, expected, rtol=tolerance, atol=tolerance):
                return norm
    return None
