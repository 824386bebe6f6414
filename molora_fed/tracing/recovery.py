"""Opening what a killed writer left: the torn tail is set aside and told of, never dropped."""

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molora_fed.errors import TraceError
from molora_fed.storage.files import hash_file, storage_errors, sync_folder
from molora_fed.tracing.records import CHECKPOINT, GENESIS, BadLineError, parse_line
from molora_fed.tracing.run_scan import SegmentScan
from molora_fed.tracing.segments import TORN_SUFFIX, SegmentName, read_lines

__all__ = ["Recovery", "recover_segment"]


@dataclass(frozen=True)
class Recovery:
    """What was set aside.

    Attributes:
        segment: File it was cut from.
        byte: Where the cut is.
        size_bytes: Bytes set aside.
        sha256: Their hash.
        file: File that has them now.
    """

    segment: str
    byte: int
    size_bytes: int
    sha256: str
    file: str

    def to_json(self) -> dict[str, Any]:
        """What the header of the segment after says of it."""
        return {
            "segment": self.segment,
            "byte": self.byte,
            "bytes": self.size_bytes,
            "sha256": self.sha256,
            "file": self.file,
        }


def recover_segment(
    folder: Path, name: SegmentName, *, public_pem: str, fingerprint: str
) -> tuple[SegmentScan, Recovery | None]:
    """Read a segment that nobody writes; what does not belong to its chain at its end is cut off.

    Args:
        folder: The run's folder.
        name: Which segment.
        public_pem: Key of the run, PEM.
        fingerprint: Its fingerprint.

    Returns:
        A scan after the last good record, and what was set aside, if anything was.

    Raises:
        TraceError: If what does not fit lies before a checkpoint: that is no torn tail, someone
            changed the segment. Nothing is touched then.
        StorageError: On I/O errors.
    """
    path = folder / name.file
    scan = SegmentScan(public_pem, fingerprint, head=_read_first_prev(path))
    good = None
    for line in read_lines(path):
        if good is not None:
            _refuse_edited(path, good, line.data)
        elif reason := line.fault or scan.check(line.data):
            if not scan.covered:
                raise TraceError(
                    f"Cannot resume trace '{path}': expected a header and a checkpoint signed "
                    f"by this run's key, got another: {reason}. Give the run's key, or another "
                    "folder."
                )
            good = line.byte
        else:
            scan.add(line.data)
    if not scan.covered:
        raise TraceError(
            f"Cannot resume trace '{path}': expected a header and a checkpoint, got an empty "
            "file. Go on in another folder."
        )
    return scan, None if good is None else _set_aside(path, good)


def _read_first_prev(path: Path) -> str:
    """What the header takes for the head of the segment before; `verify` compares the two."""
    with contextlib.suppress(BadLineError, StopIteration):
        return parse_line(next(read_lines(path)).data)[2]
    return GENESIS


def _refuse_edited(path: Path, byte: int, data: bytes) -> None:
    try:
        is_checkpoint = parse_line(data)[1] == CHECKPOINT
    except BadLineError:
        return
    if is_checkpoint:
        raise TraceError(
            f"Cannot resume trace '{path}': expected at most a torn end, got a break at byte "
            f"{byte} with a checkpoint after it. Look at it with `molora trace verify`; go on in "
            "another folder."
        )


def _set_aside(path: Path, byte: int) -> Recovery:
    with storage_errors(path), path.open("r+b") as file:
        number = 0
        while os.path.lexists(aside := path.with_name(f"{path.name}{TORN_SUFFIX}{number or ''}")):
            number += 1
        file.seek(byte)
        # On disk under its new name before it leaves the segment.
        with aside.open("xb") as copy:
            shutil.copyfileobj(file, copy)
            copy.flush()
            os.fsync(copy.fileno())
        sync_folder(path.parent)
        size_bytes = file.tell() - byte
        file.truncate(byte)
        file.flush()
        os.fsync(file.fileno())
    return Recovery(path.name, byte, size_bytes, hash_file(aside), aside.name)
