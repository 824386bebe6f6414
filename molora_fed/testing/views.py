"""What conformance checks do to the views routers read, whatever columns these have."""

from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["change_future", "columns_of", "same_views", "take_rows"]

View = TypeVar("View")


def columns_of(view: Any) -> dict[str, Tensor]:
    """The columns a view has, by name."""
    columns = {f.name: getattr(view, f.name) for f in fields(view)}
    return {name: column for name, column in columns.items() if column is not None}


def take_rows(view: View, index: Tensor) -> View:
    """The view of some of its texts, in the order of `index`."""
    return type(view)(**{name: column[index] for name, column in columns_of(view).items()})


def same_views(one: Any, other: Any) -> bool:
    """Whether two views hold the same numbers."""
    first, second = columns_of(one), columns_of(other)
    return all(torch.equal(first[name], second[name]) for name in first)


def change_future(view: View, now: int) -> View:
    """The view with everything after position `now` replaced."""
    changed = {}
    for name, column in columns_of(view).items():
        future = column[:, now + 1 :]
        other = ~future if future.dtype == torch.bool else future.flip(0) * -2 + 1
        changed[name] = torch.cat([column[:, : now + 1], other], dim=1)
    return type(view)(**changed)
