"""The cryptography of masked sums: key agreement, derived keys, mask streams, shared secrets.

X25519, HKDF-SHA256, AES-256-CTR and ChaCha20-Poly1305 of `cryptography`; Shamir's secret sharing
over a prime field. Flower's own are not used: see docs/sums.md.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from molora_fed.errors import SumError

__all__ = [
    "SHARE_BYTES",
    "add_stream",
    "agree_secret",
    "combine_shares",
    "compute_public",
    "derive_key",
    "open_sealed",
    "seal",
    "split_secret",
]

PRIME = 2**521 - 1  # a Mersenne prime above every secret of 64 bytes
SHARE_BYTES = 66
_PIECE_BYTES = 2**18  # of a stream at a time: it stays in the cache
_NONCE = bytes(12)  # every key seals one text only


def derive_key(secret: bytes, context: str, *labels: str, length: int = 32) -> bytes:
    """A key of one purpose.

    Args:
        secret: What it is derived from.
        context: Hash of the terms of a sum; no key of one sum is a key of another.
        labels: Purpose, parties and whatever else it is bound to.
        length: Bytes.
    """
    encoded = [label.encode() for label in labels]
    info = b"".join(len(label).to_bytes(4, "big") + label for label in encoded)
    return HKDF(hashes.SHA256(), length, bytes.fromhex(context), info).derive(secret)


def compute_public(private: bytes) -> bytes:
    """The public half of an X25519 key of 32 bytes."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree_secret(private: bytes, public: bytes) -> bytes:
    """The secret that two holders of X25519 keys share.

    Raises:
        ValueError: If the public key has low order, so that the secret is known to everybody.
    """
    return X25519PrivateKey.from_private_bytes(private).exchange(
        X25519PublicKey.from_public_bytes(public)
    )


def seal(key: bytes, text: bytes) -> bytes:
    """Encrypt the only text that is ever sealed with this key."""
    return ChaCha20Poly1305(key).encrypt(_NONCE, text, None)


def open_sealed(key: bytes, sealed: bytes) -> bytes:
    """Decrypt.

    Raises:
        ValueError: If it was not sealed with this key, or was altered.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(_NONCE, sealed, None)
    except InvalidTag:
        raise ValueError("text that does not open") from None


def add_stream(words: NDArray[np.unsignedinteger], key: bytes, *, sign: int) -> None:
    """Add a mask to a vector, or take it away, in place and modulo 2^k.

    The mask is the key stream of AES-256 in counter mode, so that to whoever lacks the key every
    vector of words is as likely as any other.

    Args:
        words: (N,) unsigned integers.
        key: 32 bytes, of this one mask.
        sign: +1 or -1.
    """
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    zeros = bytes(_PIECE_BYTES)
    piece = bytearray(_PIECE_BYTES + 16)
    mask = np.frombuffer(piece, dtype=words.dtype, count=_PIECE_BYTES // words.itemsize)
    for start in range(0, len(words), len(mask)):
        own = words[start : start + len(mask)]
        stream.update_into(zeros, piece)
        if sign > 0:
            np.add(own, mask[: len(own)], out=own)
        else:
            np.subtract(own, mask[: len(own)], out=own)


def split_secret(
    secret: bytes, places: Sequence[int], threshold: int, *, key: bytes, context: str
) -> dict[int, bytes]:
    """Shamir's shares: any `threshold` of them give the secret, fewer say nothing of it.

    Args:
        secret: Fewer than 65 bytes.
        places: Where the polynomial is evaluated, each once, from 1.
        threshold: Coefficients, the secret among them.
        key: What the other coefficients are derived from; equal keys give equal shares.
        context: Hash of the terms.

    Returns:
        66 bytes by place.
    """
    # 80 bytes modulo a prime of 521 bits: nothing of 2^-119 is left of the modulus.
    coefficients = [int.from_bytes(secret, "big")]
    coefficients += [
        int.from_bytes(derive_key(key, context, "coefficient", str(power), length=80), "big")
        % PRIME
        for power in range(1, threshold)
    ]
    shares = {}
    for place in places:
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * place + coefficient) % PRIME
        shares[place] = value.to_bytes(SHARE_BYTES, "big")
    return shares


def combine_shares(shares: Mapping[int, bytes], *, length: int = 32) -> bytes:
    """The secret of `threshold` shares by place; of other shares, some value or an error.

    Raises:
        SumError: If the value is longer than the secret: a share is not of this secret.
    """
    places = tuple(sorted(shares))
    weights = _weigh(places)
    value = sum(
        weight * int.from_bytes(shares[place], "big")
        for place, weight in zip(places, weights, strict=True)
    )
    value %= PRIME
    if value.bit_length() > 8 * length:
        raise SumError(
            f"Cannot combine shares: expected those of a secret of {length} bytes, got others. "
            "Leave out the member whose secret it is."
        )
    return value.to_bytes(length, "big")


@lru_cache(maxsize=64)
def _weigh(places: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's weights at 0."""
    weights = []
    for place in places:
        above, below = 1, 1
        for other in places:
            if other != place:
                above = above * other % PRIME
                below = below * (other - place) % PRIME
        weights.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(weights)
