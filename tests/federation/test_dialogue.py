"""The whole dialogue without Flower, over a network that loses and repeats."""

import random
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molora_fed.charter import (
    Amendment,
    BaseIdentity,
    Charter,
    Identity,
    load_charter,
    write_charter,
)
from molora_fed.errors import FederationError, SignatureError
from molora_fed.federation.client_dialogue import answer
from molora_fed.federation.coordinator_mail import (
    acknowledge,
    complete_deliveries,
    publish_charter,
    publish_result,
)
from molora_fed.federation.envelopes import Envelope
from molora_fed.federation.homes import ContributorHome, CoordinatorHome
from molora_fed.federation.join_settings import JoinSettings
from molora_fed.federation.letters import Greeting, State, Summary
from molora_fed.federation.mailbox import read_json
from molora_fed.federation.messages import describe_folder
from molora_fed.federation.server_dialogue import RemoteContributor, ServerDialogue
from molora_fed.federation.signing import build_acknowledgement_bytes
from molora_fed.federation.worker_mail import (
    offer_contribution,
    receive_base,
    receive_charter,
    receive_result,
)
from molora_fed.storage.files import write_json
from molora_fed.storage.keys import load_or_make_key, verify

SMALL = 2_000


def build_charter(**amendment):
    base = BaseIdentity(id="tiny", weights="0" * 64, tokenizer="1" * 64)
    return Charter(identity=Identity(name="test", base=base), amendment=Amendment(**amendment))


class Stage:
    """A coordinator and a contributor on disk; `network` decides what arrives."""

    def __init__(self, root, keys, message_bytes=SMALL):
        self.message_bytes = message_bytes
        self.server = CoordinatorHome(root / "server")
        self.client = ContributorHome(root / "client")
        self.key = load_or_make_key(keys / "coordinator.pem")
        self.client.root.mkdir(parents=True)
        load_or_make_key(keys / "contributor.pem")
        shutil.copy2(keys / "contributor.pem", self.client.key)
        JoinSettings("alpha", "python").save(self.client.settings_file)
        self.server.base.mkdir(parents=True)
        (self.server.base / "model.safetensors").write_bytes(random.Random(0).randbytes(5_000))
        write_charter(build_charter(expected=1), self.server.charter)
        self.dialogue = ServerDialogue(
            self.server, message_bytes=self.message_bytes, wait_seconds=0
        )
        self.remote = RemoteContributor()
        self.summary = Summary(contributions=["c"])

    def exchange(self, fate="delivered"):
        """One envelope there and its answer back; True if anything was said."""
        envelope = self.dialogue.next_envelope(self.remote)
        if envelope is None:
            return False
        assert envelope.num_bytes <= self.message_bytes
        if fate == "request lost":
            return True
        reply = answer(self.client, envelope)
        if fate == "repeated":
            reply = answer(self.client, envelope)
        if fate != "reply lost":
            self.dialogue.accept(self.remote, reply)
        if fate == "node replaced":
            self.remote = RemoteContributor()
        return True

    def coordinate(self):
        """What the coordinator's worker does in one look."""
        charter = load_charter(self.server.charter)
        publish_charter(self.server, charter, self.key, part_bytes=self.message_bytes)
        for delivery in complete_deliveries(self.server, part_bytes=self.message_bytes):
            target = self.server.received / delivery.name
            delivery.unpack(target, part_bytes=self.message_bytes)
            acknowledge(
                delivery, self.key, contribution_id="c", state="ADMITTED", findings=[],
                part_bytes=self.message_bytes,
            )  # fmt: skip
            self.publish(target)

    def publish(self, folder):
        publish_result(
            self.server, {"fused": folder}, self.summary, key=self.key,
            identity=load_charter(self.server.charter).identity_hash,
            part_bytes=self.message_bytes,
        )  # fmt: skip

    def work(self):
        """What the contributor's worker does in one look; True when the result is there."""
        home = self.client
        if receive_charter(home) is None:
            return False
        if not receive_base(home):
            return False
        if home.list_tasks() and not home.offer_file.exists():
            home.contribution.mkdir(exist_ok=True)
            (home.contribution / "adapter.bin").write_bytes(random.Random(1).randbytes(7_000))
            (home.contribution / "empty").touch()
            offer_contribution(home)
        return receive_result(home)


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return tmp_path_factory.mktemp("keys")


@settings(max_examples=15, deadline=None)
@given(
    fates=st.lists(
        st.sampled_from(
            ["delivered", "request lost", "reply lost", "repeated", "node replaced", "coordinate",
             "work"]
        ),
        max_size=60,
    )
)  # fmt: skip
def test_whatever_is_lost_the_contribution_arrives_and_the_result_comes_back(
    tmp_path_factory, keys, fates
):
    stage = Stage(tmp_path_factory.mktemp("stage"), keys)
    for fate in fates:
        if fate == "coordinate":
            stage.coordinate()
        elif fate == "work":
            stage.work()
        else:
            stage.exchange(fate)
    for _ in range(60):
        stage.coordinate()
        stage.exchange()
        if stage.work():
            break
    sent = describe_folder(stage.client.contribution)
    assert describe_folder(stage.server.received / "alpha") == sent
    assert describe_folder(stage.client.result / "fused") == sent
    assert describe_folder(stage.client.base) == describe_folder(stage.server.base)
    acknowledgement = read_json(stage.client.acknowledgement_letter)
    assert acknowledgement["shipment"] == sent.id
    verify(
        (stage.client.charter / "coordinator.pem").read_text(),
        build_acknowledgement_bytes(acknowledgement),
        acknowledgement["signature"],
    )
    stage.exchange()
    assert stage.exchange() is False  # nothing left to say
    assert stage.client.parts.held() == set()


