"""What a contributor has sent, by kind, counted on its own disk; for the report of who looks.

A contribution is counted by its manifest. Answers are counted by the question they answer, so that
one that is sent again after a kill counts once.
"""

from collections.abc import Mapping
from pathlib import Path

from molora_fed.contributions.manifest import MANIFEST_FILE, parse_manifest
from molora_fed.errors import MoloraError
from molora_fed.federation.homes import ContributorHome
from molora_fed.federation.mailbox import read_json
from molora_fed.federation.messages import Shipment
from molora_fed.federation.overlap_letters import OVERLAP
from molora_fed.storage.files import write_json

__all__ = ["SENT_KINDS", "count_sent", "note_sent"]

SENT_KINDS = (
    "adapter", "manifest", "samples", "statistics", "carried", "counts", "overlap", "masks",
    "sums", "evolution",
)  # fmt: skip
"""In the order they are shown: `masks` are keys, shares and agreements of masked sums."""
_MOST = 100_000


def note_sent(home: ContributorHome, question: str, kind: str, files: Shipment) -> None:
    """Note an answer.

    Args:
        home: The contributor's home.
        question: Id of the question.
        kind: One of `SENT_KINDS`, of what is asked for.
        files: The answer's; what rides along to compare held-out text is of a kind of its own.

    Raises:
        StorageError: On I/O errors.
    """
    path = home.private / "sent.json"
    known = read_json(path) or {}
    kept = known if isinstance(known, dict) and len(known) < _MOST else {}
    beside = sum(one.num_bytes for one in files.files if one.name.startswith(f"{OVERLAP}/"))
    rows = {question[:16]: [kind, files.num_bytes - beside]}
    if beside:
        rows[f"{question[:16]}-{OVERLAP}"] = ["overlap", beside]
    write_json(path, {**kept, **rows})


def count_sent(home: ContributorHome) -> dict[str, dict[str, int]]:
    """Messages and bytes by kind; kinds of which there was nothing are left out."""
    total: dict[str, dict[str, int]] = {}
    for kind, size in (*_list_contributed(home.contribution).items(), *_list_answers(home.private)):
        row = total.setdefault(kind, {"messages": 0, "bytes": 0})
        row["messages"] += 1
        row["bytes"] += size
    return {kind: total[kind] for kind in SENT_KINDS if kind in total}


def _list_contributed(folder: Path) -> Mapping[str, int]:
    try:
        manifest = parse_manifest((folder / MANIFEST_FILE).read_bytes())
    except (MoloraError, OSError):
        return {}
    samples = sum(entry.bytes for entry in manifest.sample_files.values())
    published = manifest.statistics_file
    carried = sum(entry.bytes for entry in manifest.carried_files.values())
    return {
        "adapter": sum(entry.bytes for entry in manifest.adapter_files.values()),
        "manifest": len(manifest.canonical),
        **({"samples": samples} if samples else {}),
        **({} if published is None else {"statistics": published.bytes}),
        **({"carried": carried} if carried else {}),
    }


def _list_answers(folder: Path) -> list[tuple[str, int]]:
    kept = read_json(folder / "sent.json") or {}
    rows = kept.values() if isinstance(kept, dict) else []
    return [(str(row[0]), int(row[1])) for row in rows if isinstance(row, list) and len(row) == 2]
