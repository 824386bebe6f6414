"""An oblivious pseudo-random function: a keyed hash of which one side knows the key, one the input.

Whoever asks hashes an input to a point P of the curve P-256 and sends aP, which says nothing about
P; whoever answers returns baP; a is taken off again, and bP is hashed with the input to a tag.
Without b a tag cannot be told from a random number, so that one can be tried per question only.

This is 2HashDH (Jarecki, Kiayias, Krawczyk 2014, "Round-optimal password-protected secret
sharing"), the construction of RFC 9497. Multiplying a point is what ECDH of `cryptography` does,
and nothing else is computed on the curve here. It returns the x-coordinate, so a point and its
negative are one element throughout; x(abP) does not depend on which of the two stood for x(aP).
Points come from x-coordinates by hashing until one lies on the curve, since `cryptography` has no
hash_to_curve; that takes a time that depends on the input, at home, where nobody measures it. The
curve's order is prime: every element but infinity, which has no x-coordinate, generates all.
"""

import hashlib
import hmac
from collections.abc import Iterable, Sequence

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from numpy.typing import NDArray

__all__ = ["ELEMENT_BYTES", "Key", "compute_tags", "derive_bytes"]

ELEMENT_BYTES = 32
"""Of one x-coordinate, big-endian."""
MIN_SECRET_BYTES = 32

_CURVE = ec.SECP256R1()
_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_EVEN = b"\x02"  # of the two points with one x-coordinate, that with the even y
_POINT = b"molora-fed 8-gram overlap 1: point"
_TAG = b"molora-fed 8-gram overlap 1: tag"


class Key:
    """A secret number that elements are multiplied by.

    Args:
        scalar: From 1 to the curve's order less 1.
    """

    def __init__(self, scalar: int) -> None:
        self._scalar = scalar
        self._private = ec.derive_private_key(scalar, _CURVE)

    @classmethod
    def derive(cls, secret: bytes, *context: bytes) -> "Key":
        """The key of a secret for one purpose; equal arguments, equal keys.

        Args:
            secret: At least 32 random bytes, which stay at home.
            context: What it is for; other purposes have unrelated keys.
        """
        # 128 bits more than the order has, so that the remainder is as good as uniform.
        wide = derive_bytes(48, secret, b"scalar", *context)
        return cls(int.from_bytes(wide, "big") % (_ORDER - 1) + 1)

    def invert(self) -> "Key":
        """The key that takes this one off again."""
        return Key(pow(self._scalar, -1, _ORDER))

    def multiply_hashed(self, items: Iterable[bytes]) -> list[bytes]:
        """Elements of items, multiplied.

        Args:
            items: Any bytes, N of them.

        Returns:
            N elements.
        """
        exchange, algorithm = self._private.exchange, ec.ECDH()
        return [exchange(algorithm, _hash_to_point(item)) for item in items]

    def multiply(self, elements: Iterable[bytes]) -> list[bytes]:
        """Elements from outside, multiplied.

        Args:
            elements: N of them.

        Returns:
            N elements.

        Raises:
            ValueError: If one is not on the curve; the text says which, from 0.
        """
        exchange, algorithm = self._private.exchange, ec.ECDH()
        found = []
        for number, element in enumerate(elements):
            try:
                point = ec.EllipticCurvePublicKey.from_encoded_point(_CURVE, _EVEN + element)
            except ValueError:
                raise ValueError(f"element {number} is no point of P-256") from None
            found.append(exchange(algorithm, point))
        return found


def derive_bytes(size: int, secret: bytes, *context: bytes) -> bytes:
    """Bytes that follow from a secret and look random without it.

    Args:
        size: How many.
        secret: At least 32 random bytes.
        context: What they are for.
    """
    if len(secret) < MIN_SECRET_BYTES:
        raise ValueError(f"a secret of {len(secret)} bytes, fewer than {MIN_SECRET_BYTES}")
    # With their lengths, so that no two lists of parts are joined to the same bytes.
    parts = b"".join(len(part).to_bytes(8, "big") + part for part in context)
    seed = hmac.digest(secret, b"molora-fed 8-gram overlap 1" + parts, "sha512")
    return hashlib.shake_256(seed).digest(size)


def compute_tags(items: Sequence[bytes], elements: Sequence[bytes]) -> NDArray[np.uint64]:
    """Values of the pseudo-random function, (N,).

    The item is part of what is hashed: whoever answers falsely cannot produce the tag of an item
    that they do not know.

    Args:
        items: Inputs, N.
        elements: The points of them, multiplied by the answering side's key, N.
    """
    digests = (
        hashlib.sha256(_TAG + element + item).digest()[:8]
        for item, element in zip(items, elements, strict=True)
    )
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def _hash_to_point(item: bytes) -> ec.EllipticCurvePublicKey:
    """A point whose discrete logarithm nobody knows; about two tries."""
    start = hashlib.sha256(_POINT + item).digest()
    for attempt in range(256):  # all fail with probability 2^-256
        tried = hashlib.sha256(start + bytes([attempt])).digest()
        try:
            return ec.EllipticCurvePublicKey.from_encoded_point(_CURVE, _EVEN + tried)
        except ValueError:
            continue
    raise AssertionError("no point of P-256 in 256 tries")
