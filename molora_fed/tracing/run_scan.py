"""A whole run, line by line: each segment's chain, segments in order, the seal over them."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from molora_fed.storage.files import is_folder
from molora_fed.storage.keys import key_fingerprint
from molora_fed.tracing.merkle import MerkleTree
from molora_fed.tracing.records import (
    CHECKPOINT,
    FORMAT_VERSION,
    GENESIS,
    HEADER,
    MAX_LINE_BYTES,
    SEAL,
    BadLineError,
    check_signature,
    encode_json,
    encode_line,
    parse_line,
    sign_statement,
)
from molora_fed.tracing.segments import (
    SEAL_FILE,
    Header,
    Line,
    SegmentName,
    build_checkpoint,
    checkpoint_statement,
    list_segments,
    parse_header,
    read_lines,
)

__all__ = [
    "FAULTS",
    "Problem",
    "RunScan",
    "SegmentScan",
    "check_seal_signature",
    "read_run_lines",
]


class SegmentScan:
    """State of a segment after the lines it was given.

    Attributes:
        header: Its header; None before a good one.
        count: Records so far.
        head: Hash of the last one.
        leaf: Leaf hash of the last one.
        kind: Kind of the last one; "" where it is no record.
        tree: Merkle tree over all so far.
        covered: Records up to and with the last good checkpoint.
        roots: Root of each good checkpoint, hex, with the records it is over.
        sealing: Whether the last record is the checkpoint before a seal.
        is_whole: Whether every line that was checked was good.
    """

    def __init__(self, public_pem: str, fingerprint: str, *, head: str = GENESIS) -> None:
        """Begin a segment.

        Args:
            public_pem: Key that signed the run, PEM.
            fingerprint: Its fingerprint.
            head: Hash of the last record of the writer's segment before.
        """
        self._public = public_pem
        self._fingerprint = fingerprint
        self.header: Header | None = None
        self.count = 0
        self.head = head
        self.leaf = b""
        self.kind = ""
        self.tree = MerkleTree()
        self.covered = 0
        self.roots: dict[str, int] = {}
        self.sealing = False
        self.is_whole = True

    def check(self, line: bytes) -> str:
        """What is wrong with a line as the next one; "" if nothing is. Follow it by `add`.

        Args:
            line: Its bytes without newline.
        """
        try:
            body, self.kind, prev, seq = parse_line(line)
        except BadLineError as error:
            self.kind = ""
            reason = str(error)
        else:
            reason = self._check(line, body, prev, seq)
        if reason:
            self.is_whole = False
        return reason

    def add(self, line: bytes) -> None:
        """Go on by a line, good or not."""
        self.leaf = sha256(b"\x00" + line).digest()
        self.tree.add(self.leaf)
        self.head = sha256(line).hexdigest()
        self.count += 1

    def _check(self, line: bytes, body: dict[str, Any], prev: str, seq: int) -> str:
        if seq != self.count:
            return f"expected seq {self.count}, got {seq}: records are missing, moved or added"
        if prev != self.head:
            return (
                f"expected prev {self.head[:16]}, the hash of the record before, got {prev[:16]}: "
                "this record or the one before it was changed"
            )
        if (self.count == 0) != (self.kind == HEADER):
            return "expected a header as first record, and nowhere else"
        if self.kind == HEADER:
            return self._check_header(body)
        if self.sealing:
            return "expected nothing after the checkpoint before the seal"
        if self.kind == CHECKPOINT:
            return self._check_checkpoint(line, body)
        if self.kind == SEAL:
            return "expected a seal only at the end of the run"
        return ""

    def _check_header(self, body: dict[str, Any]) -> str:
        header = parse_header(body)
        if isinstance(header, str):
            return header
        self.header = header
        if header.key != self._fingerprint:
            return f"expected a run signed by key {self._fingerprint[:16]}, got {header.key[:16]}"
        return ""

    def _check_checkpoint(self, line: bytes, body: dict[str, Any]) -> str:
        if self.header is None or not self.is_whole:
            return ""  # What came before was wrong and told; no signature over it can fit.
        sealing = body.get("sealing") is True
        root = self.tree.root().hex()
        statement = checkpoint_statement(
            self.header, count=self.count, head=self.head, root=root, sealing=sealing
        )
        signature = body.get("signature")
        expected = {
            "count": self.count, "head": self.head, "root": root, "sealing": sealing,
            "signature": signature,
        }  # fmt: skip
        if encode_line(encode_json(expected), CHECKPOINT, self.head, self.count) != line:
            return (
                "expected a checkpoint of the records before it, got one of others: a record "
                f"since record {self.covered} was changed"
            )
        if not check_signature(self._public, CHECKPOINT, statement, signature):
            return f"expected a checkpoint signed by key {self._fingerprint[:16]}, got no such"
        self.covered = self.count + 1
        self.roots[root] = self.count
        self.sealing = sealing
        return ""


MAX_PROBLEMS = 100
FAULTS = {
    "torn": "expected a newline at the end of the record, got the end of the file",
    "long": f"expected at most {MAX_LINE_BYTES} bytes in a record, got more",
}


@dataclass(frozen=True)
class Problem:
    """Something that is wrong.

    Attributes:
        file: Name of the file.
        record: Line of the file, from 0.
        byte: Where that line begins.
        reason: What is wrong with it.
    """

    file: str
    record: int
    byte: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}: record {self.record} at byte {self.byte}: {self.reason}"


def check_seal_signature(body: dict[str, Any], public_pem: str) -> bool:
    """Whether a seal's body is signed by this key."""
    statement = {name: value for name, value in body.items() if name != "signature"}
    return check_signature(public_pem, SEAL, statement, body.get("signature"))


