"""Verifying a trace with nothing but its files and the public key that signed it."""

from dataclasses import dataclass
from pathlib import Path

from molora_fed.tracing.records import HEADER, SEAL, BadLineError, parse_line
from molora_fed.tracing.run_scan import FAULTS, Problem, RunScan, read_run_lines
from molora_fed.tracing.segments import SEAL_FILE, TORN_SUFFIX

__all__ = ["Problem", "Report", "verify"]


@dataclass(frozen=True)
class Report:
    """What verifying found.

    Attributes:
        ok: Whether nothing is wrong.
        sealed: Whether the run has a seal.
        run: The run's id; "" if unknown.
        root: Merkle root over all records, hex; of an open run as far as it goes.
        records: Records read, seal left out.
        covered: Those that a signature vouches for.
        problems: What is wrong, the first 100.
        notes: What to know besides, e.g. a torn end.
    """

    ok: bool
    sealed: bool
    run: str
    root: str
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
    is_folder = path.is_dir()
    notes: list[str] = []
    before = sealed_at = ""
    sealed = is_folder and (path / SEAL_FILE).exists()
    place = (path.name, 0, 0)
    for file, number, line in read_run_lines(path):
        place = (file, number, line.byte)
        if sealed_at:
            scan.report(*place, "expected nothing after the seal")
        elif line.fault == "torn" and file != SEAL_FILE and is_folder and not sealed:
            notes.append(f"{file}: torn end of {len(line.data)} bytes at byte {line.byte}")
        elif line.fault:
            scan.report(*place, FAULTS[line.fault])
        elif file == SEAL_FILE if is_folder else _has_kind(line.data, SEAL):
            sealed, sealed_at = True, file
            if reason := scan.check_seal(line.data):
                scan.report(*place, reason)
        else:
            if file != before if is_folder else number == 0 or _has_kind(line.data, HEADER):
                scan.begin_segment(line.data)
            scan.add(file, number, line, expected_file=is_folder)
        before = file
    if is_folder:
        notes += _look_around(path)
    _check_end(scan, place, is_folder=is_folder, sealed=sealed, complete=bool(sealed_at))
    if root is not None:
        _check_root(scan, place, root.lower())
    covered = scan.tree.size if sealed else sum(s.covered for s in scan.scans)
    return Report(
        ok=not scan.problems,
        sealed=sealed,
        run=scan.run,
        root=scan.tree.root().hex(),
        records=scan.tree.size,
        covered=covered if not scan.problems or not sealed else 0,
        problems=tuple(scan.problems),
        notes=tuple(notes),
    )


def _has_kind(line: bytes, kind: str) -> bool:
    # The kind stands last but two in a canonical line; the hash and the number bound its place.
    return f'"kind":"{kind}","prev":"'.encode() in line[-160:] and _parsed_kind(line) == kind


def _parsed_kind(line: bytes) -> str:
    try:
        return parse_line(line)[1]
    except BadLineError:
        return ""


def _look_around(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in folder.iterdir())
    return [f"{name}: torn end that was set aside" for name in names if TORN_SUFFIX in name]


def _check_end(
    scan: RunScan, place: tuple[str, int, int], *, is_folder: bool, sealed: bool, complete: bool
) -> None:
    if not scan.scans:
        scan.report(*place, "expected the records of a run, got none")
    elif sealed and not complete:
        scan.report(*place, "expected a whole seal, got none")
    elif not sealed and not is_folder:
        scan.report(*place, "expected a seal at the end of a run in one file, got none")
    elif not sealed and any(each.sealing for each in scan.scans):
        scan.report(*place, "expected the seal of a run whose sealing began, got none")


def _check_root(scan: RunScan, place: tuple[str, int, int], root: str) -> None:
    known = {root for each in scan.scans for root in each.roots}
    if root != scan.tree.root().hex() and root not in known:
        scan.report(
            *place,
            f"expected a run that contains root {root[:16]}, got one without it: it was put back "
            "to an older state, or is another run",
        )
