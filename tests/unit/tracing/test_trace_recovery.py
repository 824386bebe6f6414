import json

import pytest

from molora_fed.errors import ConfigError, StorageError, TraceError
from molora_fed.tracing import writing
from molora_fed.tracing.reading import read_records
from molora_fed.tracing.verifying import seal_run, verify
from molora_fed.tracing.writing import SyncPolicy, TraceWriter


def open_writer(folder, key, **settings):
    return TraceWriter(folder, key=key, run_id="run", **settings)


@pytest.mark.parametrize("tail", [b'{"body":{"ta', b"\x00" * 600, b'{"body":{},"kind":"x"}\n{"b'])
def test_a_torn_tail_is_set_aside_and_told(tmp_path, key, public, write, tail):
    write(tmp_path, 5)
    segment = tmp_path / "main-0000.jsonl"
    whole = segment.read_bytes()
    segment.write_bytes(whole + tail)
    before = verify(tmp_path, public)
    if not tail.count(b"\n"):
        assert before.ok and f"torn end of {len(tail)} bytes" in before.notes[0]
    with open_writer(tmp_path, key) as trace:
        assert trace.recovered is not None
        assert (trace.recovered.byte, trace.recovered.size_bytes) == (len(whole), len(tail))
        trace.append("decision", {"n": 6})
    assert segment.read_bytes() == whole
    assert (tmp_path / "main-0000.jsonl.torn").read_bytes() == tail
    report = verify(tmp_path, public)
    assert report.ok and "set aside" in report.notes[0]
    header = [r.body for r in read_records(tmp_path) if r.kind == "header"][1]
    assert header["recovered"]["bytes"] == len(tail)
    seal_run(tmp_path, key=key)
    assert verify(tmp_path, public).ok


def test_sealing_sets_a_torn_tail_aside_too(tmp_path, key, public, write):
    write(tmp_path, 5)
    with (tmp_path / "main-0000.jsonl").open("ab") as file:
        file.write(b'{"body"')
    seal_run(tmp_path, key=key)
    assert verify(tmp_path, public).ok
    assert (tmp_path / "main-0000.jsonl.torn").read_bytes() == b'{"body"'


def test_an_edited_segment_is_not_taken_for_a_torn_one(tmp_path, key, write):
    write(tmp_path, 9, checkpoint_records=3)
    segment = tmp_path / "main-0000.jsonl"
    data = segment.read_bytes().replace(b"main-2", b"main-7")
    segment.write_bytes(data)
    with pytest.raises(TraceError, match="checkpoint after it"):
        open_writer(tmp_path, key)
    assert segment.read_bytes() == data
    with pytest.raises(TraceError):
        seal_run(tmp_path, key=key)


def test_an_edited_earlier_segment_is_not_sealed(tmp_path, key, write):
    write(tmp_path, 3)
    write(tmp_path, 3)
    segment = tmp_path / "main-0000.jsonl"
    segment.write_bytes(segment.read_bytes().replace(b"main-1", b"main-7"))
    last = (tmp_path / "main-0001.jsonl").read_bytes()
    with pytest.raises(TraceError, match="record 4 at byte"):
        seal_run(tmp_path, key=key)
    assert (tmp_path / "main-0001.jsonl").read_bytes() == last


def test_a_sealing_that_was_interrupted_is_finished(tmp_path, key, public, write):
    write(tmp_path, 3)
    root = seal_run(tmp_path, key=key)
    (tmp_path / "seal.jsonl").unlink()
    assert "sealing began" in verify(tmp_path, public).problems[0].reason
    assert seal_run(tmp_path, key=key) == root
    assert verify(tmp_path, public, root).ok


def test_a_run_goes_on_after_a_sealing_that_was_interrupted(tmp_path, key, public, write):
    write(tmp_path, 3)
    first = seal_run(tmp_path, key=key)
    (tmp_path / "seal.jsonl").unlink()
    write(tmp_path, 2)
    assert verify(tmp_path, public).ok
    assert seal_run(tmp_path, key=key) != first
    assert verify(tmp_path, public).ok


