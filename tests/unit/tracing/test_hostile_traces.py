"""Whatever is in the files, reading them ends in findings or one line, and in bounded memory."""

import os
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from molora_fed.errors import TraceError
from molora_fed.tracing import records
from molora_fed.tracing.proofs import build_proof, read_proof
from molora_fed.tracing.reading import count_trace, read_records
from molora_fed.tracing.records import GENESIS, encode_line
from molora_fed.tracing.verifying import verify
from molora_fed.tracing.writing import TraceWriter

WORDS = [
    b'{"body":', b"{}", b'"kind":"header"', b'"prev":"' + b"0" * 64 + b'"', b'"seq":0', b",", b"}",
    b"[", b"\n", b"NaN", b"1e999", b"9" * 5000, b'"\\ud800"', b"\xff", b"\x00", b'"writer":"../x"',
    b'"format":1', b'"run":"r"', b'"number":-1', b"true", b"null", b'"key":"' + b"a" * 64 + b'"',
]  # fmt: skip
LINES = [
    {"kind": "header", "body": {"format": True}},
    {"kind": "header", "body": {"format": 1, "run": "\x1b[31m"}},
    {"kind": "header", "body": {"format": 1, "run": "r", "writer": "/etc/x"}},
    {"kind": "header", "body": {"format": 1, "run": "r", "writer": "w", "number": 1e9}},
    {"kind": "checkpoint", "body": {"count": 10**30, "root": ["x"], "signature": 7}},
    {"kind": "seal", "body": {"count": "x", "segments": {"a": []}}},
    {"kind": "seal", "body": {}},
]


def build(parts):
    lines = []
    for part in parts:
        if isinstance(part, dict):
            body = records.encode_json(part["body"])
            lines.append(encode_line(body, part["kind"], GENESIS, len(lines)))
        else:
            lines.append(part)
    return b"\n".join(lines) + b"\n"


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from(LINES), max_size=5).map(build)
    | st.lists(st.sampled_from(WORDS) | st.binary(max_size=9), max_size=30).map(b"".join)
)
def test_hostile_bytes_end_in_findings(tmp_path, public, data):
    (tmp_path / "w-0000.jsonl").write_bytes(data)
    (tmp_path / "seal.jsonl").write_bytes(data)
    for path in (tmp_path, tmp_path / "w-0000.jsonl"):
        report = verify(path, public)
        assert not report.ok and report.covered == 0
        assert all(str(problem).isprintable() for problem in report.problems)
        for read in (lambda p: list(read_records(p)), lambda p: build_proof(p, 0), count_trace):
            try:
                read(path)
            except TraceError as error:
                assert str(error)
        assert read_proof(path) is None


def test_a_long_line_is_not_held(tmp_path, public, monkeypatch):
    monkeypatch.setattr("molora_fed.tracing.segments.MAX_LINE_BYTES", 1_000)
    path = tmp_path / "run.jsonl"
    path.write_bytes(b"x" * 5_000_000)
    problem = verify(path, public).problems[0]
    assert "bytes in a record, got more" in problem.reason


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 100 + b'"' + b'\\"' * 1_000_000,
        b"{" * 100 + b'"' * 3_000_001,
        b"[" * 100 + b"\\" * 3_000_000,
        b"9" * 3_000_000,
        b"0." + b"9" * 3_000_000,
    ],
)
def test_no_line_takes_long(tmp_path, public, data):
    path = tmp_path / "run.jsonl"
    path.write_bytes(data + b"\n")
    begun = time.process_time()
    assert not verify(path, public).ok
    assert time.process_time() - begun < 5


def test_numbers_beyond_a_float_are_refused(tmp_path):
    with pytest.raises(records.BadLineError, match="float"):
        records.parse_json(b'{"a":1e999}')
    with pytest.raises(records.BadLineError, match="NaN"):
        records.parse_json(b'{"a":NaN}')


@pytest.mark.parametrize("data", [b"[" * 200_000, b'{"a":' * 100_000, b'"' + b"[" * 100 + b'"'])
def test_depth_is_limited_before_parsing(tmp_path, public, data):
    path = tmp_path / "run.jsonl"
    path.write_bytes(data + b"\n")
    assert not verify(path, public).ok


def test_brackets_in_texts_are_no_depth(tmp_path, key, public):
    with TraceWriter(tmp_path, key=key, run_id="run") as trace:
        trace.append("decision", {"text": '[{"\\' * 1_000})
    assert verify(tmp_path, public).ok


def test_what_is_no_file_is_refused(tmp_path, public):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path / "missing", tmp_path / "a" / "b"):
        with pytest.raises(TraceError, match="expected a file"):
            verify(path, public)
    report = verify(tmp_path, public)
    assert not report.ok and "got none" in report.problems[0].reason


@pytest.mark.parametrize(
    "body",
    [
        {"x": float("nan")}, {"x": object()}, {"x": "a" * records.MAX_LINE_BYTES}, {1: 2, "a": 3},
    ],
)  # fmt: skip
def test_a_writer_takes_only_what_can_be_read(tmp_path, key, public, body):
    with TraceWriter(tmp_path, key=key, run_id="run") as trace:
        with pytest.raises(TraceError, match="Cannot record"):
            trace.append("decision", body)
        deep: list = []
        for _ in range(100):
            deep = [deep]
        with pytest.raises(TraceError, match="in each other"):
            trace.append("decision", {"deep": deep})
        with pytest.raises(TraceError, match="seal"):
            trace.append("seal", {})
        trace.append("decision", {"fine": True})
    assert verify(tmp_path, public).ok


def test_empty_and_foreign_segments_are_found(tmp_path, public, write):
    write(tmp_path)
    (tmp_path / "notes.txt").write_text("not part of the run")
    assert verify(tmp_path, public).ok
    (tmp_path / "main-0001.jsonl").touch()
    report = verify(tmp_path, public)
    assert report.problems[0].file == "main-0001.jsonl"


@pytest.mark.parametrize("file", ["w-0000.jsonl", "seal.jsonl"])
def test_a_link_to_a_name_that_no_disk_can_hold_is_no_file(tmp_path, public, file):
    (tmp_path / "v-0000.jsonl").write_bytes(b"{}\n")
    (tmp_path / file).symlink_to("x" * 300)
    with pytest.raises(TraceError, match="expected a file"):
        verify(tmp_path, public)
