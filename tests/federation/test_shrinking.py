"""A served cooperative that shrinks and is amended between two runs of its server."""

import json

import pytest
from test_workers import Stage, take_turns, texts  # noqa: F401 (fixtures)

from molora_fed.contributions.states import ContributionState, CooperativeState
from molora_fed.cooperative.amend import amend_by_settings
from molora_fed.errors import AdmissionError
from molora_fed.federation.coordinator_mail import publish_charter
from molora_fed.federation.mailbox import read_json
from molora_fed.federation.server_dialogue import ServerDialogue
from molora_fed.federation.withdrawal import withdraw_contributor
from molora_fed.federation.worker import ContributorWorker
from molora_fed.storage.keys import load_or_make_key


class IdleWorker(ContributorWorker):
    """A contributor that may not train: it has contributed."""

    def _train(self, *_):
        raise AssertionError("it trained again")


def publish(stage):
    """What a server does when it starts."""
    key = load_or_make_key(stage.cooperative.key_path)
    publish_charter(stage.server, stage.cooperative.charter, key, part_bytes=64 * 2**20)
    stage.dialogue = ServerDialogue(stage.server, message_bytes=64 * 2**20, wait_seconds=0)
    stage.members, stage.failures = {}, {}


def test_withdrawn_then_amended_the_server_fuses_again_and_nobody_trains(
    tmp_path,
    tiny_checkpoint,
    texts,  # noqa: F811
):
    stage = Stage(tmp_path, tiny_checkpoint("gpt_neox"), expected=2)
    alpha = stage.join("alpha-1", "alpha", texts)
    beta = stage.join("beta-1", "beta", texts)
    stage.run()
    assert stage.failures == {}
    first = read_json(stage.server.outbox / "result.json")
    manifest = json.loads((alpha.contribution / "manifest.json").read_text())
    assert manifest["start_loss"] > 0  # stated by every contributor of this version

    done = withdraw_contributor(stage.cooperative, "beta-1")
    assert done.retracted and done.remaining == ("alpha-1",)
    assert read_json(stage.server.outbox / "result.json") is None
    assert not (stage.server.outbox / "result").exists()

    # One is left of two expected: whom to wait for was settled at the first fusion.
    stage.cooperative, _ = amend_by_settings(
        stage.cooperative, ["training.steps=31", "fusion.compare="]
    )
    publish(stage)
    stage.join("alpha-1", "alpha", texts, worker=IdleWorker)
    stage.run()
    assert stage.failures == {}
    second = read_json(stage.server.outbox / "result.json")
    assert second["summary"]["amendment"] == 1
    assert set(second["summary"]["contributions"]) < set(first["summary"]["contributions"])
    assert json.loads((alpha.contribution / "manifest.json").read_text()) == manifest
    with stage.cooperative.read_ledger() as ledger:
        assert ledger.cooperative_state == CooperativeState.PUBLISHED
        states = {entry.contributor: entry.state for entry in ledger.contributions()}
    assert states == {
        "alpha-1": ContributionState.ADMITTED,
        "beta-1": ContributionState.WITHDRAWN,
    }

    # The one who left is told so by name of its state, and gets no model any more.
    (mailbox,) = [mailbox for mailbox in stage.server.contributors() if mailbox.name == "beta-1"]
    (letter,) = (mailbox.folder / "acknowledgements").iterdir()
    beta.acknowledgement_letter.write_bytes(letter.read_bytes())
    worker = ContributorWorker(beta, stage.plugins)
    with pytest.raises(AdmissionError, match="got WITHDRAWN"):
        worker._read_decision()
