"""What lies over a vector: a member's own mask, and one for each pair of participants.

Members and coordinator make the same masks here, the ones to put them on, the other to take off
those whose secrets were revealed.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from molora_fed.errors import SumError
from molora_fed.privacy.sums.fixed_point import word_type
from molora_fed.privacy.sums.messages import Terms
from molora_fed.privacy.sums.primitives import add_stream, derive_key
from molora_fed.storage.files import canonical_json, hash_bytes

__all__ = ["add_own_mask", "add_pairwise_mask", "commit", "hash_names", "hash_words"]


def add_own_mask(
    words: NDArray[np.unsignedinteger],
    seed: bytes,
    context: str,
    participants: str,
    *,
    owner: str,
    sign: int = 1,
) -> None:
    """Add, in place, the mask that only `owner` knows.

    Args:
        words: (N,) modulo 2^k.
        seed: The owner's.
        context: `Terms.context`.
        participants: `hash_names` of the participants: other participants, another mask.
        owner: Whose vector it is.
        sign: -1 takes the mask away.
    """
    add_stream(words, derive_key(seed, context, "own", owner, participants), sign=sign)


def add_pairwise_mask(
    words: NDArray[np.unsignedinteger],
    secret: bytes,
    context: str,
    participants: str,
    *,
    owner: str,
    other: str,
    sign: int = 1,
) -> None:
    """Add, in place, the mask that `owner` has over its vector on behalf of `other`.

    `other` has the negative one, so that both vanish in a sum.

    Args:
        words: (N,) modulo 2^k.
        secret: What both share.
        context: `Terms.context`.
        participants: `hash_names` of the participants.
        owner: Whose vector it is.
        other: The other member.
        sign: -1 takes the mask away.
    """
    first, second = sorted((owner, other))
    key = derive_key(secret, context, "mask of a pair", first, second, participants)
    add_stream(words, key, sign=sign if owner == first else -sign)


def commit(context: str, kind: str, owner: str, holder: str, secret: bytes) -> str:
    """Hash that binds whoever says it to a secret of at least 256 bits, and does not show it."""
    return hash_bytes(canonical_json(["commitment", context, kind, owner, holder, secret.hex()]))


def hash_names(names: Sequence[str]) -> str:
    """Digest of the names of participants."""
    return hash_bytes(canonical_json(list(names)))


def hash_words(vector: NDArray[np.unsignedinteger], terms: Terms) -> str:
    """SHA-256 of an encoded vector.

    Raises:
        SumError: If it is of another length or modulus than the terms say.
    """
    if vector.dtype != word_type(terms.bits) or vector.shape != (terms.length,):
        raise SumError(
            f"Cannot take part in a masked sum: expected {terms.length:,} words of {terms.bits} "
            f"bits, got {vector.shape} of {vector.dtype}. Run the same molora-fed version on "
            "both sides."
        )
    return hash_bytes(vector.tobytes())
