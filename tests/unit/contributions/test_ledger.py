import re
import sqlite3
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from molora_fed.charter import Amendment, TrainingRules
from molora_fed.contributions.ledger import Ledger, LedgerReader, create_ledger
from molora_fed.contributions.reading import SignedAmendment, sign_amendment
from molora_fed.contributions.states import (
    CONTRIBUTION_TRANSITIONS,
    COOPERATIVE_TRANSITIONS,
    ContributionState,
    CooperativeState,
)
from molora_fed.errors import LedgerError, SignatureError
from molora_fed.storage.files import canonical_json, hash_bytes
from molora_fed.storage.keys import build_public_pem, sign

RECEIVED, VERIFIED, ADMITTED, QUARANTINED, REJECTED, WITHDRAWN = ContributionState
FAST = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture
def manifest(contribute):
    return contribute().manifest


def vary(manifest, number):
    """Another contribution of another contributor."""
    return manifest.model_copy(update={"contributor": f"c-{number}"})


def receive(ledger, manifest):
    ledger.receive(manifest, "00", actor="test")
    return manifest.contribution_id


def move(ledger, contribution_id, *states):
    for state in states:
        ledger.set_state(contribution_id, state, actor="test")


def test_way_of_a_contribution(ledger, manifest):
    assert ledger.find_contribution(manifest.contribution_id) is None
    identity = receive(ledger, manifest)
    move(ledger, identity, VERIFIED)
    ledger.set_state(identity, ADMITTED, actor="coordinator", decision={"state": "ADMITTED"})
    entry = ledger.find_contribution(identity)
    assert (entry.state, entry.decision) == (ADMITTED, {"state": "ADMITTED"})
    assert entry.manifest == manifest
    assert entry.manifest.contribution_id == identity
    assert ledger.contributions(ADMITTED) == [entry]
    assert ledger.contributions(REJECTED) == []
    move(ledger, identity, WITHDRAWN)
    assert ledger.find_contribution(identity).decision == {"state": "ADMITTED"}
    assert [event.what for event in ledger.events()] == [
        "amendment-added",
        "contributor-registered",
        "contribution-received",
        "contribution-changed",
        "contribution-changed",
        "contribution-changed",
    ]
    assert [event.number for event in ledger.events(after=4)] == [5, 6]
    assert ledger.events()[4].data["decision"] == {"state": "ADMITTED"}


def test_receiving_again_changes_nothing(ledger, manifest):
    identity = receive(ledger, manifest)
    move(ledger, identity, VERIFIED, REJECTED)
    before = ledger.find_contribution(identity), ledger.events()
    assert ledger.receive(manifest, "other signature", actor="test") == REJECTED
    move(ledger, identity, REJECTED)
    assert (ledger.find_contribution(identity), ledger.events()) == before


counter = iter(range(10**9))


@FAST
@given(st.lists(st.sampled_from(ContributionState), max_size=8))
def test_no_sequence_of_calls_reaches_a_forbidden_transition(ledger, manifest, wanted):
    identity = receive(ledger, vary(manifest, next(counter)))
    state = RECEIVED
    for target in wanted:
        if target == state or target in CONTRIBUTION_TRANSITIONS[state]:
            ledger.set_state(identity, target, actor="test")
            state = target
        else:
            with pytest.raises(LedgerError, match="States only move forward"):
                ledger.set_state(identity, target, actor="test")
        assert ledger.find_contribution(identity).state == state


@FAST
@given(st.lists(st.sampled_from(ContributionState), min_size=1, max_size=6))
def test_not_even_plain_sql_reaches_a_forbidden_transition(ledger, manifest, wanted):
    identity = receive(ledger, vary(manifest, next(counter)))
    state = RECEIVED
    for target in wanted:
        try:
            ledger._connection.execute(
                "UPDATE contributions SET state = ? WHERE id = ?", (target, identity)
            )
        except sqlite3.IntegrityError:
            assert target not in CONTRIBUTION_TRANSITIONS[state]
        else:
            assert target in CONTRIBUTION_TRANSITIONS[state]
            state = target
        assert ledger.find_contribution(identity).state == state


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(wanted=st.lists(st.sampled_from(CooperativeState), max_size=12))
def test_cooperative_only_moves_forward(ledger, wanted):
    state = ledger.cooperative_state
    for target in wanted:
        if target == state or target in COOPERATIVE_TRANSITIONS[state]:
            ledger.advance(target, actor="test")
            state = target
        else:
            with pytest.raises(LedgerError, match="States only move forward"):
                ledger.advance(target, actor="test")
        assert ledger.cooperative_state == state


def test_cooperative_goes_all_the_way_and_grows(ledger):
    states = CooperativeState
    assert ledger.cooperative_state == states.CREATED
    for state in (
        states.RECRUITING, states.TRAINING, states.FUSING, states.PUBLISHED, states.GROWING,
        states.PUBLISHED, states.GROWING,
    ):  # fmt: skip
        ledger.advance(state, actor="test")
    with pytest.raises(LedgerError, match="expected PUBLISHED after GROWING, got FUSING"):
        ledger.advance(states.FUSING, actor="test")


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM events",
        "UPDATE events SET what = 'nothing'",
        "DELETE FROM contributions",
        "UPDATE contributions SET manifest = '{}'",
        "UPDATE contributors SET public_key = ''",
        "UPDATE amendments SET amendment = '{}'",
        "DELETE FROM amendments",
        "INSERT INTO amendments VALUES (7, '{}', '', '')",
        "UPDATE records SET data = '{}'",
        "DELETE FROM records",
        "UPDATE meta SET value = ''",
        "UPDATE contributions SET decision = '{}'",
        "INSERT INTO cooperative VALUES (2, 'PUBLISHED')",
        "INSERT INTO contributions SELECT 'x', contributor, domain, 'ADMITTED', manifest, "
        "signature, NULL, received, changed FROM contributions",
    ],
)
def test_history_cannot_be_changed(ledger, manifest, statement):
    identity = receive(ledger, manifest)
    ledger.set_state(identity, VERIFIED, actor="test", decision={"state": "none"})
    ledger.add_record("forecast", {"point": 1.0}, actor="test")
    with pytest.raises(sqlite3.IntegrityError):
        ledger._connection.execute(statement)


def test_name_belongs_to_one_key(ledger, manifest, coordinator_key):
    receive(ledger, manifest)
    other = manifest.model_copy(update={"public_key": build_public_pem(coordinator_key)})
    with pytest.raises(LedgerError, match=r"'legal-07': expected the key .* bound to"):
        ledger.receive(other, "00", actor="test")
    assert len(ledger.contributions()) == 1
    receive(ledger, vary(manifest, 2))  # One key may have several names.
    assert [c.name for c in ledger.contributors()] == ["c-2", "legal-07"]


def test_one_admitted_contribution_a_name(ledger, manifest):
    first = receive(ledger, manifest)
    second = receive(ledger, manifest.model_copy(update={"specialist_loss": 2.0}))
    move(ledger, first, VERIFIED, ADMITTED)
    move(ledger, second, VERIFIED)
    with pytest.raises(LedgerError, match="Withdraw that one first"):
        move(ledger, second, ADMITTED)
    move(ledger, first, WITHDRAWN)
    move(ledger, second, ADMITTED)


def test_unknown_contribution(ledger):
    with pytest.raises(LedgerError, match="expected one the ledger knows"):
        move(ledger, hash_bytes(b""), VERIFIED)


def test_contributions_are_in_canonical_order(ledger, manifest):
    identities = [receive(ledger, vary(manifest, number)) for number in range(6)]
    assert [entry.id for entry in ledger.contributions()] == sorted(identities)


def test_records_are_scored_once(ledger):
    number = ledger.add_record("forecast", {"point": 5.0}, actor="test")
    assert ledger.add_record("forecast", {"point": 6.0}, actor="test") == number + 1
    ledger.score_record(number, {"actual": 5.5}, actor="test")
    first, second = ledger.records("forecast")
    assert (first.data, first.outcome) == ({"point": 5.0}, {"actual": 5.5})
    assert first.created < first.scored
    assert (second.outcome, second.scored) == (None, None)
    assert ledger.records("other") == []
    with pytest.raises(LedgerError, match="got an outcome already"):
        ledger.score_record(number, {"actual": 9.0}, actor="test")
    with pytest.raises(LedgerError, match="got no such record"):
        ledger.score_record(99, {"actual": 9.0}, actor="test")
    with pytest.raises(ValueError, match="JSON"):
        ledger.add_record("forecast", {"point": float("nan")}, actor="test")
    assert len(ledger.records("forecast")) == 2


def test_amendments_are_signed_and_numbered(ledger, charter, coordinator_key, contributor_key):
    def sign(number, key=coordinator_key, identity=charter.identity_hash, **changes):
        changed = charter.amendment.model_copy(update={"number": number, **changes})
        return sign_amendment(key, identity, changed)

    ledger.add_amendment(sign(1, training=TrainingRules(steps=7)), actor="test")
    ledger.add_amendment(sign(1, training=TrainingRules(steps=7)), actor="test")
    assert [one.amendment.number for one in ledger.amendments()] == [0, 1]
    assert ledger.amendments()[1].amendment.training.steps == 7
    for signed in ledger.amendments():
        signed.check(ledger.coordinator_key)
    for number in (0, 1, 3):
        with pytest.raises(LedgerError, match=f"expected number 2, got {number}"):
            ledger.add_amendment(sign(number, seed=99), actor="test")
    with pytest.raises(SignatureError, match=r"amendment 2.*does not verify"):
        ledger.add_amendment(sign(2, key=contributor_key), actor="test")
    with pytest.raises(LedgerError, match="expected one for charter"):
        ledger.add_amendment(sign(2, identity="0" * 64), actor="test")
    assert len(ledger.amendments()) == 2


def test_second_writer_is_refused_and_readers_are_not(ledger_path, manifest):
    script = (
        "import sys; from pathlib import Path\n"
        "from molora_fed.contributions.ledger import Ledger, LedgerReader\n"
        "from molora_fed.errors import LedgerError\n"
        "path = Path(sys.argv[1])\n"
        "with LedgerReader(path) as reader: print(len(reader.contributions()))\n"
        "try: Ledger(path)\n"
        "except LedgerError as error: sys.exit(str(error))\n"
    )

    def run():
        return subprocess.run(
            [sys.executable, "-c", script, str(ledger_path)], capture_output=True, text=True
        )

    with Ledger(ledger_path) as ledger:
        receive(ledger, manifest)
        refused = run()
        with pytest.raises(LedgerError, match="only writer"):
            Ledger(ledger_path)
    assert (refused.returncode, refused.stdout) == (1, "1\n")
    message = refused.stderr.strip()
    assert re.search(r"expected to be its only writer, got process \d+ writing it", message)
    assert "\n" not in message
    assert run().returncode == 0


def test_reader_cannot_write(ledger_path):
    with LedgerReader(ledger_path) as reader, pytest.raises(sqlite3.OperationalError):
        reader._connection.execute("INSERT INTO meta VALUES ('a', 'b')")


def test_reader_sees_what_is_committed(ledger, ledger_path, manifest):
    with LedgerReader(ledger_path) as reader:
        identity = receive(ledger, manifest)
        assert reader.find_contribution(identity).state == RECEIVED
        move(ledger, identity, VERIFIED)
        assert reader.find_contribution(identity).state == VERIFIED


def test_failed_change_leaves_neither_change_nor_event(ledger, manifest, monkeypatch):
    identity = receive(ledger, manifest)
    before = ledger.events()

    def fail(*_):
        raise RuntimeError("in the middle")

    monkeypatch.setattr(ledger, "_log", fail)
    with pytest.raises(RuntimeError):
        move(ledger, identity, VERIFIED)
    assert ledger.find_contribution(identity).state == RECEIVED
    assert ledger.events() == before


def test_every_commit_is_flushed(ledger):
    assert ledger._connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    assert ledger._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.parametrize("content", [b"", b"not a database" * 100, None])
def test_what_is_no_ledger_is_refused(tmp_path, content):
    path = tmp_path / "ledger.db"
    if content is None:
        connection = sqlite3.connect(path)
        connection.execute("CREATE TABLE other (x)")
        connection.close()
    else:
        path.write_bytes(content)
    for kind in (LedgerReader, Ledger):
        with pytest.raises(LedgerError, match="expected a ledger of format 1"):
            kind(path)
    for path in (tmp_path / "none.db", tmp_path / "none" / "ledger.db"):
        for kind in (LedgerReader, Ledger):
            with pytest.raises(LedgerError, match=r"molora coop create"):
                kind(path)


def test_making_a_ledger_again(ledger_path, charter, coordinator_key, contributor_key):
    def create(key, identity=charter.identity_hash, amendment=charter.amendment):
        create_ledger(
            ledger_path,
            coordinator_key=build_public_pem(key),
            first=sign_amendment(key, identity, amendment),
        )

    create(coordinator_key)
    with LedgerReader(ledger_path) as reader:
        assert len(reader.amendments()) == 1
    with pytest.raises(LedgerError, match="Choose another folder"):
        create(coordinator_key, identity="0" * 64)
    with pytest.raises(LedgerError, match="Choose another folder"):
        create(contributor_key)
    with pytest.raises(LedgerError, match="expected number 1, got 0"):
        create(coordinator_key, amendment=charter.amendment.model_copy(update={"seed": 7}))


def test_an_amendment_signed_by_an_earlier_version_still_verifies(ledger_path, coordinator_key):
    """What an earlier version signed had fewer keys; it is verified as it was signed."""
    with Ledger(ledger_path) as ledger:
        value = Amendment(number=1, seed=5).model_dump(mode="json")
        del value["admission"]["max_start_gap"]
        signature = sign(
            coordinator_key,
            canonical_json({"charter_identity": ledger.identity_hash, "amendment": value}),
        )
        signed = SignedAmendment(ledger.identity_hash, canonical_json(value).decode(), signature)
        ledger.add_amendment(signed, actor="test")
        last = ledger.amendments()[-1]
        last.check(ledger.coordinator_key)
        assert last.amendment == Amendment(number=1, seed=5)
