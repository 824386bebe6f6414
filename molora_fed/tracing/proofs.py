"""Inclusion proofs: that one record is in a sealed run, for someone who has only the public key."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molora_fed.errors import TraceError
from molora_fed.storage.keys import key_fingerprint
from molora_fed.tracing.merkle import build_path, compute_path_root, hash_leaf
from molora_fed.tracing.records import (
    FORMAT_VERSION,
    MAX_LINE_BYTES,
    SEAL,
    BadLineError,
    is_hash,
    parse_json,
    parse_line,
)
from molora_fed.tracing.run_scan import check_seal_signature, read_run_lines

__all__ = ["PROOF", "Proven", "build_proof", "check_proof", "read_proof"]

PROOF = "molora-trace-proof"
MAX_PROOF_BYTES = 3 * MAX_LINE_BYTES
MAX_PATH = 64


@dataclass(frozen=True)
class Proven:
    """What a proof shows.

    Attributes:
        run: The run's id.
        number: The record's place in the run.
        count: Records of the run.
        kind: What it records.
        body: What was recorded, JSON values.
        root: Merkle root of the run, hex.
    """

    run: str
    number: int
    count: int
    kind: str
    body: dict[str, Any]
    root: str


def build_proof(path: Path, number: int) -> dict[str, Any]:
    """Make the proof that a record is in a sealed run.

    Args:
        path: The run's folder, or the one file of an exported run.
        number: The record's place in the run, from 0, as `molora trace show` prints it.

    Returns:
        JSON values: the record's line, the hashes from it to the root, and the run's seal.

    Raises:
        TraceError: If the run has no seal, or no such record.
    """
    leaves: list[bytes] = []
    chosen = seal = None
    for _, _, line in read_run_lines(path):
        try:
            body, kind, _, _ = parse_line(line.data)
        except BadLineError as error:
            raise TraceError(
                f"Cannot prove from trace '{path}': expected a run that verifies, got a record at "
                f"byte {line.byte} that is none: {error}. Look at it with `molora trace verify`."
            ) from error
        if kind == SEAL:
            seal = body
            break
        if len(leaves) == number:
            chosen = line.data
        leaves.append(hash_leaf(line.data))
    if seal is None:
        raise TraceError(
            f"Cannot prove from trace '{path}': expected a sealed run, got an open one. Seal it."
        )
    if chosen is None:
        raise TraceError(
            f"Cannot prove record {number} of trace '{path}': expected a number from 0 to "
            f"{len(leaves) - 1}, got {number}. See `molora trace show`."
        )
    return {
        "proof": PROOF,
        "format": FORMAT_VERSION,
        "number": number,
        "line": chosen.decode("ascii"),
        "path": [digest.hex() for digest in build_path(leaves, number)],
        "seal": seal,
    }


def read_proof(path: Path) -> dict[str, Any] | None:
    """The proof in a file; None if the file is something else, such as a trace."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        data = file.read(MAX_PROOF_BYTES + 1)
    if len(data) > MAX_PROOF_BYTES or data.startswith(b'{"body":'):  # the latter is a trace
        return None
    try:
        value = parse_json(data, limit=MAX_PROOF_BYTES)
    except BadLineError:
        return None
    return value if isinstance(value, dict) and value.get("proof") == PROOF else None


def check_proof(proof: dict[str, Any], public_key: str, root: str | None = None) -> Proven:
    """Check a proof with the key that sealed the run.

    Args:
        proof: As `build_proof` makes it; from anywhere.
        public_key: PEM.
        root: Root of the run that was kept elsewhere, hex.

    Raises:
        SignatureError: If the key is not a P-384 public key.
        TraceError: If it proves nothing; the message says why.
    """
    fingerprint = key_fingerprint(public_key)
    number, line, path, seal = (proof.get(name) for name in ("number", "line", "path", "seal"))
    if type(number) is not int or not isinstance(line, str) or not isinstance(seal, dict):
        raise _refuse("a number, a line and a seal", "something else")
    if not isinstance(path, list) or len(path) > MAX_PATH or not all(map(is_hash, path)):
        raise _refuse("a list of hashes as path", "something else")
    if not check_seal_signature(seal, public_key):
        raise _refuse(f"a seal signed by key {fingerprint[:16]}", "no such")
    count, sealed_root, run = seal["count"], seal["root"], seal["run"]
    try:
        data = line.encode("ascii")
        body, kind, _, _ = parse_line(data)
    except ValueError as error:
        raise _refuse("a record", f"none: {error}") from error
    found = compute_path_root(hash_leaf(data), number, count, [bytes.fromhex(h) for h in path])
    if found is None or found.hex() != sealed_root:
        raise _refuse("a record and a path that lead to the sealed root", "others")
    if root is not None and root.lower() != sealed_root:
        raise _refuse(f"a run with root {root[:16]}", f"one with {sealed_root[:16]}")
    return Proven(run, number, count, kind, body, sealed_root)


def _refuse(expected: str, got: str) -> TraceError:
    return TraceError(
        f"Cannot trust proof: expected {expected}, got {got}. Ask for it again from the run."
    )
