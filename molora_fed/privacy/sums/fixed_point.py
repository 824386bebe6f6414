"""Fixed point: float64 within bounds as integers modulo 2^k, whose sums are exact.

A part's step is a power of two, so that scaling an entry is exact and only its rounding to an
integer is not: half a step a member. f, the bits after the bound, is the largest with
n * 2^f < 2^(k-1) for n members; nothing can overflow whoever takes part.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from molora_fed.errors import SumError
from molora_fed.privacy.sums.vectors import Part, VectorLayout
from molora_fed.storage.files import canonical_json, hash_bytes
from molora_fed.storage.untrusted import clean

__all__ = ["Bits", "FixedPoint", "word_type"]

Bits = Literal[8, 16, 32, 64]


def word_type(bits: int) -> np.dtype[np.unsignedinteger]:
    """Little-endian unsigned integers of so many bits; their arithmetic wraps at 2^bits."""
    return np.dtype(f"<u{bits // 8}")


@dataclass(frozen=True)
class FixedPoint:
    """Encodes vectors of a layout so that up to so many members' sums are exact.

    Attributes:
        layout: Parts with their bounds.
        max_members: Largest number of members that is summed over, at least 1.
        bits: k of the modulus 2^k; 64 keeps more than float64 does, 32 halves what is sent.

    Raises:
        SumError: At construction, if the members leave no bit for a value.
    """

    layout: VectorLayout
    max_members: int
    bits: Bits = 64

    def __post_init__(self) -> None:
        if self.max_members < 1 or self.fraction_bits < 1:
            raise SumError(
                f"Cannot encode sums over {self.max_members} members in {self.bits} bits: "
                "expected at least one bit for a value, got none. Take more bits."
            )

    @property
    def fraction_bits(self) -> int:
        """f: a part's bound, rounded up to a power of two, is 2^f steps."""
        return self.bits - 1 - self.max_members.bit_length()

    @property
    def digest(self) -> str:
        """SHA-256 over all that decides the encoding."""
        return hash_bytes(canonical_json([self.layout.digest, self.max_members, self.bits]))

    def step(self, part: Part) -> float:
        """Value of the integer 1 in a part, a power of two."""
        return math.ldexp(1.0, self._step_exponent(part))

    def max_error(self, part: Part, members: int) -> float:
        """Largest rounding error of an entry of a total.

        Half a step a member, and float64's own rounding of the total.
        """
        return members * self.step(part) / 2 + members * part.bound * 2.0**-53

    def encode(self, vector: NDArray[np.float64]) -> NDArray[np.unsignedinteger]:
        """A clipped vector, (N,) float64, as integers modulo 2^k, (N,); half goes to even.

        Raises:
            SumError: If an entry lies beyond its bound.
        """
        words = np.empty(self.layout.length, dtype=word_type(self.bits))
        for part, place in self.layout.places():
            if not (np.abs(vector[place]) <= part.bound).all():
                raise SumError(
                    f"Cannot encode part '{clean(part.name, 80)}': expected entries within "
                    f"{part.bound:g}, got one beyond. Clip the vector first."
                )
            steps = np.rint(np.ldexp(vector[place], -self._step_exponent(part)))
            words[place] = steps.astype(np.int64).astype(words.dtype)  # wraps: modulo 2^k
        return words

    def decode(self, total: NDArray[np.unsignedinteger], members: int) -> NDArray[np.float64]:
        """A total of encoded vectors, (N,), as float64.

        Args:
            total: Sum modulo 2^k.
            members: Number of vectors in it.

        Raises:
            SumError: If no vectors within the bounds have this total: a member did not clip.
        """
        if not 1 <= members <= self.max_members:
            raise SumError(
                f"Cannot decode a total: expected 1 to {self.max_members} members, got {members}. "
                "Encode for the largest number of members."
            )
        values = np.empty(self.layout.length, dtype=np.float64)
        for part, place in self.layout.places():
            own = total[place].astype(f"i{self.bits // 8}").astype(np.int64)
            exponent = self._step_exponent(part)
            limit = members * round(math.ldexp(part.bound, -exponent))
            if not ((own >= -limit) & (own <= limit)).all():
                raise SumError(
                    f"Cannot use the total of part '{clean(part.name, 80)}': expected at most "
                    f"{members} times the bound {part.bound:g}, got more, so a member did not "
                    "clip its vector. Repeat the sum among halves to find out where it is."
                )
            values[place] = np.ldexp(own.astype(np.float64), exponent)
        return values

    def _step_exponent(self, part: Part) -> int:
        mantissa, exponent = math.frexp(part.bound)
        return exponent - (mantissa == 0.5) - self.fraction_bits
