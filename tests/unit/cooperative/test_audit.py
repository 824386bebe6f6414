import json
import shutil
import sqlite3

import pytest

from molora_fed.charter import Amendment, CorpusRules
from molora_fed.contributions.reading import SignedAmendment
from molora_fed.cooperative.audit import record_cooperative
from molora_fed.cooperative.cooperative import amend_cooperative
from molora_fed.cooperative.create import found_cooperative
from molora_fed.cooperative.decisions import begin_fusion, end_fusion
from molora_fed.errors import TraceError
from molora_fed.storage.keys import build_public_pem, load_key
from molora_fed.tracing.reading import read_records
from molora_fed.tracing.verifying import verify

DECIDED = {"router": "evidence", "fingerprints": {"contributions": {"a": "01"}}}
EVOLVED = {
    "router": "gated",
    "fingerprints": {"population": "ab"},
    "generations": [{"number": 0, "kept": True}, {"number": 1, "kept": False}],
}


@pytest.fixture
def cooperative(tmp_path, tiny_checkpoint):
    opened, _ = found_cooperative(
        tmp_path / "c", "one", source=str(tiny_checkpoint()), corpus=CorpusRules(block_size=32)
    )
    return opened


@pytest.fixture
def public(cooperative):
    return build_public_pem(load_key(cooperative.key_path))


def decide(ledger):
    """One decision of each sort."""
    ledger.add_event("contribution-refused", actor="t", subject="x", data={"reason": "too large"})
    number = ledger.add_record("forecast", {"gain": 1.5}, actor="t")
    begin_fusion(ledger, actor="t")
    ledger.score_record(number, {"actual": 1.25}, actor="t")
    end_fusion(ledger, actor="t", result=DECIDED)
    begin_fusion(ledger, actor="t")
    end_fusion(ledger, actor="t", result=EVOLVED)
    ledger.add_event("withdrawal-decided", actor="t", subject="x", data={"reason": "moved"})


def read(cooperative):
    found = read_records(cooperative.folder / "trace")
    return [(r.kind, r.body) for r in found if r.kind not in ("header", "checkpoint")]


def test_every_decision_is_in_a_trace_that_verifies(cooperative, public):
    with cooperative.open_ledger() as ledger:
        decide(ledger)
        events = ledger.events()
        done = record_cooperative(cooperative)  # while another holds the ledger
    assert (done.added, done.total) == (len(events), len(events))
    report = verify(done.folder, public, done.root)
    assert report.ok and report.covered == report.records
    assert done.key_file.read_text() == public
    records = read(cooperative)
    assert [body["event"] for _, body in records] == [event.number for event in events]
    kinds = {kind for kind, _ in records}
    assert kinds == {
        "admission", "amendment", "evolution", "forecast", "fusion", "state", "withdrawal",
    }  # fmt: skip
    bodies = {body["what"]: body for _, body in records}
    assert bodies["record-added"]["statement"] == {"gain": 1.5}
    assert bodies["record-scored"]["outcome"] == {"actual": 1.25}
    assert bodies["fusion-decided"]["data"] == DECIDED
    assert bodies["generation-decided"]["data"] == EVOLVED["generations"][1]
    amendment = bodies["amendment-added"]["amendment"]
    SignedAmendment(
        cooperative.charter.identity_hash, amendment["text"], amendment["signature"]
    ).check(public)


def test_recording_goes_on_where_it_stopped(cooperative, public):
    first = record_cooperative(cooperative)
    again = record_cooperative(cooperative)
    assert first.added > 0 and again.added == 0 and again.root == first.root
    with cooperative.open_ledger() as ledger:
        decide(ledger)
        amend_cooperative(cooperative, ledger, Amendment(number=1, seed=9))
    more = record_cooperative(cooperative)
    assert more.added > 0 and more.total == first.total + more.added
    assert [body["event"] for _, body in read(cooperative)] == list(range(1, more.total + 1))
    assert verify(more.folder, public, first.root).ok


def test_a_ledger_that_tells_another_history_is_found(cooperative):
    with cooperative.open_ledger() as ledger:
        decide(ledger)
    record_cooperative(cooperative)
    with sqlite3.connect(cooperative.ledger_path) as connection:
        rules = "SELECT name FROM sqlite_master WHERE type = 'trigger' AND tbl_name = 'events'"
        for (name,) in connection.execute(rules).fetchall():
            connection.execute(f"DROP TRIGGER {name}")
        connection.execute(
            "UPDATE events SET data = ? WHERE what = 'withdrawal-decided'",
            (json.dumps({"reason": "thrown out"}),),
        )
    connection.close()
    with pytest.raises(TraceError, match="as recorded before"):
        record_cooperative(cooperative)


def test_a_ledger_put_back_to_a_backup_is_found(cooperative, tmp_path):
    shutil.copy(cooperative.ledger_path, tmp_path / "backup.db")
    with cooperative.open_ledger() as ledger:
        decide(ledger)
    record_cooperative(cooperative)
    for path in cooperative.folder.glob("ledger.db*"):
        path.unlink()
    shutil.copy(tmp_path / "backup.db", cooperative.ledger_path)
    with pytest.raises(TraceError, match="got another \\(none\\)"):
        record_cooperative(cooperative)


def test_a_changed_trace_is_not_written_into(cooperative):
    done = record_cooperative(cooperative)
    segment = done.folder / "ledger-0000.jsonl"
    segment.write_bytes(segment.read_bytes().replace(b"coordinator", b"coordinatar", 1))
    with pytest.raises(TraceError, match="a trace that verifies"):
        record_cooperative(cooperative)
