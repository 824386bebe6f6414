"""Adds an adapter to a base model for a while, and takes it away without a trace."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from molora_fed.adapters.compatibility import check_adapter_fits
from molora_fed.adapters.layout import bias_of, weight_of
from molora_fed.adapters.updates import Adapter

__all__ = ["applied"]


@contextmanager
def applied(model: Any, adapter: Adapter | None) -> Iterator[Any]:
    """Run a block with the adapter's updates added to the model's weights, in place.

    The weights return bit-exactly (from copies, not by subtraction); `requires_grad`, train mode
    and the adapter are untouched. One copy of the changed weights is held meanwhile.

    Args:
        model: The base model, as loaded.
        adapter: What to add; None adds nothing, so that the base can be an expert.

    Yields:
        The model itself.

    Raises:
        IncompatibleAdapterError: If the adapter does not fit the model; nothing is changed.
    """
    if adapter is None:
        yield model
        return
    check_adapter_fits(adapter, model, finite=False)
    saved: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for name, update in adapter.updates.items():
                module = model.get_submodule(name)
                _add(weight_of(module), update.product(), saved)
                if update.bias is not None:
                    _add(bias_of(module), update.bias, saved)
        yield model
    finally:
        with torch.no_grad():
            for target, copy in saved:
                target.copy_(copy)


def _add(target: Tensor, difference: Tensor, saved: list[tuple[Tensor, Tensor]]) -> None:
    """Add in float32, so that a bfloat16 weight is rounded once."""
    saved.append((target, target.detach().clone()))
    total = target.detach().float() + difference.to(device=target.device, dtype=torch.float32)
    target.copy_(total)
