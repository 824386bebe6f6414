"""The vectors that are summed: named parts with shapes and bounds, and one flat float64 form.

Both ways of summing, and whoever fits a router or measures by sums, describe a vector by the same
`VectorLayout`. It comes from the code and the charter at both ends, never from a message.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from molora_fed.errors import SumError
from molora_fed.storage.files import canonical_json, hash_bytes
from molora_fed.storage.untrusted import clean

__all__ = ["MAX_ENTRIES", "Part", "Summation", "Total", "VectorLayout"]

MAX_ENTRIES = 2**27
"""Entries of one vector: a gigabyte of float64."""
MAX_PARTS = 4_096
MAX_NAME = 200
_MIN_BOUND, _MAX_BOUND = 1e-250, 1e250  # so that no step of a fixed point is subnormal


@dataclass(frozen=True)
class Part:
    """One tensor of a vector.

    Attributes:
        name: Its name, at most 200 characters.
        shape: Its shape; () is a single number.
        bound: Largest absolute value of an entry of one member, > 0; larger ones are clipped.
    """

    name: str
    shape: tuple[int, ...]
    bound: float

    @property
    def length(self) -> int:
        """Entries."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class VectorLayout:
    """What a flat vector is made of, in order.

    Attributes:
        parts: Its parts; names differ.

    Raises:
        SumError: At construction, if there is no entry, too many, or a part is malformed.
    """

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        names = [part.name for part in self.parts]
        faults = [
            f"part '{clean(part.name, 80)}' of shape {part.shape} and bound {part.bound}"
            for part in self.parts
            if not 0 < len(part.name) <= MAX_NAME
            or any(size < 0 for size in part.shape)
            or not _MIN_BOUND <= part.bound <= _MAX_BOUND
        ]
        if faults or len(set(names)) != len(names) or len(names) > MAX_PARTS:
            got = "; ".join(faults[:5]) or f"{len(names)} parts, {len(set(names))} names"
            raise SumError(
                f"Cannot lay out a vector: expected at most {MAX_PARTS} parts of different names, "
                f"sizes of at least 0 and bounds of {_MIN_BOUND:g} to {_MAX_BOUND:g}, got {got}. "
                "Mend the code that states the parts."
            )
        if not 0 < self.length <= MAX_ENTRIES:
            raise SumError(
                f"Cannot lay out a vector: expected 1 to {MAX_ENTRIES:,} entries, got "
                f"{self.length:,}. Ask for smaller sums."
            )

    @property
    def length(self) -> int:
        """Entries of the flat vector, N."""
        return sum(part.length for part in self.parts)

    @property
    def digest(self) -> str:
        """SHA-256 over names, shapes and bounds; equal layouts, equal digests."""
        rows = [[part.name, list(part.shape), part.bound.hex()] for part in self.parts]
        return hash_bytes(canonical_json(rows))

    def places(self) -> Iterator[tuple[Part, slice]]:
        """Each part with its place in the flat vector."""
        start = 0
        for part in self.parts:
            yield part, slice(start, start + part.length)
            start += part.length

    def flatten(self, values: Mapping[str, torch.Tensor], *, who: str) -> NDArray[np.float64]:
        """One flat vector of a member's tensors, not clipped yet.

        Args:
            values: Tensor of each part by name, of that part's shape.
            who: The member, for errors.

        Returns:
            (N,) float64.

        Raises:
            SumError: If names or shapes differ.
        """
        expected = {part.name: part.shape for part in self.parts}
        got = {name: tuple(value.shape) for name, value in values.items()}
        if got != expected:
            wrong = sorted(
                name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name)
            )
            shown = ", ".join(
                f"'{clean(n, 80)}' {expected.get(n, 'none')} but {got.get(n, 'none')}"
                for n in wrong[:5]
            )
            raise SumError(
                f"Cannot sum the vector of '{clean(who, 80)}': expected the parts and shapes of "
                f"the layout, got another ({shown}). Run the same molora-fed version everywhere."
            )
        vector = np.empty(self.length, dtype=np.float64)
        for part, place in self.places():
            vector[place] = values[part.name].detach().cpu().to(torch.float64).reshape(-1).numpy()
        return vector

    def unflatten(self, vector: NDArray[np.float64]) -> dict[str, torch.Tensor]:
        """The tensors of a flat vector, (N,): float64, by name."""
        return {
            part.name: torch.from_numpy(vector[place].copy()).reshape(part.shape)
            for part, place in self.places()
        }

    def clip(self, vector: NDArray[np.float64], *, who: str) -> tuple[NDArray[np.float64], int]:
        """A member's vector within the bounds.

        Args:
            vector: (N,) float64.
            who: The member, for errors.

        Returns:
            The clipped copy, and how many entries were beyond their bound.

        Raises:
            SumError: If it has another length, another dtype, or an entry that is not finite.
        """
        name = clean(who, 80)
        if vector.dtype != np.float64 or vector.shape != (self.length,):
            raise SumError(
                f"Cannot sum the vector of '{name}': expected {self.length:,} entries of float64, "
                f"got {vector.shape} of {vector.dtype}. Leave that member out, or ask it to run "
                "the same molora-fed version."
            )
        clipped = np.empty_like(vector)
        beyond = 0
        for part, place in self.places():
            own = vector[place]
            if not np.isfinite(own).all():
                count = int((~np.isfinite(own)).sum())
                raise SumError(
                    f"Cannot sum the vector of '{name}': expected finite numbers, got {count:,} "
                    f"in part '{clean(part.name, 80)}' that are not. Leave that member out, or "
                    "ask it to check its text and its device."
                )
            np.clip(own, -part.bound, part.bound, out=clipped[place])
            beyond += int((np.abs(own) > part.bound).sum())
        return clipped, beyond


@dataclass(frozen=True, eq=False)
class Total:
    """The sum over members.

    Attributes:
        parts: Float64 tensor of each part by name.
        members: Whose vectors are in it, in fixed order.
        notes: What has to be said of it, a sentence each.
        encoded: The same in fixed point, (N,), where the sum was masked: equal to the last bit
            to the sum of its members' encoded vectors. None otherwise.
    """

    parts: Mapping[str, torch.Tensor] = field(repr=False)
    members: tuple[str, ...]
    notes: tuple[str, ...] = ()
    encoded: NDArray[np.unsignedinteger] | None = field(default=None, repr=False)


class Summation(Protocol):
    """Asks all members for a vector each and returns their sum, the charter's way."""

    def __call__(self, layout: VectorLayout, question: Mapping[str, torch.Tensor]) -> Total:
        """Wait for the members and sum.

        Args:
            layout: Parts of the vectors.
            question: What each member computes its vector from, tensors by name; the same for all.

        Raises:
            SumError: If too few members answer, or a sum cannot be made.
        """
