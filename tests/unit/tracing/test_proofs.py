import copy
import json

import pytest

from molora_fed.errors import TraceError
from molora_fed.tracing.proofs import build_proof, check_proof, read_proof
from molora_fed.tracing.reading import read_records
from molora_fed.tracing.verifying import export_run, seal_run


@pytest.fixture(scope="module")
def run(tmp_path_factory, key, write):
    folder = tmp_path_factory.mktemp("proofs") / "run"
    write(folder, 6, checkpoint_records=4)
    write(folder, 3, writer="other")
    seal_run(folder, key=key)
    export_run(folder, folder.parent / "run.jsonl")
    return folder


def test_every_record_can_be_proved_from_folder_and_file(run, public):
    for path in (run, run.parent / "run.jsonl"):
        for record in read_records(path):
            proof = json.loads(json.dumps(build_proof(path, record.number)))
            proven = check_proof(proof, public)
            assert (proven.number, proven.kind, proven.body) == (
                record.number, record.kind, record.body,
            )  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.update(line=p["line"].replace("main-1", "main-2")),
        lambda p: p.update(number=p["number"] + 1),
        lambda p: p.update(number="3"),
        lambda p: p["path"].pop(),
        lambda p: p["path"].append("00" * 32),
        lambda p: p.update(path=["zz"] * 3),
        lambda p: p.update(path=["00" * 32] * 1000),
        lambda p: p["seal"].update(count=2),
        lambda p: p["seal"].update(root="00" * 32),
        lambda p: p["seal"].update(signature="00"),
        lambda p: p.update(seal={}),
        lambda p: p.update(line="\ud800"),
        lambda p: p.clear(),
    ],
)
def test_a_changed_proof_proves_nothing(run, public, change):
    proof = build_proof(run, 3)
    changed = copy.deepcopy(proof)
    change(changed)
    with pytest.raises(TraceError):
        check_proof(changed, public)


def test_a_proof_is_compared_with_a_root_kept_elsewhere(run, public):
    proof = build_proof(run, 3)
    check_proof(proof, public, proof["seal"]["root"])
    with pytest.raises(TraceError, match="root"):
        check_proof(proof, public, "ab" * 32)


def test_only_records_of_sealed_runs_are_proved(run, tmp_path, write):
    write(tmp_path)
    with pytest.raises(TraceError, match="open"):
        build_proof(tmp_path, 0)
    with pytest.raises(TraceError, match="number"):
        build_proof(run, 10_000)


def test_a_trace_is_no_proof(run, tmp_path):
    assert read_proof(run / "main-0000.jsonl") is None
    assert read_proof(run) is None
    (tmp_path / "x").write_bytes(b"[" * 100_000)
    assert read_proof(tmp_path / "x") is None
