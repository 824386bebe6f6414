"""Processes that take the steps of one training together, each on its share of the batch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

from molora_fed.errors import TrainingError

__all__ = ["ALONE", "Team"]

_NUMBERS_AT_ONCE = 2**24  # summed in one message: a copy of them is made
_Value = TypeVar("_Value", bound=np.generic)


@dataclass(frozen=True)
class Team:
    """The processes of a training, seen from one of them.

    With more than one, each has joined torch's default process group. What they exchange is summed,
    so that after every step all hold the same parameters, equal to those of one process but for
    rounding.

    Attributes:
        rank: Number of this process, from 0; the first writes checkpoint, metrics and result.
        size: How many there are.
        device: Where what they exchange lies.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009

    @property
    def is_first(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def describe(self) -> Mapping[str, int]:
        """What a record says of them: nothing of one that is alone."""
        return {"processes": self.size} if self.size > 1 else {}

    def take_share(self, values: NDArray[_Value]) -> NDArray[_Value]:
        """This process's part of an array: adjacent rows, at most one more than another's."""
        share: NDArray[_Value] = np.array_split(values, self.size)[self.rank]
        return share

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one dtype by their sums over all processes."""
        if self.size > 1:
            for group in _group(tensors):
                flat = torch.cat([tensor.flatten() for tensor in group])
                distributed.all_reduce(flat)
                _spread(flat, group)

    def share_first(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one dtype by those of the first process."""
        if self.size > 1:
            for group in _group(tensors):
                flat = torch.cat([tensor.flatten() for tensor in group])
                distributed.broadcast(flat, src=0)
                _spread(flat, group)

    def meet(self) -> None:
        """Wait until all processes are here."""
        mark = torch.zeros(1, device=self.device)
        self.add_up([mark])
        mark.item()  # a device is asked, not waited for, until its number is read

    def check_same(self, number: int, what: str) -> None:
        """Check that all processes read the same number.

        Raises:
            TrainingError: If one of them read another; all of them raise.
        """
        found = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        found[self.rank] = number
        self.add_up([found])
        numbers = [int(value) for value in found]
        if len(set(numbers)) > 1:
            raise TrainingError(
                f"Cannot train in {self.size} processes: expected all of them to read the same "
                f"step from {what}, got {', '.join(map(str, numbers))}. Let all machines see the "
                "same folder."
            )


ALONE = Team()
"""One process."""


def _group(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours that are sent together."""
    group: list[Tensor] = []
    for tensor in tensors:
        if group and sum(t.numel() for t in group) + tensor.numel() > _NUMBERS_AT_ONCE:
            yield group
            group = []
        group.append(tensor)
    if group:
        yield group


def _spread(flat: Tensor, group: Sequence[Any]) -> None:
    """Put numbers back where they came from."""
    parts = flat.split([tensor.numel() for tensor in group])
    with torch.no_grad():
        for tensor, part in zip(group, parts, strict=True):
            tensor.copy_(part.view_as(tensor))
