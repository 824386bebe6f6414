"""Sealing a run: one signed Merkle root over all records; and the run as one file."""

import os
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from molora_fed.contributions.keys import build_public_pem, key_fingerprint
from molora_fed.errors import TraceError
from molora_fed.files import storage_errors, write_bytes, write_pieces
from molora_fed.tracing.locks import lock_run
from molora_fed.tracing.recovery import recover_segment
from molora_fed.tracing.run_scan import RunScan, read_run_lines
from molora_fed.tracing.segments import SEAL_FILE, list_segments
from molora_fed.tracing.verifying import verify

__all__ = ["export_run", "seal_run"]


def seal_run(folder: Path, *, key: ec.EllipticCurvePrivateKey) -> str:
    """Seal a run whose writers are closed; one that is sealed already is left as it is.

    A torn end that a killed writer left is set aside first, as at its reopening.

    Args:
        folder: The run's folder.
        key: The key of the run.

    Returns:
        The Merkle root over all records, hex.

    Raises:
        TraceError: If a writer is still open, or the run does not verify.
        StorageError: If the disk refuses.
    """
    public = build_public_pem(key)
    lock = lock_run(folder, shared=False)
    try:
        if (folder / SEAL_FILE).exists():
            return _check_sealed(folder, public)
        return _seal(folder, key, public)
    finally:
        lock.close()


def _check_sealed(folder: Path, public: str) -> str:
    report = verify(folder, public)
    if not report.ok:
        raise _refuse(folder, str(report.problems[0]))
    return report.root


def _seal(folder: Path, key: ec.EllipticCurvePrivateKey, public: str) -> str:
    names = list_segments(folder)
    if not names:
        raise _refuse(folder, "no segment")
    last = {name.writer: name for name in names}
    for name in last.values():
        recover_segment(folder, name, public_pem=public, fingerprint=key_fingerprint(public))
    scan = RunScan(public)
    closing: dict[str, bytes] = {}
    for name in names:
        scan.add_file(folder / name.file)
        if name == last[name.writer] and (line := scan.close_segment(key)):
            closing[name.file] = line
    body, line = scan.build_seal(key)
    if scan.problems:
        raise _refuse(folder, str(scan.problems[0]))
    for file, data in closing.items():
        with storage_errors(folder / file), (folder / file).open("ab") as target:
            target.write(data + b"\n")
            target.flush()
            os.fsync(target.fileno())
    write_bytes(folder / SEAL_FILE, line + b"\n")
    return str(body["root"])


def _refuse(folder: Path, got: str) -> TraceError:
    return TraceError(
        f"Cannot seal trace '{folder}': expected a run that verifies, got {got}. "
        "Look at it with `molora trace verify`."
    )


def export_run(folder: Path, target: Path) -> None:
    """Write a sealed run as one file: its segments in order, then its seal.

    Raises:
        TraceError: If it is not sealed.
        StorageError: If the disk refuses.
    """
    if not (folder / SEAL_FILE).is_file():
        raise TraceError(
            f"Cannot export trace '{folder}': expected a sealed run, got an open one. Seal it."
        )
    write_pieces(target, (line.data + b"\n" for _, _, line in read_run_lines(folder)))
