"""The experts' adapters as routers may read them: lazily, one at a time, as copies."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from molora_fed.adapters.updates import Adapter, LinearUpdate
from molora_fed.bank.passes import Expert
from molora_fed.models.block_input import BlockInput, InputNorm, find_block_input
from molora_fed.storage.files import hash_bytes
from molora_fed.types import BASE_EXPERT

__all__ = ["ExpertAdapters", "make_up_adapters", "open_adapters"]


class ExpertAdapters(Mapping[str, "Adapter | None"]):
    """The experts' adapters by name, in the experts' order; None is the base.

    An adapter is read when it is asked for. The last one is kept and no other, so go through the
    experts in the outer loop. What is handed out is a copy of what is published.

    Args:
        experts: In the canonical order.
        find_entry: Finds how states enter block K of the base; None of made-up experts.
    """

    def __init__(
        self,
        experts: Sequence[Expert] = (),
        find_entry: Callable[[], BlockInput] = BlockInput,
    ) -> None:
        self._experts = {expert.name: expert for expert in experts}
        self._find_entry = find_entry
        self._held: tuple[str, Adapter | None] = ("", None)
        self._changes: dict[str, int] = dict.fromkeys(self._experts, 0)

    @cached_property
    def entry(self) -> BlockInput:
        """Where `RouterView.prefix_hidden` goes in the base: block K, its norm, who reads it."""
        return self._find_entry()

    @override
    def __getitem__(self, name: str) -> "Adapter | None":
        """A copy of an expert's adapter; None of the base.

        Raises:
            KeyError: If there is no such expert.
            AdapterError: If its files can no longer be read.
        """
        if name != self._held[0]:
            expert = self._experts[name]
            self.forget()
            adapter = expert.load()
            self._held = (name, None if adapter is None else _copy(adapter))
        return self._held[1]

    @override
    def __contains__(self, name: object) -> bool:
        return name in self._experts

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._experts)

    @override
    def __len__(self) -> int:
        return len(self._experts)

    def take(self, names: Sequence[str]) -> "ExpertAdapters":
        """These experts in this order, with copies of their own."""
        return ExpertAdapters([self._experts[name] for name in names], lambda: self.entry)

    def forget(self) -> None:
        """Let go of the copy that was read last: the next reader gets one of its own."""
        self._note_changes()
        self._held = ("", None)

    def count_changes(self) -> dict[str, int]:
        """By expert, how many copies of its adapter were changed in place by those who read it."""
        if self._note_changes():
            self._held = ("", None)
        return dict(self._changes)

    def _note_changes(self) -> bool:
        name, adapter = self._held
        tensors = [] if adapter is None else [t for u in adapter.updates.values() for t in _list(u)]
        is_changed = any(not tensor.is_inference() and tensor._version for tensor in tensors)
        if is_changed:
            self._changes[name] += 1
        return is_changed


def _list(update: LinearUpdate) -> list[Tensor]:
    return list(update.tensors().values())


def _copy(adapter: Adapter) -> Adapter:
    """A copy whose numbers nobody else has, none of them changed in place yet."""
    updates = {
        module: LinearUpdate(
            **{part: tensor.detach().clone() for part, tensor in update.tensors().items()},
            scale=update.scale,
        )
        for module, update in adapter.updates.items()
    }
    return replace(adapter, updates=MappingProxyType(updates))


def open_adapters(experts: Sequence[Expert], model: Any, frozen_depth: int) -> ExpertAdapters:
    """The adapters of experts on a base.

    Args:
        experts: In the canonical order.
        model: The base model.
        frozen_depth: K.
    """
    return ExpertAdapters(experts, partial(find_block_input, model, frozen_depth))


_RANK = 2
_BLOCK = "blocks.0"


def make_up_adapters(
    names: Sequence[str], hidden_size: int, directions: Tensor | None = None
) -> ExpertAdapters:
    """Low-rank adapters of made-up numbers, each made when it is asked for; always the same.

    They change three layers of a block with an RMSNorm: "attention.query" and "attention.value",
    which read what enters the block, (D, D) each, and "mlp.up", (2 D, D).

    Args:
        names: Of the experts; the base has none.
        hidden_size: D.
        directions: What each expert's layers read most, (experts, D); drawn if None.
    """
    if directions is None:
        generator = torch.Generator().manual_seed(len(names))
        directions = torch.randn(len(names), hidden_size, generator=generator)
    experts = [
        Expert(name, None if name == BASE_EXPERT else partial(_make_up, name, index, direction))
        for index, (name, direction) in enumerate(zip(names, directions, strict=True))
    ]
    norm = InputNorm(torch.ones(hidden_size), torch.zeros(hidden_size), 1e-5, is_centred=False)
    readers = tuple(f"{_BLOCK}.attention.{part}" for part in ("query", "value"))
    return ExpertAdapters(experts, lambda: BlockInput(_BLOCK, readers, norm))


def _make_up(name: str, seed: int, direction: Tensor) -> Adapter:
    generator = torch.Generator().manual_seed(1_000 + seed)
    width = len(direction)
    updates = {}
    shapes = {"attention.query": width, "attention.value": width, "mlp.up": 2 * width}
    for part, rows in shapes.items():
        a = 0.3 * torch.randn(_RANK, width, generator=generator)
        a[0] += direction
        b = torch.randn(rows, _RANK, generator=generator)
        b[:, 1:] *= 0.3  # so that the first direction is the largest of the product
        updates[f"{_BLOCK}.{part}"] = LinearUpdate(a=a, b=b, scale=0.5)
    tensors = [tensor for update in updates.values() for tensor in _list(update)]
    return Adapter(
        name=name,
        kind="lora",
        frozen_depth=0,
        updates=updates,
        hash=hash_bytes(b"".join(tensor.numpy().tobytes() for tensor in tensors)),
        num_bytes=sum(tensor.nbytes for tensor in tensors),
    )
