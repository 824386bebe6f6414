"""Every state of the ledger has a command that leaves it, in a ledger of an earlier version too."""

import json
import shutil
import sqlite3

import pytest
from door_helpers import Door, edit_tensors, fill
from molora_cli.main import run

from molora_fed.contributions.admission import AdmissionDecision
from molora_fed.contributions.ledger import Ledger
from molora_fed.contributions.manifest import load_contribution
from molora_fed.contributions.receive import build_receipt, load_admitted
from molora_fed.contributions.states import (
    CONTRIBUTION_TRANSITIONS,
    ContributionState,
    CooperativeState,
)
from molora_fed.cooperative.cooperative import create_cooperative, open_cooperative
from molora_fed.cooperative.judging import (
    LEAVES,
    judge_pending,
    list_standings,
    quarantine,
    reject,
    release,
)
from molora_fed.errors import AdmissionError, LedgerError
from molora_fed.federation.withdrawal import withdraw_contributor
from molora_fed.types import Finding

RECEIVED, VERIFIED, ADMITTED, QUARANTINED, REJECTED, WITHDRAWN = ContributionState
OLD_TRANSITIONS = {RECEIVED: {VERIFIED}, VERIFIED: {ADMITTED, QUARANTINED, REJECTED}}


@pytest.fixture
def door(tmp_path, tiny_checkpoint):
    """A cooperative's folder, as commands open it, and its door."""
    made = Door(tmp_path, tiny_checkpoint())
    made.ledger.close()
    shutil.rmtree(tmp_path / "home")
    identity = made.charter.identity
    made.cooperative = create_cooperative(
        tmp_path / "home",
        identity.name,
        made.base,
        adapters=identity.adapters,
        corpus=identity.corpus,
        privacy=identity.privacy_rules,
        amendment=made.charter.amendment,
    )
    made.ledger = Ledger(made.ledger_path)
    yield made
    made.ledger.close()


def put(door, state, monkeypatch):
    """One contribution in a state; its id."""
    folder = door.contribute()
    identity = load_contribution(folder).id
    stop = {
        RECEIVED: "molora_fed.contributions.receive._store_files",
        VERIFIED: "molora_fed.contributions.receive.admit",
    }
    if state in stop:
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(stop[state], interrupt)
            door.receive(folder)
    elif state == REJECTED:
        with monkeypatch.context() as patched:
            patched.setattr(
                "molora_fed.contributions.receive.admit",
                lambda candidate, **_: AdmissionDecision(REJECTED),
            )
            door.receive(folder)
    else:
        assert door.receive(folder).state == ADMITTED
        if state == QUARANTINED:
            finding = Finding("one", "another", "Look.", quarantine=True)
            quarantine(door.ledger, identity, "fusion", finding, actor="test")
    door.ledger.close()
    if state == WITHDRAWN:
        withdraw_contributor(door.cooperative, "legal-1")
    return identity


def interrupt(*_, **__):
    raise KeyboardInterrupt


def state_of(door, identity):
    with door.cooperative.read_ledger() as ledger:
        return ledger.find_contribution(identity).state


COMMANDS = {
    RECEIVED: {reject: REJECTED},
    VERIFIED: {release: ADMITTED, reject: REJECTED, judge_pending: ADMITTED},
    ADMITTED: {withdraw_contributor: WITHDRAWN},
    QUARANTINED: {release: ADMITTED, reject: REJECTED, withdraw_contributor: WITHDRAWN},
    REJECTED: {release: ADMITTED},
}


def test_the_table_names_every_state():
    assert set(LEAVES) == set(ContributionState)
    assert set(COMMANDS) == set(ContributionState) - {WITHDRAWN}
    for state, commands in COMMANDS.items():
        assert set(commands.values()) <= CONTRIBUTION_TRANSITIONS[state]
        for command in commands:
            name = {"withdraw_contributor": "withdraw", "judge_pending": "repair"}
            assert name.get(command.__name__, command.__name__) in LEAVES[state]


@pytest.mark.parametrize(
    ("state", "command"),
    [(state, command) for state, commands in COMMANDS.items() for command in commands],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_command_leaves_the_state(door, monkeypatch, state, command):
    identity = put(door, state, monkeypatch)
    assert state_of(door, identity) == state
    if command is judge_pending:
        with door.cooperative.open_ledger() as ledger:
            command(door.cooperative, ledger)
    elif command is withdraw_contributor:
        command(door.cooperative, "legal-1")
    else:
        command(door.cooperative, identity[:12], reason="looked at it")
    assert state_of(door, identity) == COMMANDS[state][command]
    if COMMANDS[state][command] != WITHDRAWN:
        with door.cooperative.read_ledger() as ledger:
            receipt = build_receipt(ledger, ledger.find_contribution(identity), known=True)
            assert receipt.decision.state == receipt.state
            assert list_standings(ledger)[0].state == receipt.state


def test_another_contribution_comes_after_every_end(door, monkeypatch):
    """Withdrawn and rejected are final for the contribution, not for its contributor."""
    put(door, WITHDRAWN, monkeypatch)
    door.ledger = Ledger(door.ledger_path)
    assert door.receive(door.contribute(specialist_loss=2.4)).state == ADMITTED


def age(path):
    """Give a ledger the rules that the first version wrote."""
    allowed = " OR ".join(
        f"(OLD.state = '{one}' AND NEW.state = '{other}')"
        for one, others in {**OLD_TRANSITIONS, ADMITTED: {WITHDRAWN}}.items()
        for other in sorted(others)
    )
    connection = sqlite3.connect(path)
    connection.execute("DROP TRIGGER contributions_forward")
    connection.execute(
        "CREATE TRIGGER contributions_forward BEFORE UPDATE OF state ON contributions "
        f"WHEN NOT ({allowed}) BEGIN SELECT RAISE(ABORT, 'states only move forward'); END"
    )
    connection.commit()
    connection.close()


def test_a_ledger_of_an_earlier_version_takes_the_new_commands(door, monkeypatch):
    identity = put(door, QUARANTINED, monkeypatch)
    age(door.ledger_path)
    release(door.cooperative, "legal-1")
    assert state_of(door, identity) == ADMITTED


def test_a_release_grants_only_what_was_named(door, monkeypatch):
    """A quarantine is no way round the other checks."""
    adapter = door.adapter()
    edit_tensors(adapter, fill(1e30))
    folder = door.contribute(adapter=adapter)
    with monkeypatch.context() as patched:
        patched.setattr(
            "molora_fed.contributions.receive.admit",
            lambda candidate, **_: AdmissionDecision(QUARANTINED),
        )
        door.receive(folder)
    door.ledger.close()
    with pytest.raises(AdmissionError, match="own-domain-loss"):
        release(door.cooperative, "legal-1")
    assert state_of(door, load_contribution(folder).id) in (QUARANTINED, REJECTED)


def test_what_is_not_there_is_named(door, monkeypatch):
    identity = put(door, ADMITTED, monkeypatch)
    for which in ("nobody", identity[:4], "x" * 10_000, "legal-1"):
        with pytest.raises(LedgerError, match="Cannot decide on contribution") as caught:
            release(door.cooperative, which)
        assert len(str(caught.value)) < 1_000 and "\n" not in str(caught.value)


def test_the_cooperative_goes_on_from_every_state(door):
    from molora_fed.cooperative.decisions import begin_fusion

    for state in CooperativeState:
        if state != CooperativeState.CREATED:
            door.ledger.advance(state, actor="test")
        before = door.ledger.cooperative_state
        if before in (CooperativeState.FUSING, CooperativeState.GROWING):
            assert begin_fusion(door.ledger, actor="test") == before
    assert load_admitted(door.ledger, door.store) == []
    assert open_cooperative(door.cooperative.folder).charter == door.cooperative.charter


def test_the_commands_say_what_they_did(door, monkeypatch, capsys):
    identity = put(door, QUARANTINED, monkeypatch)
    home = str(door.cooperative.folder)
    for arguments, said in (
        (("list", home), f"{identity[:16]}  fusion: another."),
        (("release", home, identity[:12], "--reason", "fine"), f"admitted     legal-1, {identity}"),
        (("repair", home), "Nothing to repair"),
        (("list", home), "Out of ADMITTED: molora coop withdraw."),
    ):
        assert run(["coop", *arguments]) == 0
        assert said in capsys.readouterr().out
    assert run(["coop", "reject", home, "legal-1"]) == LedgerError.exit_code
    assert "expected one that is RECEIVED or VERIFIED or QUARANTINED" in capsys.readouterr().err


def test_a_contributor_is_told_what_was_decided_by_hand(door, monkeypatch):
    from molora_fed.federation.homes import CoordinatorHome
    from molora_fed.federation.withdrawal import build_announcer
    from molora_fed.storage.files import write_json
    from molora_fed.storage.keys import build_public_pem, key_fingerprint

    identity = put(door, QUARANTINED, monkeypatch)
    fingerprint = key_fingerprint(build_public_pem(door.key("legal-1")))
    mailbox = CoordinatorHome(door.cooperative.folder).contributor(fingerprint)
    letter = mailbox.acknowledgement_file("a" * 64)
    body = {"shipment": "a" * 64, "contribution_id": identity, "state": "QUARANTINED"}
    write_json(letter, {**body, "findings": ["x"], "signature": ""})
    release(door.cooperative, identity[:12], announce=build_announcer(door.cooperative))
    said = json.loads(letter.read_text())
    assert (said["state"], said["findings"]) == ("ADMITTED", []) and said["signature"]
