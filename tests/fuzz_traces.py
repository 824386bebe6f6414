"""Runs of a trace as one JSON value: records that are chained, signed and written as described.

`{"segments": {file: [record, ...], ...}, "seal": [record, ...], "files": {...}, ...}`; `ends` are
bytes behind the last record of a file, torn off by whatever ended a writer. A record is a line as
text, or `{"kind": ..., "body": {...}}` with the `prev` and `seq` that belong to its place, or its
own. A body whose `signature` is "good" is signed, as far as the key would: for its place, but for
what it states itself. An attacker can chain; who has the key, sign anything.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from fuzz_folders import Run, replacing, run_in_folder

from molora_fed.storage.keys import build_public_pem, key_fingerprint
from molora_fed.tracing.merkle import MerkleTree, hash_leaf
from molora_fed.tracing.reading import read_records
from molora_fed.tracing.records import (
    CHECKPOINT,
    FORMAT_VERSION,
    GENESIS,
    SEAL,
    encode_json,
    encode_line,
    hash_line,
    sign_statement,
)
from molora_fed.tracing.segments import SEAL_FILE, Header, checkpoint_statement, parse_header
from molora_fed.tracing.verifying import export_run, seal_run, verify
from molora_fed.tracing.writing import TraceWriter

__all__ = ["TRACE_WORDS", "prepare_runs", "prepare_traces"]

_KEY = ec.derive_private_key(20_261_122, ec.SECP384R1())
TRACE_WORDS = (
    "good", "header", "checkpoint", "seal", "decision", "main-0000.jsonl", "main-0001.jsonl",
    "other-0000.jsonl", "seal.jsonl", "main-0000.jsonl.torn", "prev", "seq", "size", "torn", "main",
    "other", "verify", "file", "seal", "\n",
)  # fmt: skip
_PUBLIC = build_public_pem(_KEY)


@lru_cache(maxsize=4_096)
def _sign(purpose: str, statement: str) -> str:
    return sign_statement(_KEY, purpose, json.loads(statement))


class _Builder:
    """Lines of a run, one after the other."""

    def __init__(self) -> None:
        self.tree = MerkleTree()
        self.segments: list[dict[str, Any]] = []
        self._heads: dict[str, str] = {}
        self._last = GENESIS
        self._run = ""

    def build_segment(self, records: Any) -> list[bytes]:
        """The lines of a segment."""
        header, head = None, GENESIS
        tree, lines = MerkleTree(), []
        for record in records if isinstance(records, list) else ():
            body = record.get("body") if isinstance(record, dict) else None
            body = body if isinstance(body, dict) else {}
            if not lines:
                found = parse_header(body)
                header = found if isinstance(found, Header) else None
                head = self._heads.get(str(body.get("writer")), GENESIS)
            if header is not None and body.get("signature") == "good":
                body = _sign_checkpoint(header, body, len(lines), head, tree)
            lines.append(_encode(record, body, head, len(lines)))
            head = self._last = hash_line(lines[-1])
            tree.add(hash_leaf(lines[-1]))
            self.tree.add(hash_leaf(lines[-1]))
        if header is not None:
            self._run = self._run or header.run
            self._heads[header.segment.writer] = head
            self.segments.append({"file": header.segment.file, "count": len(lines), "head": head})
        return lines

    def build_seal(self, records: Any) -> list[bytes]:
        """The lines of the seal's file."""
        lines = []
        for record in records if isinstance(records, list) else ():
            body = record.get("body") if isinstance(record, dict) else None
            body = body if isinstance(body, dict) else {}
            if body.get("signature") == "good":
                stated = {key: value for key, value in body.items() if key != "signature"}
                body = {**self._state(), **stated}
                body["signature"] = _sign(SEAL, encode_json(body))
            lines.append(_encode(record, body, self._last, self.tree.size))
        return lines

    def _state(self) -> dict[str, Any]:
        return {
            "format": FORMAT_VERSION, "run": self._run, "key": key_fingerprint(_PUBLIC),
            "segments": self.segments, "count": self.tree.size, "root": self.tree.root().hex(),
        }  # fmt: skip


def _sign_checkpoint(
    header: Header, body: dict[str, Any], count: int, head: str, tree: MerkleTree
) -> dict[str, Any]:
    state = {"count": count, "head": head, "root": tree.root().hex(), "sealing": False, **body}
    del state["signature"]
    names = ("count", "head", "root", "sealing")
    statement = checkpoint_statement(header, **{name: state[name] for name in names})
    return {**state, "signature": _sign(CHECKPOINT, encode_json(statement))}


