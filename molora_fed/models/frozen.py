"""The tensors of a base that no specialist may change, and which of them differ in a bit.

Frozen are: embedding, head, norms, buffers, every module of the first K blocks, and whatever else
is no weight or bias of a linear layer in blocks K, K+1, ...
"""

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from molora_fed.models.layout import adaptable_modules
from molora_fed.storage.files import hash_bytes

__all__ = ["find_changed_frozen", "fingerprint_frozen", "list_frozen", "stamp_model"]


def list_frozen(model: Any, frozen_depth: int) -> dict[str, Tensor]:
    """List the tensors that stay bit-identical to the base, by full name.

    Args:
        model: A transformers causal language model.
        frozen_depth: K.

    Raises:
        AdapterError: If K leaves no block to change.
        BaseCheckpointError: If the model has no list of blocks.
    """
    modules = adaptable_modules(model, frozen_depth).values()
    free = {id(parameter) for module in modules for parameter in module.parameters()}
    # Tied tensors come under each of their names: a checkpoint may have untied them.
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    return {name: tensor for name, tensor in tensors.items() if id(tensor) not in free}


def fingerprint_frozen(model: Any, frozen_depth: int) -> dict[str, str]:
    """SHA-256 of each frozen tensor's bits, to be compared with another time or place.

    Args:
        model: A transformers causal language model.
        frozen_depth: K.
    """
    return {
        name: hash_bytes(_view_bits(tensor).numpy().tobytes())
        for name, tensor in list_frozen(model, frozen_depth).items()
    }


def find_changed_frozen(base_model: Any, model: Any, frozen_depth: int) -> list[str]:
    """Name every frozen tensor that is not, bit by bit, the base's.

    Args:
        base_model: The base model.
        model: A model of the same architecture, in the same dtype.
        frozen_depth: K.

    Returns:
        Names with what differs, sorted; tensors that only one of the two has come, too.
    """
    expected, found = (dict(list_frozen(m, frozen_depth)) for m in (base_model, model))
    return [
        f"{name}: {reason}"
        for name in sorted(expected.keys() | found.keys())
        if (reason := _compare(expected, found, name))
    ]


def _compare(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], name: str) -> str:
    """What differs of one tensor; empty if nothing does."""
    if name not in found or name not in expected:
        return "missing" if name in expected else "not in the base"
    one, other = expected[name], found[name]
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return f"{tuple(other.shape)} {other.dtype}, not {tuple(one.shape)} {one.dtype}"
    different = int((_view_bits(one) != _view_bits(other)).sum())
    return f"{different} bytes differ" if different else ""


def stamp_model(model: Any, tokens: Tensor) -> dict[str, object]:
    """What tells, compared with a later stamp, what of a model somebody changed in between.

    By name: the bits of each parameter and buffer, and whether it requires gradients or has some;
    whether each module trains. Under "logits" what the model says of a text, which hooks left
    behind would change; libraries leave some that change nothing.

    Args:
        model: A transformers causal language model.
        tokens: The text, token ids (1, T).
    """
    stamps: dict[str, object] = {
        name: (zlib.crc32(_view_bits(tensor).numpy()), tensor.requires_grad, tensor.grad is None)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    stamps |= {f"{name}.training": module.training for name, module in model.named_modules()}
    with torch.no_grad():
        logits = model(tokens.to(model.device)).logits
    return {**stamps, "logits": zlib.crc32(_view_bits(logits).numpy())}


def _view_bits(tensor: Tensor) -> Tensor:
    """A tensor's bytes on the CPU, (bytes,) uint8: by value, -0 would equal 0."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
