"""Signing keys: ECDSA on P-384 with SHA-384, in PEM files that only their owner can read.

Contributors and the coordinator hold the same sort of key. Whoever holds the key is the
contributor; names and network addresses are not identity.
"""

import os
import stat
import uuid
from contextlib import suppress
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)

from molora_fed.errors import SignatureError, StorageError
from molora_fed.storage.files import hash_bytes, write_bytes

__all__ = [
    "build_public_pem",
    "key_fingerprint",
    "load_key",
    "load_or_make_key",
    "sign",
    "verify",
]

MAX_PEM_BYTES = 4_096
_MAX_SIGNATURE = 208  # hex digits of two integers of 384 bits in DER
_ALGORITHM = ec.ECDSA(hashes.SHA384(), deterministic_signing=True)


def load_or_make_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a private key, or make one at the first call.

    Two processes that call this at once get the same key.

    Args:
        path: PEM file; made with mode 0600 in a folder that is made too.

    Raises:
        SignatureError: If a file is there that cannot be used; see `load_key`.
        StorageError: On I/O errors.
    """
    if not path.exists():
        key = ec.generate_private_key(ec.SECP384R1())
        pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex}.new")
        write_bytes(fresh, pem, mode=0o600)
        try:
            # A link, unlike a rename, never replaces a key that another process made meanwhile.
            with suppress(FileExistsError):
                os.link(fresh, path)
        except OSError as error:
            raise StorageError(
                f"Cannot make key '{path}': expected a writable folder, got {error.strerror}. "
                "Check the folder and its permissions, then run the same command again."
            ) from error
        finally:
            fresh.unlink()
    return load_key(path)


def load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a private key.

    Raises:
        SignatureError: If it is missing, readable by others, or not an unencrypted P-384 key.
    """
    what = f"Cannot use key '{path}'"
    try:
        status = path.stat()
        if stat.S_IMODE(status.st_mode) & 0o077:
            raise SignatureError(
                f"{what}: expected a file that only its owner can read (mode 600), got mode "
                f"{stat.S_IMODE(status.st_mode):o}. Run `chmod 600 {path}`."
            )
        if status.st_size > MAX_PEM_BYTES:
            raise ValueError(f"{status.st_size} bytes")
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except SignatureError:
        raise
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SignatureError(
            f"{what}: expected an unencrypted P-384 private key in PEM form, got {reason}. "
            "Restore the file from a backup; a new key is a new identity."
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise SignatureError(
            f"{what}: expected a P-384 private key, got {_describe(key)}. "
            "Point to the key made at the first join."
        )
    return key


def build_public_pem(key: ec.EllipticCurvePrivateKey) -> str:
    """The public half of a key, PEM text."""
    return (
        key.public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        .decode()
    )


def key_fingerprint(public_pem: str) -> str:
    """SHA-256 over a public key's DER form, lower-case hex; equal keys, equal fingerprints.

    Raises:
        SignatureError: If it is not a P-384 public key.
    """
    public = _load_public(public_pem)
    return hash_bytes(
        public.public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )


def sign(key: ec.EllipticCurvePrivateKey, data: bytes) -> str:
    """Sign bytes.

    Returns:
        The DER signature, lower-case hex; deterministic (RFC 6979).
    """
    return key.sign(data, _ALGORITHM).hex()


def verify(public_pem: str, data: bytes, signature: str, *, what: str = "data") -> None:
    """Check a signature.

    Args:
        public_pem: Public key of the claimed signer, PEM.
        data: The bytes that were signed.
        signature: Lower-case hex of DER in its minimal form, as `sign` returns it; nothing else.
        what: Name of the signed thing, used in the error.

    Raises:
        SignatureError: If the signature is not this key's signature of these bytes.
    """
    public = _load_public(public_pem)
    try:
        if len(signature) > _MAX_SIGNATURE:
            raise ValueError("too long")
        encoded = bytes.fromhex(signature)
        # One encoding only, so that a changed byte is always found.
        if encode_dss_signature(*decode_dss_signature(encoded)).hex() != signature:
            raise ValueError("another encoding")
        public.verify(encoded, data, _ALGORITHM)
    except (InvalidSignature, ValueError) as error:
        raise SignatureError(
            f"Cannot trust {what}: expected a signature of key {key_fingerprint(public_pem)[:16]}, "
            "got one that does not verify. Have its author sign and send it again."
        ) from error


def _load_public(public_pem: str) -> ec.EllipticCurvePublicKey:
    try:
        if len(public_pem) > MAX_PEM_BYTES:
            raise ValueError(f"{len(public_pem)} characters")
        key = serialization.load_pem_public_key(public_pem.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SignatureError(
            "Cannot use public key: expected a P-384 public key in PEM form, got unreadable text. "
            "Send the key that `molora join` made."
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise SignatureError(
            f"Cannot use public key: expected a P-384 key, got {_describe(key)}. "
            "Send the key that `molora join` made."
        )
    return key


def _describe(key: object) -> str:
    curve = getattr(key, "curve", None)
    return f"curve {curve.name}" if curve is not None else type(key).__name__
