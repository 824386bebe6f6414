"""What compares held-out text with others' train text, as it rides along with questions on sums.

Beside the counts of the first answer go a member's query and its set, signed. All queries and sets
go out beside the first sum's question, replies come back; each member's replies go out beside the
second sum's question, and counts come back. No message round is added, and no sum depends on it.
"""

from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from molora_fed.contributions.manifest import Manifest
from molora_fed.errors import FederationError
from molora_fed.federation.signing import build_set_bytes
from molora_fed.privacy.messages import MAX_QUERY_BYTES, MAX_SET_BYTES, TagSet
from molora_fed.storage.files import hash_bytes
from molora_fed.storage.keys import sign, verify

__all__ = [
    "COUNTS",
    "OFFER_BYTES",
    "OVERLAP",
    "QUERIES",
    "QUERY",
    "REPLIES",
    "SETS",
    "SIGNATURES",
    "read_part",
    "read_set",
    "sign_set",
]

OVERLAP: Final = "overlap"
"""The folder of a question or an answer in which it lies."""
QUERY, QUERIES = f"{OVERLAP}/query", f"{OVERLAP}/queries"
"""A member's in its answer; all members' by name in a question, and so on."""
SET, SETS = f"{OVERLAP}/set", f"{OVERLAP}/sets"
SIGNATURE, SIGNATURES = f"{OVERLAP}/signature", f"{OVERLAP}/signatures"
REPLIES: Final = f"{OVERLAP}/replies"
"""In an answer by asker, in a question by whose they are."""
COUNTS: Final = f"{OVERLAP}/counts.json"
_SIGNATURE_BYTES = 1_000
OFFER_BYTES: Final = MAX_QUERY_BYTES + MAX_SET_BYTES + _SIGNATURE_BYTES
"""What a member sends at most beside its first counts."""


def read_part(path: Path, max_bytes: int) -> bytes:
    """Read one file from outside.

    Raises:
        FederationError: If there is none, or it is too long.
    """
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise _malformed(path, f"a file, got {type(error).__name__}") from error
    if len(data) > max_bytes:
        raise _malformed(path, f"at most {max_bytes:,} bytes, got more")
    return data


def _malformed(path: Path, what: str) -> FederationError:
    return FederationError(
        f"Cannot compare held-out text: expected as '{path.parent.name}/{path.name}' {what}. Run "
        "the same molora-fed version on both sides."
    )


def sign_set(data: bytes, key: EllipticCurvePrivateKey, *, identity: str, fusion: str) -> bytes:
    """The signature that goes with a set.

    Args:
        data: The set.
        key: Of whose set it is.
        identity: The charter's identity hash.
        fusion: Id of the fusion.
    """
    return sign(key, build_set_bytes(identity, fusion, hash_bytes(data))).encode()


def read_set(path: Path, signature: Path, owner: Manifest, *, fusion: str) -> tuple[TagSet, bytes]:
    """Read a member's set from outside.

    Args:
        path: File of the set.
        signature: File of its signature.
        owner: Whose set it is said to be.
        fusion: Id of the fusion.

    Returns:
        The set, and its bytes.

    Raises:
        FederationError: If it is malformed.
        SignatureError: If that member did not sign it for this fusion.
    """
    data, signed = read_part(path, MAX_SET_BYTES), read_part(signature, _SIGNATURE_BYTES)
    content = build_set_bytes(owner.charter_identity, fusion, hash_bytes(data))
    what = f"set of '{owner.contributor}' on held-out text"
    verify(owner.public_key, content, signed.decode("ascii", "replace"), what=what)
    return TagSet.read(data, owner.contributor), data
