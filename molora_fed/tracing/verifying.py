"""Sealing a trace, and verifying it with nothing but its files and the public key."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from molora_fed.errors import TraceError
from molora_fed.storage.files import is_folder, storage_errors, write_bytes, write_pieces
from molora_fed.storage.keys import build_public_pem, key_fingerprint
from molora_fed.storage.untrusted import clean
from molora_fed.tracing.locks import lock_run
from molora_fed.tracing.records import HEADER, SEAL, BadLineError, parse_line
from molora_fed.tracing.recovery import recover_segment
from molora_fed.tracing.run_scan import FAULTS, Problem, RunScan, read_run_lines
from molora_fed.tracing.segments import SEAL_FILE, TORN_SUFFIX, list_segments, read_lines

__all__ = [
    "Problem",
    "Report",
    "SignedRoot",
    "export_run",
    "seal_run",
    "verify",
]


MAX_ASIDE = 100
"""Names of files with torn ends in one report; anybody may have put them there."""
AFTER_SEAL = "expected nothing after the seal"


@dataclass(frozen=True)
class SignedRoot:
    """The last signed checkpoint of a segment.

    Attributes:
        file: The segment's file.
        count: Records before the checkpoint.
        root: Merkle root over them, hex.
    """

    file: str
    count: int
    root: str


@dataclass(frozen=True)
class Report:
    """What verifying found.

    Attributes:
        ok: Whether nothing is wrong.
        sealed: Whether the run has a seal.
        run: The run's id; "" if unknown.
        root: Merkle root over all records of a sealed run, hex; "" of an open one.
        checkpoints: The last good checkpoint of each segment.
        records: Records read, seal left out.
        covered: Those that a signature vouches for.
        problems: What is wrong, the first 100.
        notes: What to know besides, e.g. a torn end.
    """

    ok: bool
    sealed: bool
    run: str
    root: str
    checkpoints: tuple[SignedRoot, ...]
    records: int
    covered: int
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]


def verify(path: Path, public_key: str, root: str | None = None) -> Report:
    """Check every record, checkpoint and seal of a run.

    A sealed run: every change is found. An open run: every change up to the last checkpoint of
    each segment is found; what follows only chains. That a whole run was put back to an older
    valid state is found only by comparing with a root kept elsewhere.

    Args:
        path: A run's folder, or the one file of an exported run.
        public_key: Key that signs the run, PEM.
        root: Root kept elsewhere, hex: of the seal, or of a checkpoint the run must contain.

    Raises:
        SignatureError: If the key is not a P-384 public key.
        TraceError: If there is nothing to read at the path. What is wrong in the files is in the
            report.
    """
    scan = RunScan(public_key)
    if is_folder(path):
        sealed, notes = _read_folder(scan, path)
    else:
        sealed, notes = _read_file(scan, path), []
    if not scan.scans:
        scan.report(path.name, 0, 0, "expected the records of a run, got none")
    if root is not None:
        _check_root(scan, path.name, root.lower())
    ok = not scan.problems
    return Report(
        ok=ok,
        sealed=sealed,
        run=scan.run,
        root=scan.tree.root().hex() if sealed else "",
        checkpoints=tuple(_list_signed(scan)),
        records=scan.tree.size,
        covered=scan.tree.size if sealed and ok else sum(each.covered for each in scan.scans),
        problems=tuple(scan.problems),
        notes=tuple(notes),
    )


def _read_folder(scan: RunScan, folder: Path) -> tuple[bool, list[str]]:
    notes = []
    sealed = os.path.lexists(folder / SEAL_FILE)
    names = list_segments(folder)
    last = {name.writer: name for name in names}
    for name in names:
        begun, path = len(scan.scans), folder / name.file
        for number, line in enumerate(read_lines(path)):
            may_be_torn = not sealed and name == last[name.writer] and len(scan.scans) > begun
            if line.fault == "torn" and may_be_torn:
                size = len(line.data)
                notes.append(f"{name.file}: torn end of {size} bytes at byte {line.byte}")
            elif line.fault:
                scan.report(name.file, number, line.byte, FAULTS[line.fault])
            else:
                if len(scan.scans) == begun:
                    scan.begin_segment(line.data)
                scan.add(name.file, number, line, expected_file=True)
        if len(scan.scans) == begun or not scan.scans[-1].covered:
            scan.report(name.file, 0, 0, "expected a header and a signed checkpoint, got none")
    if sealed:
        _read_seal(scan, folder / SEAL_FILE)
    elif any(each.sealing for each in scan.last_segments()):
        scan.report(SEAL_FILE, 0, 0, "expected the seal of a run whose sealing began, got none")
    aside = sorted(entry.name for entry in folder.iterdir() if TORN_SUFFIX in entry.name)
    notes += [f"{clean(name, 100)}: torn end that was set aside" for name in aside[:MAX_ASIDE]]
    if len(aside) > MAX_ASIDE:
        notes.append(f"{len(aside) - MAX_ASIDE} more torn ends that were set aside")
    return sealed, notes


def _read_seal(scan: RunScan, path: Path) -> None:
    number = -1
    for number, line in enumerate(read_lines(path)):
        reason = FAULTS[line.fault] if line.fault else ""
        reason = reason or (AFTER_SEAL if number else scan.check_seal(line.data))
        if reason:
            scan.report(path.name, number, line.byte, reason)
    if number < 0:
        scan.report(path.name, 0, 0, "expected a seal, got an empty file")


def _read_file(scan: RunScan, path: Path) -> bool:
    sealed = False
    number = byte = 0
    for number, line in enumerate(read_lines(path)):
        byte = line.byte
        reason = ""
        if sealed:
            reason = AFTER_SEAL
        elif line.fault:
            reason = FAULTS[line.fault]
        elif _is_kind(line.data, SEAL):
            sealed = True
            reason = scan.check_seal(line.data)
        else:
            if number == 0 or _is_kind(line.data, HEADER):
                scan.begin_segment(line.data)
            scan.add(path.name, number, line, expected_file=False)
        if reason:
            scan.report(path.name, number, byte, reason)
    if not sealed and scan.scans:
        reason = "expected a seal at the end of a run in one file, got none"
        scan.report(path.name, number, byte, reason)
    return sealed


def _is_kind(line: bytes, kind: str) -> bool:
    # Nearly every line is told by its bytes: the kind stands last but two, and hash and number
    # bound its place. Only the rest is parsed twice.
    if f'"kind":"{kind}","prev":"'.encode() not in line[-160:]:
        return False
    try:
        return parse_line(line)[1] == kind
    except BadLineError:
        return False


def _list_signed(scan: RunScan) -> Iterator[SignedRoot]:
    for each in scan.scans:
        if each.header is not None and each.roots:
            root, count = list(each.roots.items())[-1]
            yield SignedRoot(each.header.segment.file, count, root)


def _check_root(scan: RunScan, file: str, root: str) -> None:
    is_known = any(root in each.roots for each in scan.scans)
    if not is_known and (scan.seal is None or root != scan.tree.root().hex()):
        scan.report(
            file,
            0,
            0,
            f"expected a run that contains root {root[:16]}, got one without it: it was put back "
            "to an older state, or is another run",
        )


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
        StorageError: On I/O errors.
    """
    public = build_public_pem(key)
    lock = lock_run(folder, shared=False)
    try:
        if os.path.lexists(folder / SEAL_FILE):
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
        StorageError: On I/O errors.
    """
    if not (folder / SEAL_FILE).is_file():
        raise TraceError(
            f"Cannot export trace '{folder}': expected a sealed run, got an open one. Seal it."
        )
    write_pieces(target, (line.data + b"\n" for _, _, line in read_run_lines(folder)))
