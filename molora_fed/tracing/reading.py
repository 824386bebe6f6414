"""Reading and counting the records of a run, without judging them: `verify` does that."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molora_fed.errors import TraceError
from molora_fed.tracing.records import HEADER, SEAL, BadLineError, Record, parse_line
from molora_fed.tracing.run_scan import FAULTS, read_run_lines
from molora_fed.tracing.segments import is_writer_name

__all__ = [
    "TraceStatistics",
    "count_trace",
    "read_records",
]


def read_records(path: Path) -> Iterator[Record]:
    """Records of a run in its order; headers and checkpoints too, the seal not.

    What a killed or a working writer left torn at the end of a segment is left out.

    Args:
        path: A run's folder, or the one file of an exported run.

    Raises:
        TraceError: If there is no trace, or a line is no record; `verify` lists all of them.
    """
    writer = "?"
    number = 0
    for file, at, line in read_run_lines(path):
        try:
            if line.fault == "torn":
                continue
            if line.fault:
                raise BadLineError(FAULTS[line.fault])
            body, kind, _, seq = parse_line(line.data)
        except BadLineError as error:
            raise TraceError(
                f"Cannot read trace '{path}': record {at} of {file} at byte {line.byte}: {error}. "
                "See all that is wrong with `molora trace verify`."
            ) from error
        if kind == SEAL:
            continue
        if kind == HEADER:
            name = body.get("writer")
            writer = name if isinstance(name, str) and is_writer_name(name) else "?"
        yield Record(file, number, line.byte, writer, seq, kind, body)
        number += 1


@dataclass(frozen=True)
class TraceStatistics:
    """Counts over a run.

    Attributes:
        runs: Ids in its headers; one, if all is well.
        records: Records in all, the seal left out.
        kinds: Records by kind.
        writers: Records by writer.
        segments: Segments.
        recovered: What its headers say was set aside of torn segments.
    """

    runs: tuple[str, ...]
    records: int
    kinds: dict[str, int]
    writers: dict[str, int]
    segments: int
    recovered: tuple[dict[str, Any], ...]


def count_trace(path: Path) -> TraceStatistics:
    """Count what a run holds, without judging it.

    Args:
        path: A run's folder, or the one file of an exported run.

    Raises:
        TraceError: As `read_records`.
    """
    kinds: Counter[str] = Counter()
    writers: Counter[str] = Counter()
    runs: dict[str, None] = {}
    recovered = []
    for record in read_records(path):
        kinds[record.kind] += 1
        writers[record.writer] += 1
        if record.kind == HEADER:
            runs[str(record.body.get("run"))] = None
            if isinstance(record.body.get("recovered"), dict):
                recovered.append(record.body["recovered"])
    return TraceStatistics(
        runs=tuple(runs),
        records=kinds.total(),
        kinds=dict(sorted(kinds.items())),
        writers=dict(sorted(writers.items())),
        segments=kinds[HEADER],
        recovered=tuple(recovered),
    )