@dataclass
class RunScan:
    """All segments of a run, line by line.

    Attributes:
        public_pem: Key that signed the run, PEM.
        problems: What is wrong so far, the first 100.
        scans: Segments so far, with the file each stands in.
        tree: Merkle tree over all records so far.
        seal: Body of the seal, once it was read.
        leaves: Leaf hashes, if they are wanted.
    """

    public_pem: str
    keep_leaves: bool = False
    problems: list[Problem] = field(default_factory=list)
    scans: list[SegmentScan] = field(default_factory=list)
    tree: MerkleTree = field(default_factory=MerkleTree)
    seal: dict[str, Any] | None = None
    leaves: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.fingerprint = key_fingerprint(self.public_pem)
        self._heads: dict[str, tuple[int, str]] = {}  # Last segment of each writer, and its head.
        self._last: SegmentName | None = None
        self._scan: SegmentScan | None = None

    @property
    def run(self) -> str:
        """The run's id as its first header has it; "" if there is none."""
        return next((scan.header.run for scan in self.scans if scan.header), "")

    def last_segments(self) -> list[SegmentScan]:
        """The last segment of each writer."""
        last = {each.header.segment.writer: each for each in self.scans if each.header}
        return list(last.values())

    def begin_segment(self, line: bytes) -> None:
        """Let the next line begin a segment.

        Args:
            line: That line: a header, if all is well.
        """
        self._end_segment()
        try:
            writer = parse_line(line)[0].get("writer")
        except BadLineError:
            writer = None
        head = self._heads.get(writer, (0, GENESIS))[1] if isinstance(writer, str) else GENESIS
        self._scan = SegmentScan(self.public_pem, self.fingerprint, head=head)
        self.scans.append(self._scan)

    def add(self, file: str, record: int, line: Line, *, expected_file: bool) -> None:
        """Go on by a line of the present segment.

        Args:
            file: Name of the file it stands in.
            record: Its line in that file.
            line: The line, without fault.
            expected_file: Whether the file must be called after the segment.
        """
        if self._scan is None:
            self.begin_segment(line.data)
        scan = self.scans[-1]
        reason = scan.check(line.data)
        if not reason and scan.kind == HEADER:
            reason = self._check_header(scan, file if expected_file else None)
        if reason:
            self.report(file, record, line.byte, reason)
        scan.add(line.data)
        self.tree.add(scan.leaf)
        if self.keep_leaves:
            self.leaves.append(scan.leaf)

    def report(self, file: str, record: int, byte: int, reason: str) -> None:
        """Note that something is wrong."""
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(Problem(file, record, byte, reason))

    def add_file(self, path: Path) -> None:
        """Go on by all lines of a segment's file."""
        self._end_segment()
        for number, line in enumerate(read_lines(path)):
            if line.fault:
                self.report(path.name, number, line.byte, FAULTS[line.fault])
            else:
                self.add(path.name, number, line, expected_file=True)

    def close_segment(self, key: ec.EllipticCurvePrivateKey) -> bytes | None:
        """Add the checkpoint before the seal to the present segment, in memory.

        Returns:
            Its line without newline; None if the segment has it or has no header.
        """
        scan = self._scan
        if scan is None or scan.header is None or scan.sealing:
            return None
        root = scan.tree.root().hex()
        body = build_checkpoint(
            key, scan.header, count=scan.count, head=scan.head, root=root, sealing=True
        )
        line = encode_line(encode_json(body), CHECKPOINT, scan.head, scan.count)
        self.add(scan.header.segment.file, scan.count, Line(0, line, ""), expected_file=True)
        return line

    def build_seal(self, key: ec.EllipticCurvePrivateKey) -> tuple[dict[str, Any], bytes]:
        """The seal over what was read: its body, and its line without newline."""
        self._end_segment()
        statement = self._build_statement()
        body = {**statement, "signature": sign_statement(key, SEAL, statement)}
        return body, self._encode_seal(body)

    def check_seal(self, line: bytes) -> str:
        """What is wrong with the seal; "" if nothing is. All segments must have been read."""
        self._end_segment()
        try:
            body, kind, _, _ = parse_line(line)
        except BadLineError as error:
            return str(error)
        self.seal = body
        if kind != SEAL:
            return "expected the run's seal"
        if not check_seal_signature(body, self.public_pem):
            return f"expected a seal signed by key {self.fingerprint[:16]}, got no such"
        statement = self._build_statement()
        for name in ("run", "count", "segments", "root"):
            if body.get(name) != statement[name]:
                return (
                    f"expected the seal of these records, got one with another {name}: "
                    "records or segments are missing, added, moved or changed"
                )
        if self._encode_seal({**statement, "signature": body["signature"]}) != line:
            return "expected the seal as it was written, got its bytes changed"
        return ""

    def _build_statement(self) -> dict[str, Any]:
        segments = [
            {"file": scan.header.segment.file, "count": scan.count, "head": scan.head}
            for scan in self.scans
            if scan.header is not None
        ]
        return {
            "format": FORMAT_VERSION,
            "run": self.run,
            "key": self.fingerprint,
            "segments": segments,
            "count": self.tree.size,
            "root": self.tree.root().hex(),
        }

    def _encode_seal(self, body: dict[str, Any]) -> bytes:
        head = self.scans[-1].head if self.scans else GENESIS
        return encode_line(encode_json(body), SEAL, head, self.tree.size)

    def _check_header(self, scan: SegmentScan, file: str | None) -> str:
        header = scan.header
        if header is None:
            return ""
        name = header.segment
        if file is not None and name.file != file:
            return f"expected segment '{file}' in the file of this name, got '{name.file}'"
        if header.run != self.run:
            return f"expected a segment of run '{self.run:.40}', got one of '{header.run:.40}'"
        last = self._heads.get(name.writer, (-1, ""))[0]
        if name.number != last + 1:
            return (
                f"expected segment {last + 1} of writer '{name.writer}', got {name.number}: "
                "a segment is missing, moved or added"
            )
        before, self._last = self._last, name
        if before is not None and before > name:
            return "expected segments in order of writer and number"
        return ""

    def _end_segment(self) -> None:
        scan, self._scan = self._scan, None
        if scan is not None and scan.header is not None:
            name = scan.header.segment
            self._heads[name.writer] = (name.number, scan.head)


def read_run_lines(path: Path) -> Iterator[tuple[str, int, Line]]:
    """Lines of a run in order, each with its file's name and its number in the file.

    Args:
        path: A run's folder, or the one file of an exported run.
    """
    if is_folder(path):
        files = [path / name.file for name in list_segments(path)]
        files += [path / SEAL_FILE] if os.path.lexists(path / SEAL_FILE) else []
    else:
        files = [path]
    for file in files:
        for number, line in enumerate(read_lines(file)):
            yield file.name, number, line