def _encode(record: Any, body: dict[str, Any], prev: str, seq: int) -> bytes:
    if not isinstance(record, dict):
        return str(record).encode("utf-8", "surrogatepass")
    kind, prev, seq = record.get("kind"), record.get("prev", prev), record.get("seq", seq)
    return encode_line(json.dumps(body, sort_keys=True, separators=(",", ":")), kind, prev, seq)


def _build_files(value: dict[str, Any]) -> dict[str, Any]:
    """The entries of a run's files, see `fuzz_folders`."""
    builder = _Builder()
    files: dict[str, Any] = {}
    segments = value.get("segments")
    for name, records in segments.items() if isinstance(segments, dict) else ():
        files[name] = builder.build_segment(records)
    if "seal" in value:
        files[SEAL_FILE] = builder.build_seal(value["seal"])
    if value.get("single"):
        whole = [line for lines in files.values() for line in lines]
        files = {"run.jsonl": whole}
    entries = {name: _write_lines(lines) for name, lines in files.items()}
    ends = value.get("ends")
    for name, end in ends.items() if isinstance(ends, dict) else ():
        if name in entries:
            entries[name] += str(end)
    more = value.get("files")
    for name, entry in more.items() if isinstance(more, dict) else ():
        if name in entries and isinstance(entry, dict) and entry.keys() == {"size"}:
            entry = {"lines": entries[name].split("\n"), **entry}
        entries[name] = entry
    return entries


def _write_lines(lines: list[bytes]) -> str:
    return b"".join(line + b"\n" for line in lines).decode("utf-8", "surrogatepass")


def _check(folder: Path, value: dict[str, Any]) -> None:
    path = folder / "run.jsonl" if value.get("single") else folder
    if value.get("then") == "seal" and path.is_dir():
        seal_run(path, key=_KEY)
    root = value.get("root")
    verify(path, _PUBLIC, root if isinstance(root, str) else None)
    list(read_records(path))


def prepare_runs(folder: Path) -> tuple[Sequence[bytes], Run]:
    """Good runs, open and sealed, in a folder and in one file, and the function to call."""
    run_in = run_in_folder(folder, _check)

    def run(data: bytes) -> None:
        try:
            value = json.loads(data)
            value = value if isinstance(value, dict) else {}
            value["files"] = _build_files(value)
            written = json.dumps(value).encode()
        except (ValueError, TypeError, RecursionError):  # what no line can hold
            written = b""
        run_in(written)

    for writer in ("main", "other", "main"):
        with TraceWriter(folder / "run", key=_KEY, run_id="run", writer=writer) as trace:
            for step in range(2):
                trace.append("decision", {"step": step, "text": "ä"})
    opened = _describe_segments(folder / "run")
    root = seal_run(folder / "run", key=_KEY)
    sealed = _describe_segments(folder / "run")
    seal = [{"kind": SEAL, "body": {"signature": "good"}}]
    torn = {"main-0001.jsonl.torn": "{", "note.txt": "text"}
    seeds = [
        {"segments": opened, "files": {}, "then": "seal"},
        {"segments": opened, "files": torn, "ends": {"main-0001.jsonl": "{"}, "then": "verify"},
        {"segments": sealed, "seal": seal, "files": {}, "root": root},
        {"segments": sealed, "seal": seal, "single": True},
    ]
    return [json.dumps(seed).encode() for seed in seeds], run


def _describe_segments(folder: Path) -> dict[str, list[Any]]:
    found = {}
    for path in sorted(folder.glob("*-[0-9]*.jsonl")):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for record in records:
            del record["prev"], record["seq"]
            if record["kind"] == CHECKPOINT:
                record["body"] = {"sealing": record["body"]["sealing"], "signature": "good"}
        found[path.name] = records
    return found


def prepare_traces(folder: Path) -> tuple[Sequence[bytes], Run]:
    run_folder, exported = folder / "run", folder / "run.jsonl"
    with TraceWriter(run_folder, key=_KEY, run_id="run", writer="main") as trace:
        for number in range(4):
            trace.append("decision", {"task": f"t{number}", "text": "ä" * number})
        trace.seal()
    export_run(run_folder, exported)

    def check() -> None:
        verify(exported, _PUBLIC)
        list(read_records(exported))

    return [exported.read_bytes()], replacing(exported, check)
