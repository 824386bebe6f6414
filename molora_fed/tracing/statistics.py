"""What a trace holds, counted."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molora_fed.tracing.reading import read_records
from molora_fed.tracing.records import HEADER

__all__ = ["TraceStatistics", "count_trace"]


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