def test_a_newcomer_waits_for_the_result_it_is_part_of(tmp_path, keys):
    stage = Stage(tmp_path, keys)
    stage.summary = Summary(contributions=["of somebody else"])
    for _ in range(60):
        stage.exchange()
        stage.coordinate()
        stage.work()
    assert read_json(stage.client.acknowledgement_letter)["state"] == "ADMITTED"
    assert not stage.client.result_letter.exists()
    stage.summary = Summary(contributions=["of somebody else", "c"])
    stage.publish(stage.server.received / "alpha")
    assert any(stage.exchange() and stage.work() for _ in range(60))


def test_a_result_that_is_here_is_not_sent_again_and_one_that_was_deleted_is(tmp_path, keys):
    stage = Stage(tmp_path, keys)
    while not stage.work():
        stage.exchange()
        stage.coordinate()

    def join_again():
        """The bytes of parts that the server sends to one that joins again."""
        stage.client.result_letter.unlink()
        stage.remote, num_bytes = RemoteContributor(), 0
        while not stage.work():
            envelope = stage.dialogue.next_envelope(stage.remote)
            num_bytes += envelope.num_bytes
            stage.dialogue.accept(stage.remote, answer(stage.client, envelope))
        return num_bytes

    assert join_again() == 0
    shutil.rmtree(stage.client.result)
    assert join_again() >= 7_000
    sent = describe_folder(stage.client.contribution)
    assert describe_folder(stage.client.result / "fused") == sent


def test_a_quiet_network_needs_few_messages(tmp_path, keys):
    stage = Stage(tmp_path, keys, message_bytes=100_000)
    stage.coordinate()
    count = 0
    for _ in range(12):
        count += stage.exchange()
        stage.coordinate()
        if stage.work():
            break
    # hello; charter, task and base; wait answered with the contribution; ack; result
    assert count <= 6


def test_a_node_nobody_has_joined_at_is_asked_again(tmp_path, keys):
    stage = Stage(tmp_path, keys)
    stage.dialogue.accept(stage.remote, Envelope())
    assert stage.remote.fingerprint == ""
    stage.coordinate()
    assert stage.dialogue.next_envelope(stage.remote).find(Greeting) is not None
    with pytest.raises(FederationError, match="expected its public key"):
        stage.dialogue.accept(stage.remote, Envelope((State(),)))


def test_a_hello_must_be_signed_with_the_key_it_shows(tmp_path, keys):
    stage = Stage(tmp_path, keys)
    stage.coordinate()
    envelope = stage.dialogue.next_envelope(stage.remote)
    reply = answer(stage.client, envelope)
    other = RemoteContributor()
    with pytest.raises(SignatureError):
        stage.dialogue.accept(other, reply)  # a replay: signed for another nonce
    assert other.fingerprint == ""
    with pytest.raises(FederationError, match="neither"):
        stage.dialogue.accept(RemoteContributor(), Envelope((State(),)))
    assert stage.server.contributors() == []


def test_a_name_belongs_to_the_key_that_took_it_first(tmp_path, keys):
    stage = Stage(tmp_path, keys)
    stage.coordinate()
    stage.exchange()
    stage.client.key.unlink()
    load_or_make_key(stage.client.key)
    stage.remote = RemoteContributor()
    stage.exchange()
    stage.exchange()
    refusal = read_json(stage.client.refusal_letter)
    assert "name nobody else has" in refusal["reason"]
    assert stage.exchange() is False


def test_a_contribution_over_the_charters_limit_is_refused_before_it_is_sent(tmp_path, keys):
    stage = Stage(tmp_path, keys)
    stage.coordinate()
    stage.exchange()
    home = stage.client
    home.contribution.mkdir()
    with (home.contribution / "huge.bin").open("wb") as file:
        file.truncate(300 * 2**20)
    offer_contribution(home)
    with pytest.raises(FederationError, match="at most"):
        stage.exchange()
    mailbox = stage.server.contributor(stage.remote.fingerprint)
    assert mailbox.parts.held() == set()
    stage.exchange("reply lost")
    assert "at most" in read_json(home.refusal_letter)["reason"]


def test_a_charter_of_another_coordinator_is_refused(tmp_path, keys):
    stage = Stage(tmp_path, keys)
    stage.coordinate()
    while stage.client.charter_letter.exists() is False:
        stage.exchange()
    receive_charter(stage.client)
    stage.key = load_or_make_key(tmp_path / "other.pem")
    (stage.server.outbox / "charter.json").unlink()
    stage.coordinate()
    stage.client.charter_letter.write_bytes((stage.server.outbox / "charter.json").read_bytes())
    with pytest.raises(FederationError, match="coordinator's key"):
        receive_charter(stage.client)


def test_a_forged_charter_is_refused(tmp_path, keys):
    stage = Stage(tmp_path, keys)
    stage.coordinate()
    letter = read_json(stage.server.outbox / "charter.json")
    letter["text"] = letter["text"].replace("test", "evil")
    write_json(stage.client.charter_letter, letter)
    with pytest.raises(SignatureError):
        receive_charter(stage.client)
