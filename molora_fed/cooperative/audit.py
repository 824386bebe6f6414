"""A cooperative's history as a signed trace: what a stranger can audit with a public key.

The ledger logs every event of a cooperative in one table, in the same transaction as the change.
Each becomes a record of the trace in `trace/` of the cooperative's folder, with what it decided.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molora_fed.contributions.reading import Event, LedgerReader, LedgerRecord
from molora_fed.contributions.states import ContributionState
from molora_fed.cooperative.cooperative import Cooperative
from molora_fed.errors import SignatureError, TraceError, describe_mismatch
from molora_fed.storage.files import hash_bytes, write_bytes
from molora_fed.storage.keys import build_public_pem, load_key
from molora_fed.tracing.reading import read_records
from molora_fed.tracing.records import MAX_LINE_BYTES, RESERVED_KINDS, encode_json
from molora_fed.tracing.segments import list_segments
from molora_fed.tracing.verifying import verify
from molora_fed.tracing.writing import TraceWriter

__all__ = [
    "TRACE_FOLDER",
    "Audit",
    "build_audit_records",
    "find_trace_root",
    "record_cooperative",
]

TRACE_FOLDER = "trace"
KEY_FILE = "public.pem"
WRITER = "ledger"
_LINE_OVERHEAD = 300  # bytes of a line beside the body: kind, hash and number

_KINDS = {
    "contributor-registered": "admission",
    "contribution-received": "admission",
    "contribution-refused": "admission",
    "contribution-changed": "admission",
    "contribution-judged": "admission",
    "withdrawal-decided": "withdrawal",
    "cooperative-changed": "state",
    "fusion-decided": "fusion",
    "evolution-decided": "evolution",
    "generation-decided": "evolution",
    "amendment-added": "amendment",
}


@dataclass(frozen=True)
class Audit:
    """What recording a cooperative did.

    Attributes:
        folder: The trace.
        key_file: The public key that signs it, PEM; have others get it from elsewhere.
        added: Events recorded now.
        total: Events recorded in all.
        root: Merkle root of the last signed checkpoint, hex; kept elsewhere, it shows later that
            nothing was put back.
    """

    folder: Path
    key_file: Path
    added: int
    total: int
    root: str


def record_cooperative(cooperative: Cooperative) -> Audit:
    """Record all events of a ledger that the trace has not; called again, it goes on.

    Other processes may write the ledger meanwhile.

    Args:
        cooperative: Whose ledger, key and trace.

    Raises:
        SignatureError: If the coordinator's key is missing.
        TraceError: If the trace does not verify, another process writes it, or the ledger tells
            another history than was recorded.
        StorageError: On I/O errors.
    """
    folder = cooperative.folder / TRACE_FOLDER
    key = load_key(cooperative.key_path)
    public = build_public_pem(key)
    with cooperative.read_ledger() as ledger:
        records = list(build_audit_records(ledger))
    recorded = _check_recorded(folder, public, records)
    fresh = records[recorded:]
    if fresh or not recorded:
        run = f"cooperative {cooperative.charter.identity_hash}"
        with TraceWriter(folder, key=key, run_id=run, writer=WRITER) as trace:
            for kind, body in fresh:
                trace.append(kind, body)
        write_bytes(folder / KEY_FILE, public.encode())
    root = verify(folder, public).checkpoints[-1].root
    return Audit(folder, folder / KEY_FILE, len(fresh), len(records), root)


def find_trace_root(folder: Path) -> str:
    """Merkle root of the last signed checkpoint of a cooperative's trace, hex.

    Args:
        folder: The cooperative's folder, or one in it; its own key file is trusted.

    Returns:
        "" if no trace was recorded there, or it does not verify.
    """
    for place in (folder, folder.resolve().parent):
        trace = place / TRACE_FOLDER
        if (trace / KEY_FILE).is_file():
            try:
                report = verify(trace, (trace / KEY_FILE).read_text(encoding="utf-8"))
            except (TraceError, SignatureError, OSError, ValueError):
                return ""
            return report.checkpoints[-1].root if report.ok and report.checkpoints else ""
    return ""


def build_audit_records(ledger: LedgerReader) -> Iterator[tuple[str, dict[str, Any]]]:
    """The whole history as records: kind and body of each event, in order.

    Args:
        ledger: Open.
    """
    events = ledger.events()
    names = {str(e.data["kind"]) for e in events if e.what == "record-added"}
    stated = {record.number: record for name in names for record in ledger.records(name)}
    amendments = {
        str(one.amendment.number): {"text": one.text, "signature": one.signature}
        for one in ledger.amendments()
    }
    for event in events:
        body: dict[str, Any] = {
            "event": event.number,
            "time": event.time,
            "actor": event.actor,
            "what": event.what,
            "subject": event.subject,
            "data": event.data,
        }
        if event.what == "amendment-added":
            body["amendment"] = amendments.get(event.subject)
        yield _find_kind(event, stated), _shorten(body | _find_statement(event, stated))


def _shorten(body: dict[str, Any]) -> dict[str, Any]:
    """A body that a line of a trace can hold; what an earlier version let in is named by its hash.

    Only what could not be recorded before is shortened, so that a trace goes on as it began.
    """
    large = ("data", "statement", "outcome", "amendment", "subject")
    for name in large:
        size = len(encode_json(body))
        if size <= MAX_LINE_BYTES - _LINE_OVERHEAD:
            break
        if name in body:
            text = encode_json(body[name])
            described = {"sha256": hash_bytes(text.encode()), "bytes": len(text)}
            body = {**body, name: described}
    return body


def _find_kind(event: Event, stated: Mapping[int, LedgerRecord]) -> str:
    if event.what in ("record-added", "record-scored"):
        record = stated.get(int(event.subject))
        return "forecast" if record is not None and record.kind == "forecast" else "record"
    if event.data.get("to") == ContributionState.WITHDRAWN:
        return "withdrawal"
    return _KINDS.get(event.what, "event")


def _find_statement(event: Event, stated: Mapping[int, LedgerRecord]) -> dict[str, Any]:
    """What a record stated, or how it came out; both are written once and never changed."""
    if event.what not in ("record-added", "record-scored"):
        return {}
    record = stated.get(int(event.subject))
    if record is None:
        return {"statement": None}
    return (
        {"statement": record.data} if event.what == "record-added" else {"outcome": record.outcome}
    )


def _check_recorded(folder: Path, public: str, records: list[tuple[str, dict[str, Any]]]) -> int:
    """How many events the trace has; each must be what the ledger says today."""
    if not folder.is_dir() or not list_segments(folder):
        return 0
    report = verify(folder, public)
    if not report.ok:
        raise TraceError(
            f"Cannot record into '{folder}': expected a trace that verifies, got "
            f"{report.problems[0]}. Find out who changed it; move it away to begin another."
        )
    number = 0
    for record in read_records(folder):
        if record.kind in RESERVED_KINDS:
            continue
        ours = records[number] if number < len(records) else ("", {})
        if (record.kind, encode_json(record.body)) != (ours[0], encode_json(ours[1])):
            raise TraceError(
                describe_mismatch(
                    f"Cannot record into '{folder}'",
                    expected=f"a ledger whose event {number + 1} is as recorded before "
                    f"({_describe(record.body)})",
                    got=f"another ({_describe(ours[1])})",
                    fix="Find out who changed the ledger, or which backup it was restored from.",
                )
            )
        number += 1
    return number


def _describe(body: Mapping[str, Any]) -> str:
    if not body:
        return "none"
    return f"{body.get('what')}, SHA-256 {hash_bytes(encode_json(dict(body)).encode())[:16]}"
