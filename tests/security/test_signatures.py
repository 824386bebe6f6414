"""What a contributor takes from a server: only what its coordinator signed, and nothing older."""

import shutil

import pytest
from hostile import HASH, PART_BYTES, build_charter, open_coordinator

from molora_fed.charter import write_charter
from molora_fed.errors import FederationError, SignatureError
from molora_fed.federation.client_dialogue import answer
from molora_fed.federation.coordinator_mail import (
    publish_charter,
    publish_result,
    sign_kept_result,
)
from molora_fed.federation.envelopes import Envelope, read_letter
from molora_fed.federation.homes import ContributorHome
from molora_fed.federation.join_settings import JoinSettings
from molora_fed.federation.letters import (
    Acknowledgement,
    CharterLetter,
    Greeting,
    Hello,
    ResultLetter,
    Summary,
)
from molora_fed.federation.mailbox import read_json
from molora_fed.federation.signing import build_acknowledgement_bytes
from molora_fed.federation.worker import ContributorWorker
from molora_fed.federation.worker_mail import (
    offer_contribution,
    receive_charter,
    receive_result,
)
from molora_fed.plugins import load_plugins
from molora_fed.storage.files import write_json
from molora_fed.storage.keys import (
    build_public_pem,
    key_fingerprint,
    load_key,
    load_or_make_key,
    sign,
)


class Stage:
    """A coordinator, and a contributor that has its charter."""

    def __init__(self, root):
        self.root = root
        self.server = open_coordinator(root / "server")
        self.client = ContributorHome(root / "client")
        load_or_make_key(self.client.key)
        JoinSettings("alpha", "python").save(self.client.settings_file)
        self.publish(0)
        assert receive_charter(self.client) is not None

    def publish(self, number, *, key=None, name="test"):
        """Bring the contributor a charter with this amendment."""
        charter = build_charter(name, number=number)
        write_charter(charter, self.server.charter)
        publish_charter(
            self.server, charter, key or load_key(self.server.key), part_bytes=PART_BYTES
        )
        self.client.charter_letter.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(self.server.outbox / "charter.json", self.client.charter_letter)

    def bring_result(self, number, *, key=None, name="test", content=b"model"):
        """Bring the contributor a result made under this amendment, with its files."""
        folder = self.root / "fused"
        folder.mkdir(exist_ok=True)
        (folder / "model.bin").write_bytes(content)
        publish_result(
            self.server, {"fused": folder}, Summary(amendment=number, contributions=["c"]),
            key=key or load_key(self.server.key),
            identity=build_charter(name).identity_hash, part_bytes=PART_BYTES,
        )  # fmt: skip
        letter = read_letter(self.server.outbox / "result.json", ResultLetter)
        from molora_fed.federation.mailbox import read_parts
        from molora_fed.federation.messages import plan_parts

        names = plan_parts(letter.files, part_bytes=PART_BYTES)
        parts = read_parts(self.server.outbox / "result" / letter.id, letter.files, names)
        answer(self.client, Envelope((letter,), tuple(parts)))


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


def test_a_signed_result_is_taken(stage):
    stage.bring_result(0)
    assert receive_result(stage.client)
    assert (stage.client.result / "fused" / "model.bin").read_bytes() == b"model"


def test_an_unsigned_result_is_refused(stage):
    stage.bring_result(0)
    letter = read_json(stage.client.result_letter)
    for change in (None, "", "00" * 40):
        altered = {**letter, "signature": change}
        if change is None:
            del altered["signature"]
            write_json(stage.client.result_letter, altered)
            assert receive_result(stage.client) is False  # set aside: it is none
        else:
            write_json(stage.client.result_letter, altered)
            with pytest.raises(SignatureError):
                receive_result(stage.client)
        assert not stage.client.result.exists()
        assert not stage.client.result_letter.exists()  # the next join begins without it


@pytest.mark.parametrize("changed", ["key", "cooperative", "amendment", "contributions", "files"])
def test_a_result_of_another_is_refused(stage, changed):
    key = load_or_make_key(stage.root / "other.pem") if changed == "key" else None
    stage.bring_result(0, key=key, name="other" if changed == "cooperative" else "test")
    letter = read_json(stage.client.result_letter)
    if changed in letter["summary"]:
        letter["summary"][changed] = 7 if changed == "amendment" else ["d"]
    if changed == "files":
        letter["files"][0]["sha256"] = "b" * 64
    write_json(stage.client.result_letter, letter)
    with pytest.raises(SignatureError, match="result"):
        receive_result(stage.client)
    assert not stage.client.result.exists()


def test_an_older_result_is_refused(stage):
    stage.bring_result(2, content=b"new")
    assert receive_result(stage.client)
    stage.bring_result(1, content=b"old")
    with pytest.raises(FederationError, match="amendment 2 or later"):
        receive_result(stage.client)
    assert (stage.client.result / "fused" / "model.bin").read_bytes() == b"new"
    stage.bring_result(2, content=b"grown")
    assert receive_result(stage.client)


def test_an_older_amendment_is_refused(stage):
    stage.publish(2)
    assert receive_charter(stage.client).amendment.number == 2
    stage.publish(1)
    with pytest.raises(FederationError, match="amendment 2 or later"):
        receive_charter(stage.client)
    stage.publish(2)
    assert receive_charter(stage.client).amendment.number == 2


@pytest.mark.parametrize(
    "changed", ["text", "base", "tasks", "part_bytes", "amendment", "identity"]
)
def test_every_field_of_a_charter_is_signed(stage, changed):
    letter = read_json(stage.server.outbox / "charter.json")
    letter[changed] = {
        "text": letter["text"] + "\n",
        "base": [{**letter["base"][0], "sha256": "c" * 64}],
        "tasks": [],
        "part_bytes": 77,
        "amendment": 5,
        "identity": "d" * 64,
    }[changed]
    write_json(stage.client.charter_letter, letter)
    with pytest.raises(SignatureError, match="charter"):
        receive_charter(stage.client)


def test_an_acknowledgement_is_the_coordinators_and_of_this_contribution(stage):
    home = stage.client
    home.contribution.mkdir()
    (home.contribution / "adapter.bin").write_bytes(b"adapter")
    own = offer_contribution(home).id
    worker = ContributorWorker(home, load_plugins())

    def bring(shipment, key):
        body = {"shipment": shipment, "contribution_id": HASH, "state": "ADMITTED", "findings": []}
        body["signature"] = sign(key, build_acknowledgement_bytes(body))
        answer(home, Envelope((Acknowledgement(**body),)))

    with pytest.raises(SignatureError):
        bring(own, load_or_make_key(stage.root / "member.pem"))
        worker._read_decision()
    assert not home.acknowledgement_letter.exists()
    bring(HASH, load_key(stage.server.key))  # another member's
    assert worker._read_decision() is None
    bring(own, load_key(stage.server.key))
    assert worker._read_decision() is True


def test_nobody_else_is_greeted(stage):
    pem = build_public_pem(load_key(stage.server.key))
    letter = read_letter(stage.server.outbox / "charter.json", CharterLetter)
    honest = Greeting(nonce="a" * 64, identity=letter.identity, coordinator=key_fingerprint(pem))
    assert answer(stage.client, Envelope((honest,))).find(Hello) is not None
    for field in ("identity", "coordinator"):
        stranger = honest.model_copy(update={field: "e" * 64})
        assert answer(stage.client, Envelope((stranger,))).find(Hello) is None
        with pytest.raises(FederationError, match="first join"):
            stage.client.check_refusal()
        stage.client.refusal_letter.unlink()


def test_a_server_that_was_greeted_must_bring_that_charter(tmp_path):
    stage = Stage(tmp_path)
    shutil.rmtree(stage.client.charter)  # a first join
    greeting = Greeting(nonce="a" * 64, identity="b" * 64, coordinator="c" * 64)
    assert answer(stage.client, Envelope((greeting,))).find(Hello) is not None
    stage.publish(0)
    with pytest.raises(FederationError, match="that was greeted"):
        receive_charter(stage.client)


def test_parts_that_nobody_announced_fill_no_disk(stage):
    from molora_fed.federation.messages import Part, PartName

    parts = [Part(PartName(f"{n:064x}", 0, 100), bytes(100)) for n in range(50)]
    answer(stage.client, Envelope((), tuple(parts)))
    assert stage.client.parts.held() == set()


def test_a_result_of_an_earlier_version_is_signed_at_the_start(stage):
    stage.bring_result(0)
    path = stage.server.outbox / "result.json"
    letter = read_json(path)
    earlier = {key: letter[key] for key in ("id", "files", "part_bytes", "summary")}
    write_json(path, earlier)
    sign_kept_result(stage.server, build_charter(), load_key(stage.server.key))
    assert read_json(path) == letter
    for damaged in (b"{", b"[]", b'{"id": 1}'):
        path.write_bytes(damaged)
        sign_kept_result(stage.server, build_charter(), load_key(stage.server.key))
