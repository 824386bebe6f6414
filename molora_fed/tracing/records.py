"""The record of a trace: one line of JSON, what its bytes must be, and what is signed of it.

A line is an ASCII JSON object with sorted keys and no spaces,
`{"body":{...},"kind":"...","prev":"<SHA-256 of the line before>","seq":N}`, ended by one newline
that belongs to no hash. See docs/traces.md.
"""

import json
import re
from dataclasses import dataclass
from hashlib import sha256
from math import isfinite
from typing import Any, NoReturn

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)

from molora_fed.errors import SignatureError
from molora_fed.storage import keys

__all__ = [
    "CHECKPOINT",
    "FORMAT_VERSION",
    "GENESIS",
    "HEADER",
    "MAX_DEPTH",
    "MAX_LINE_BYTES",
    "RESERVED_KINDS",
    "SEAL",
    "BadLineError",
    "Record",
    "check_signature",
    "encode_json",
    "encode_line",
    "hash_line",
    "is_hash",
    "is_kind",
    "parse_json",
    "parse_line",
    "sign_statement",
]


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


FORMAT_VERSION = 1
MAX_LINE_BYTES = 4 << 20
"""Longest line, without its newline."""
MAX_DEPTH = 64
"""Lists and objects inside each other."""

HEADER, CHECKPOINT, SEAL = "header", "checkpoint", "seal"
RESERVED_KINDS = frozenset({HEADER, CHECKPOINT, SEAL})
GENESIS = "0" * 64
"""`prev` of a writer's very first line."""

_HASH = re.compile(r"[0-9a-f]{64}")
_KIND = re.compile(r"[a-z][a-z0-9-]{0,63}")
# Takes an unfinished string to the end of the data: linear in time whatever the bytes.
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"?', re.DOTALL)
_NO_BRACKETS = bytes(sorted(set(range(256)) - set(b"[]{}")))
_KEYS = {"body", "kind", "prev", "seq"}


class BadLineError(ValueError):
    """Bytes that are no record; the message says why, without where."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a trace.

    Attributes:
        file: Name of the file it stands in.
        number: Its place in the whole run, from 0; what `prove` takes.
        byte: Where its line begins in the file.
        writer: Who wrote it.
        seq: Its place in its segment, from 0.
        kind: What it records, e.g. "decision".
        body: What was recorded, JSON values.
    """

    file: str
    number: int
    byte: int
    writer: str
    seq: int
    kind: str
    body: dict[str, Any]


def _refuse_constant(name: str) -> NoReturn:
    raise BadLineError(f"a number {name}, which JSON does not have")


def _parse_float(text: str) -> float:
    number = float(text)
    if not isfinite(number):
        raise BadLineError("a number beyond what a float holds")
    return number


# Escaping everything beyond ASCII keeps lone surrogates, which models and endpoints do send.
encode_json = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
).encode
_decode = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_parse_float).decode


def encode_line(body: str, kind: str, prev: str, seq: int) -> bytes:
    """The bytes of a record, without newline.

    Args:
        body: The body as `encode_json` gives it.
        kind: What it records.
        prev: Hash of the line before.
        seq: Place in the segment.
    """
    return f'{{"body":{body},"kind":"{kind}","prev":"{prev}","seq":{seq}}}'.encode("ascii")


def hash_line(line: bytes) -> str:
    """What the next line carries as `prev`: SHA-256 in lower-case hex, newline left out."""
    return sha256(line).hexdigest()


def is_hash(value: object) -> bool:
    """Whether a value is 64 lower-case hex digits."""
    return isinstance(value, str) and _HASH.fullmatch(value) is not None


def is_kind(value: object) -> bool:
    """Whether a value may name a kind of record."""
    return isinstance(value, str) and _KIND.fullmatch(value) is not None


def parse_json(data: bytes, *, limit: int = MAX_LINE_BYTES) -> Any:
    """Read JSON from hostile bytes.

    Args:
        data: The bytes.
        limit: How many there may be.

    Raises:
        BadLineError: If it is too long, nested too deep, not ASCII or not JSON.
    """
    if len(data) > limit:
        raise BadLineError(f"expected {limit} bytes at most, got more")
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH and _measure_depth(data) > MAX_DEPTH:
        raise BadLineError(f"expected at most {MAX_DEPTH} lists and objects in each other")
    try:
        return _decode(data.decode("ascii"))
    except BadLineError:
        raise
    except UnicodeDecodeError as error:
        raise BadLineError(f"expected ASCII, got byte 0x{data[error.start]:02x}") from error
    except json.JSONDecodeError as error:
        raise BadLineError(f"expected JSON, got {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # e.g. an integer of 5,000 digits
        raise BadLineError(f"expected readable JSON, got {type(error).__name__}") from error


def parse_line(line: bytes) -> tuple[dict[str, Any], str, str, int]:
    """Read a record from hostile bytes.

    Args:
        line: One line without its newline.

    Returns:
        Body, kind, prev and seq.

    Raises:
        BadLineError: If it is no record.
    """
    value = parse_json(line)
    if not isinstance(value, dict) or value.keys() != _KEYS:
        raise BadLineError("expected an object with body, kind, prev and seq")
    body, kind, prev, seq = value["body"], value["kind"], value["prev"], value["seq"]
    if not isinstance(body, dict):
        raise BadLineError("expected an object as body")
    if not is_kind(kind):
        raise BadLineError("expected a lower-case word as kind")
    if not is_hash(prev):
        raise BadLineError("expected 64 hex digits as prev")
    if type(seq) is not int:
        raise BadLineError("expected a whole number as seq")
    return body, kind, prev, seq


def _measure_depth(data: bytes) -> int:
    depth = deepest = 0
    for byte in _STRING.sub(b"", data).translate(None, _NO_BRACKETS):
        depth += 1 if byte in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest
