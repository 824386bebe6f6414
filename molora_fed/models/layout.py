"""Which modules of a base checkpoint an adapter may change, for any decoder of Hugging Face.

An adapter changes linear layers inside decoder blocks at or after the frozen depth K; embedding,
head, norms and the first K blocks stay bit-identical to the base.
"""

from collections import Counter
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from molora_fed.errors import AdapterError, BaseCheckpointError

__all__ = [
    "adaptable_modules",
    "bias_of",
    "block_index",
    "decoder_blocks",
    "is_transposed",
    "weight_of",
]


def decoder_blocks(model: Any) -> tuple[str, nn.ModuleList]:
    """Find the list of decoder blocks of a causal language model.

    Args:
        model: A transformers model with `config.num_hidden_layers`.

    Returns:
        Its full name inside the model (e.g. "gpt_neox.layers") and the list itself.

    Raises:
        BaseCheckpointError: If no list has as many blocks as the config says, or several have.
    """
    config = model.config
    depth = getattr(config.get_text_config(), "num_hidden_layers", None)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    # Lists inside a block (experts of a layer, say) may have the same length by chance.
    outer = [
        (name, module)
        for name, module in found
        if not any(name.startswith(f"{other}.") for other, _ in found)
    ]
    if len(outer) != 1:
        raise BaseCheckpointError(
            f"Cannot adapt base '{type(model).__name__}': expected one list of {depth} decoder "
            f"blocks, got {', '.join(name for name, _ in outer) or 'none'}. "
            "Choose a decoder-only checkpoint."
        )
    return outer[0]


def block_index(name: str, prefix: str) -> int | None:
    """The index of the decoder block a module lies in, or None if it lies outside of them.

    Args:
        name: Full module name.
        prefix: Name of the list of blocks, from `decoder_blocks`.
    """
    if not name.startswith(f"{prefix}."):
        return None
    index = name[len(prefix) + 1 :].partition(".")[0]
    return int(index) if index.isdecimal() else None


def adaptable_modules(model: Any, frozen_depth: int) -> dict[str, nn.Module]:
    """List the linear layers an adapter may change.

    Args:
        model: A transformers causal language model.
        frozen_depth: K; the first K blocks are left out.

    Returns:
        nn.Linear and Conv1D modules of blocks K, K+1, ... by full name, in the model's order.

    Raises:
        AdapterError: If K leaves no block to change.
        BaseCheckpointError: If no block list or no linear layer is found, or one shares its
            weight with another module (changing it would change that one too).
    """
    prefix, blocks = decoder_blocks(model)
    if not 0 <= frozen_depth < len(blocks):
        raise AdapterError(
            f"Cannot adapt base '{type(model).__name__}': expected a frozen depth from 0 to "
            f"{len(blocks) - 1}, got {frozen_depth}. Lower the frozen depth."
        )
    modules = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and (index := block_index(name, prefix)) is not None
        and index >= frozen_depth
    }
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    shared = [name for name, module in modules.items() if uses[id(module.weight)] > 1]
    if shared or not modules:
        raise BaseCheckpointError(
            f"Cannot adapt base '{type(model).__name__}': expected linear layers with weights of "
            f"their own inside '{prefix}', got {', '.join(shared) or 'no linear layer'}"
            f"{' sharing weights' if shared else ''}. Choose another checkpoint."
        )
    return modules


def is_transposed(module: nn.Module) -> bool:
    """Whether a module keeps its weight as (D_in, D_out), as GPT-2's Conv1D does."""
    return isinstance(module, Conv1D)


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a linear layer in nn.Linear orientation.

    Args:
        module: nn.Linear or Conv1D.

    Returns:
        A view of shape (D_out, D_in); writing to it writes to the module.
    """
    weight: Tensor = module.weight
    return weight.T if is_transposed(module) else weight


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias of a linear layer, (D_out,), or None."""
    bias: Tensor | None = module.bias
    return bias