def test_one_writer_of_a_name_and_none_while_sealing(tmp_path, key, write):
    with open_writer(tmp_path, key) as trace:
        with pytest.raises(TraceError, match="of this name"):
            open_writer(tmp_path, key)
        with pytest.raises(TraceError, match="open writers"):
            seal_run(tmp_path, key=key)
        write(tmp_path, writer="other")
        trace.append("decision", {})
    with pytest.raises(TraceError, match="was closed"):
        trace.append("decision", {})


def test_run_and_key_stay_the_same(tmp_path, key, write):
    from cryptography.hazmat.primitives.asymmetric import ec

    write(tmp_path)
    with pytest.raises(TraceError, match="expected run 'run'"):
        write(tmp_path, run_id="other")
    with pytest.raises(TraceError, match="signed by this run's key"):
        TraceWriter(tmp_path, key=ec.generate_private_key(ec.SECP384R1()), run_id="run")
    for names in ({"writer": "../x"}, {"writer": ""}, {"run_id": "\x1b"}, {"run_id": "a" * 300}):
        with pytest.raises(ConfigError):
            write(tmp_path, **names)


def test_a_put_back_run_is_found_by_a_root_kept_elsewhere(tmp_path, key, public, write):
    write(tmp_path, 3)
    old = (tmp_path / "main-0000.jsonl").read_bytes()
    with open_writer(tmp_path, key) as trace:
        trace.append("decision", {"n": 1})
    kept = verify(tmp_path, public).checkpoints[-1].root
    write(tmp_path, 2)
    assert verify(tmp_path, public, kept).ok, "a run that went on contains its earlier state"
    root = seal_run(tmp_path, key=key)
    assert verify(tmp_path, public, kept).ok and verify(tmp_path, public, root).ok
    back = tmp_path / "back"
    back.mkdir()
    (back / "main-0000.jsonl").write_bytes(old)
    assert verify(back, public).ok, "an older valid state looks valid by itself"
    for each in (kept, root):
        report = verify(back, public, each)
        assert not report.ok and "put back" in report.problems[0].reason


def test_a_disk_that_refuses_stops_the_writer(tmp_path, key, public, monkeypatch):
    trace = open_writer(tmp_path, key, sync=SyncPolicy(mode="always"))
    first = trace.append("decision", {"n": 1})

    def refuse(descriptor, data):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(writing, "_write_all", refuse)
        with pytest.raises(StorageError, match="No space left"):
            trace.append("decision", {"n": 2})
    assert trace.acknowledged == first
    with pytest.raises(TraceError, match="failed"):
        trace.append("decision", {"n": 3})
    trace.close()
    assert [r.body for r in read_records(tmp_path) if r.kind == "decision"] == [{"n": 1}]
    with open_writer(tmp_path, key) as again:
        again.append("decision", {"n": 2})
    assert verify(tmp_path, public).ok


def test_acknowledged_follows_the_policy(tmp_path, key):
    policy = SyncPolicy(records=3, seconds=1e6)
    with open_writer(tmp_path, key, sync=policy) as trace:
        begun = trace.acknowledged
        numbers = [trace.append("decision", {"n": n}) for n in range(2)]
        assert trace.acknowledged == begun
        assert trace.sync() == numbers[-1] == trace.acknowledged
        numbers = [trace.append("decision", {"n": n}) for n in range(3)]
        assert trace.acknowledged == numbers[-1]


def test_checkpoints_by_time(tmp_path, key, public, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(writing.time, "monotonic", lambda: now[0])
    policy = SyncPolicy(checkpoint_seconds=5)
    with open_writer(tmp_path, key, sync=policy) as trace:
        trace.append("decision", {})
        now[0] = 6.0
        trace.append("decision", {})
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "main-0000.jsonl").open()]
    assert kinds == ["header", "checkpoint", "decision", "decision", "checkpoint"]


@pytest.mark.parametrize("policy", [{"mode": "never"}, {"records": 0}, {"checkpoint_records": -1}])
def test_a_policy_without_meaning_is_refused(policy):
    with pytest.raises(ConfigError):
        SyncPolicy(**policy)
