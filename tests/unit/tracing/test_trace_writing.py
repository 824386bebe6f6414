import pytest

from molora_fed.errors import TraceError
from molora_fed.tracing.reading import read_records
from molora_fed.tracing.verifying import export_run, seal_run, verify
from molora_fed.tracing.writing import SyncPolicy, TraceWriter


def test_a_sealed_run_verifies_as_folder_and_as_file(tmp_path, key, public, write):
    write(tmp_path / "run", 20, checkpoint_records=4)
    write(tmp_path / "run", 5, writer="other")
    write(tmp_path / "run", 3)
    root = seal_run(tmp_path / "run", key=key)
    export_run(tmp_path / "run", tmp_path / "one.jsonl")
    for path in (tmp_path / "run", tmp_path / "one.jsonl"):
        report = verify(path, public, root)
        assert report.ok, report.problems
        assert report.sealed and report.root == root and report.run == "run"
        assert report.covered == report.records
    records = list(read_records(tmp_path / "one.jsonl"))
    assert [r.number for r in records] == list(range(report.records))
    decisions = [r.body["task"] for r in records if r.kind == "decision"]
    assert decisions == [f"main-{i}" for i in range(20)] + [f"main-{i}" for i in range(3)] + [
        f"other-{i}" for i in range(5)
    ]


def test_a_sealed_run_takes_no_more(tmp_path, key, write):
    write(tmp_path)
    assert seal_run(tmp_path, key=key) == seal_run(tmp_path, key=key)
    with pytest.raises(TraceError, match="sealed"):
        write(tmp_path)


def test_same_inputs_give_the_same_bytes(tmp_path, key, write):
    for name, policy in (("a", {"mode": "always"}), ("b", {"records": 3})):
        write(tmp_path / name, 30, checkpoint_records=7, **policy)
        seal_run(tmp_path / name, key=key)
        export_run(tmp_path / name, tmp_path / f"{name}.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_an_open_run_is_covered_up_to_its_last_checkpoint(tmp_path, key, public):
    policy = SyncPolicy(checkpoint_records=1_000)
    with TraceWriter(tmp_path, key=key, run_id="run", sync=policy) as trace:
        trace.append("decision", {"n": 1})
        trace.checkpoint()
        trace.append("decision", {"n": 2})
        assert trace.sync() == 4
        report = verify(tmp_path, public)
    assert report.ok and not report.sealed
    assert (report.covered, report.records) == (4, 5)
