"""What is signed in a trace, and the one form of a signature that counts.

Every statement names what it is, so that no signature made for one thing passes for another.
"""

from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)

from molora_fed.contributions import keys
from molora_fed.errors import SignatureError
from molora_fed.tracing.records import encode_json

__all__ = ["check_signature", "sign_statement"]

# Order of P-384 (FIPS 186-4, D.1.2.4). With (r, s) also (r, order - s) verifies; only the smaller
# s counts here, so that a signature has one form and every changed byte of it is found.
_ORDER = int(
    "ffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52973",
    16,
)


def sign_statement(key: ec.EllipticCurvePrivateKey, purpose: str, statement: dict[str, Any]) -> str:
    """Sign JSON values for one purpose.

    Args:
        key: The coordinator's key.
        purpose: E.g. "checkpoint".
        statement: What is stated.

    Returns:
        DER signature in lower-case hex; the same for the same statement.
    """
    r, s = decode_dss_signature(bytes.fromhex(keys.sign(key, _encode(purpose, statement))))
    return encode_dss_signature(r, min(s, _ORDER - s)).hex()


def check_signature(
    public_pem: str, purpose: str, statement: dict[str, Any], signature: object
) -> bool:
    """Whether a signature is this key's, of this statement for this purpose, in its one form."""
    try:
        if not isinstance(signature, str) or len(signature) > 256:
            return False
        r, s = decode_dss_signature(bytes.fromhex(signature))
        if s > _ORDER - s or encode_dss_signature(r, s).hex() != signature:
            return False
        keys.verify(public_pem, _encode(purpose, statement), signature)
    except (SignatureError, ValueError):
        return False
    return True


def _encode(purpose: str, statement: dict[str, Any]) -> bytes:
    return encode_json({"purpose": f"molora trace {purpose}", "statement": statement}).encode()
