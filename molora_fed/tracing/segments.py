"""The files of a run: segments in their fixed order, the seal, and lines out of hostile bytes."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from molora_fed.errors import TraceError, describe_mismatch
from molora_fed.storage.files import is_file, is_folder
from molora_fed.tracing.records import FORMAT_VERSION, MAX_LINE_BYTES, is_hash, sign_statement

__all__ = [
    "SEAL_FILE",
    "TORN_SUFFIX",
    "Header",
    "Line",
    "SegmentName",
    "build_checkpoint",
    "checkpoint_statement",
    "is_run_id",
    "is_writer_name",
    "list_segments",
    "parse_header",
    "read_lines",
]

SEAL_FILE = "seal.jsonl"
TORN_SUFFIX = ".torn"
MAX_SEGMENTS = 10_000

_WRITER = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_SEGMENT = re.compile(r"([a-z0-9][a-z0-9._-]{0,63})-([0-9]{4,9})\.jsonl")


def is_run_id(run: str) -> bool:
    """Whether a run may be called so: it is printed on terminals."""
    return 0 < len(run) <= 200 and run.isascii() and run.isprintable()


def is_writer_name(name: str) -> bool:
    """Whether a writer may be called so: it becomes part of file names."""
    return _WRITER.fullmatch(name) is not None


@dataclass(frozen=True, order=True)
class SegmentName:
    """Which segment of a run; ordered by writer, then by number, which is the order of a run.

    Attributes:
        writer: Who writes it.
        number: From 0, one more at each opening.
    """

    writer: str
    number: int

    @property
    def file(self) -> str:
        """Name of its file."""
        return f"{self.writer}-{self.number:04d}.jsonl"

    @classmethod
    def parse(cls, file: str) -> "SegmentName | None":
        """The segment a file name stands for; None if it is no segment's."""
        match = _SEGMENT.fullmatch(file)
        if match is None:
            return None
        name = cls(match[1], int(match[2]))
        return name if name.file == file else None


@dataclass(frozen=True)
class Header:
    """The first record of a segment.

    Attributes:
        run: The run it belongs to.
        segment: Which segment it is.
        key: Fingerprint of the key that signs the run.
    """

    run: str
    segment: SegmentName
    key: str

    def build_body(self, recovered: dict[str, Any] | None) -> dict[str, Any]:
        """The record's body.

        Args:
            recovered: What was set aside of the writer's segment before; None if nothing was.
        """
        return {
            "format": FORMAT_VERSION,
            "run": self.run,
            "writer": self.segment.writer,
            "number": self.segment.number,
            "key": self.key,
            "recovered": recovered,
        }


def parse_header(body: dict[str, Any]) -> Header | str:
    """Read a header's body; a text if it is none, which says why."""
    version, run, writer, number, key = (
        body.get(name) for name in ("format", "run", "writer", "number", "key")
    )
    if type(version) is not int or version != FORMAT_VERSION:
        return f"expected a trace of format {FORMAT_VERSION}, got {version!r:.20}"
    if not isinstance(run, str) or not is_run_id(run):
        return "expected at most 200 printable ASCII characters as run"
    if not isinstance(writer, str) or not is_writer_name(writer):
        return "expected a lower-case name as writer"
    if type(number) is not int or not 0 <= number < 10**9:
        return "expected a whole number as number of the segment"
    if not isinstance(key, str) or not is_hash(key):
        return "expected 64 hex digits as key"
    return Header(run, SegmentName(writer, number), key)


def checkpoint_statement(
    header: Header, *, count: int, head: str, root: str, sealing: bool
) -> dict[str, Any]:
    """What a checkpoint's signature is over.

    Args:
        header: Of its segment.
        count: Records of the segment before the checkpoint.
        head: Hash of the last of them.
        root: Merkle root over them, hex.
        sealing: Whether this is the writer's last record before the run is sealed.
    """
    return {
        "run": header.run,
        "segment": header.segment.file,
        "key": header.key,
        "count": count,
        "head": head,
        "root": root,
        "sealing": sealing,
    }


def build_checkpoint(
    key: ec.EllipticCurvePrivateKey,
    header: Header,
    *,
    count: int,
    head: str,
    root: str,
    sealing: bool,
) -> dict[str, Any]:
    """A signed checkpoint's body; arguments as of `checkpoint_statement`."""
    statement = checkpoint_statement(header, count=count, head=head, root=root, sealing=sealing)
    signature = sign_statement(key, "checkpoint", statement)
    return {
        "count": count, "head": head, "root": root, "sealing": sealing, "signature": signature
    }  # fmt: skip


def list_segments(folder: Path) -> list[SegmentName]:
    """Segments of a run's folder in their order.

    Raises:
        TraceError: If it is no folder, or holds too many.
    """
    if not is_folder(folder):
        raise TraceError(
            f"Cannot read trace '{folder}': expected the folder of a run, got nothing there. "
            "Check the path."
        )
    names = (SegmentName.parse(entry.name) for entry in folder.iterdir())
    segments = sorted(name for name in names if name is not None)
    if len(segments) > MAX_SEGMENTS:
        raise TraceError(
            describe_mismatch(
                f"Cannot read trace '{folder}'",
                expected=f"at most {MAX_SEGMENTS} segments",
                got=len(segments),
                fix="Split it into runs.",
            )
        )
    return segments


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a file.

    Attributes:
        byte: Where it begins.
        data: Its bytes without newline; cut where it is too long.
        fault: "" if it is whole; "torn" if no newline ends it; "long" if it is over the limit.
    """

    byte: int
    data: bytes
    fault: str


def read_lines(path: Path) -> Iterator[Line]:
    """Lines of a file in bounded memory; after one with a fault none follows.

    Raises:
        TraceError: If it is no regular file or cannot be read.
    """
    if not is_file(path):
        raise TraceError(
            f"Cannot read trace '{path}': expected a file, got something else or nothing there. "
            "Check the path."
        )
    try:
        with path.open("rb", buffering=1 << 20) as file:
            byte = 0
            while data := file.readline(MAX_LINE_BYTES + 1):
                if data[-1:] == b"\n":
                    yield Line(byte, data[:-1], "")
                    byte += len(data)
                else:
                    yield Line(byte, data, "long" if len(data) > MAX_LINE_BYTES else "torn")
                    return
    except OSError as error:
        raise TraceError(
            f"Cannot read trace '{path}': expected a readable file, got {error.strerror}. "
            "Check its permissions."
        ) from error
