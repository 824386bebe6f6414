"""Who may say hello, under which name, and what strangers may take of the server."""

import hashlib
import json
import os
import time
from types import SimpleNamespace

import pytest
from flwr.app import ConfigRecord, RecordDict
from hostile import PART_BYTES, Node, count_rounds, open_coordinator, relay, state

from molora_fed.federation import server_app, strangers
from molora_fed.federation.coordinator_mail import acknowledge, complete_deliveries
from molora_fed.federation.server_dialogue import RemoteContributor
from molora_fed.storage.files import canonical_json, write_json
from molora_fed.storage.keys import load_key, sign


def run(carrier, rounds=4):
    for _ in range(rounds):
        carrier._round()


def get_refusals(node):
    return [letter["body"]["reason"] for letter in node.heard if letter["kind"] == "refusal"]


def go_away(path, seconds):
    """Let what this file tells of have been the last for so long."""
    then = time.time() - seconds
    if path.exists():
        os.utime(path, (then, then))


class Uploader:
    """Offers a file, sends the parts that are asked for, up to `most` bytes."""

    def __init__(self, home, data, most=10**9):
        self.home, self.data, self.most, self.sent = home, data, most, 0
        self.claimed = None

    @property
    def files(self):
        sha = hashlib.sha256(self.data).hexdigest()
        size = self.claimed or len(self.data)
        return [{"name": "adapter.bin", "sha256": sha, "num_bytes": size}]

    def __call__(self, letters):
        from molora_fed.federation.messages import parse_shipment

        charter = json.loads((self.home.outbox / "charter.json").read_bytes())
        parts = {}
        for letter in letters:
            for name in letter["body"].get("names", ()) if letter["kind"] == "fetch" else ():
                sha, offset, length = name.split("-")
                data = self.data[int(offset) : int(offset) + int(length)]
                if sha == hashlib.sha256(self.data).hexdigest() and self.sent < self.most:
                    parts[name] = data
                    self.sent += len(data)
        base = parse_shipment(charter["base"]).id
        said = state(phase="SUBMITTED", charter=charter["id"], tasks=["train-0"], received=[base])
        return [{"kind": "manifest", "body": {"files": self.files}}, *said], parts


def admit_all(home):
    for delivery in list(complete_deliveries(home, part_bytes=PART_BYTES)):
        acknowledge(
            delivery, load_key(home.key), contribution_id="c", state="ADMITTED", findings=[],
            part_bytes=PART_BYTES,
        )  # fmt: skip


@pytest.fixture
def home(tmp_path):
    return open_coordinator(tmp_path / "server")


def answer_hello(carrier, remote, body):
    """What the relay does with a hello from a node."""
    node = server_app._Node(remote)
    text = json.dumps([{"kind": "hello", "body": body}])
    content = RecordDict({"letters": ConfigRecord({"version": 1, "json": text})})
    carrier._accept(node, SimpleNamespace(content=content, has_error=lambda: False))


@pytest.mark.parametrize("changed", ["identity", "coordinator", "name", "domain", "node"])
def test_a_hello_is_good_for_one_cooperative_coordinator_name_and_node(home, changed):
    victim, carrier = Node(1, count_rounds()), relay(home)
    remote = RemoteContributor(node_key="another node's" if changed == "node" else None)
    greeting = carrier._dialogue.next_envelope(remote).letters[0].to_json()
    relayed = {**greeting, changed: "f" * 64} if changed in greeting else greeting
    body = victim.hello(relayed)["body"]
    if changed in body:
        body[changed] = "thief"
    answer_hello(carrier, remote, body)
    assert remote.fingerprint == "" and home.contributors() == []
    # The same, unchanged, is let in.
    remote = RemoteContributor()
    greeting = carrier._dialogue.next_envelope(remote).letters[0].to_json()
    answer_hello(carrier, remote, victim.hello(greeting)["body"])
    assert remote.fingerprint == victim.fingerprint


def test_a_hello_may_name_the_node_it_comes_from(home):
    node, carrier = Node(1, count_rounds()), relay(home)
    remote = RemoteContributor(node_key="the node's key")
    greeting = carrier._dialogue.next_envelope(remote).letters[0].to_json()
    signed = {"purpose": "molora-hello-2", **greeting, "name": node.name, "domain": "python"}
    signed["node_key"] = "the node's key"
    body = {**node.hello(greeting)["body"], "node_key": "the node's key"}
    body["signature"] = sign(node.key, canonical_json(signed))
    answer_hello(carrier, remote, body)
    assert remote.fingerprint == node.fingerprint


def test_the_hello_of_an_earlier_version_is_refused_with_the_fix(home):
    node = Node(1, lambda letters: state(refused=True))

    def hello(greeting):
        return Node.hello(node, {"nonce": greeting["nonce"]})

    node.hello = hello
    run(relay(home, node))
    (reason,) = set(get_refusals(node))
    assert "Install the same molora-fed version" in reason
    assert home.contributors() == []


def test_strangers_are_limited_in_number(home):
    write_json(home.outbox / "limits.json", {"contribution_bytes": 1_000, "strangers": 5})
    nodes = [Node(number, count_rounds()) for number in range(1, 21)]
    carrier = relay(home, *nodes)
    run(carrier)
    assert len(home.contributors()) == 5
    assert sum("try again later" in r.lower() for n in nodes[5:] for r in get_refusals(n)[:1]) == 15
    # Who stays away loses its place to somebody who is here.
    go_away(home.contributor(nodes[0].fingerprint).hello_file, 3_600)
    newcomer = Node(50, count_rounds())
    run(relay(home, newcomer))
    assert not home.contributor(nodes[0].fingerprint).folder.exists()
    assert home.contributor(newcomer.fingerprint).folder.exists()


def test_the_name_of_a_stranger_that_stays_away_is_free_again(home):
    first, second = Node(1, count_rounds(), "alpha"), Node(2, count_rounds(), "alpha")
    run(relay(home, first))
    run(relay(home, second))
    assert "name nobody else has" in get_refusals(second)[0]
    assert len(home.contributors()) == 1  # a refused key leaves nothing
    go_away(home.contributor(first.fingerprint).hello_file, 25 * 3_600)
    second.heard.clear()
    run(relay(home, second))
    assert get_refusals(second) == []
    assert [one.name for one in home.contributors()] == ["alpha"]


def test_a_name_is_bound_to_its_key_once_that_is_admitted(home):
    first = Node(1, Uploader(home, b"adapter"), "alpha")
    carrier = relay(home, first)
    run(carrier)
    admit_all(home)
    first.name = "beta"  # the same key goes by another name now
    run(relay(home, first))
    go_away(home.contributor(first.fingerprint).hello_file, 100 * 3_600)
    thief, other = Node(2, count_rounds(), "alpha"), Node(3, count_rounds(), "gamma")
    run(relay(home, thief, other))
    assert "name nobody else has" in get_refusals(thief)[0] and get_refusals(other) == []
    assert home.contributor(first.fingerprint).folder.exists()


def test_parts_of_a_changed_offer_are_deleted(home):
    upload = Uploader(home, bytes(PART_BYTES * 4))
    node = Node(1, upload)
    carrier = relay(home, node)
    mailbox = home.contributor(node.fingerprint)
    for number in range(1, 6):
        upload.data = bytes([number]) * (PART_BYTES * 4)
        upload.sent, upload.most = 0, PART_BYTES
        run(carrier, 7)
        assert 0 < mailbox.parts.num_bytes <= PART_BYTES * 4
    upload.claimed = 2**40  # more than the charter allows
    run(carrier, 2)
    assert mailbox.parts.held() == set()
    assert "at most" in get_refusals(node)[0]


def test_uploads_of_strangers_together_are_limited(home):
    size = PART_BYTES * 2
    limits = {"contribution_bytes": size, "strangers": 100}
    write_json(home.outbox / "limits.json", limits)
    nodes = [Node(n, Uploader(home, bytes([n]) * size, most=1)) for n in range(1, 13)]
    run(relay(home, *nodes), 8)
    mailboxes = [home.contributor(node.fingerprint) for node in nodes]
    held = [mailbox.parts.num_bytes for mailbox in mailboxes]
    assert sum(held) <= strangers.UPLOADS * size
    begun = [bool(num_bytes) for num_bytes in held]
    assert sum(begun) == strangers.UPLOADS
    # What is sent no further makes room for the others.
    for mailbox in mailboxes:
        go_away(mailbox.folder / "parts", 3_600)
    waiting = [node for node, has_begun in zip(nodes, begun, strict=True) if not has_begun]
    for node in waiting:
        node.speak.most = 10**9
    carrier = relay(home, *waiting)
    for _ in range(8):
        run(carrier, 2)
        admit_all(home)
    assert len(list(home.mail.glob("contributors/*/names.json"))) == len(waiting)


def test_answers_to_failed_attempts_do_not_pile_up(home):
    upload = Uploader(home, b"")
    node = Node(1, upload)
    carrier = relay(home, node)
    mailbox = home.contributor(node.fingerprint)
    for number in range(40):
        upload.data = b"attempt %d" % number
        run(carrier, 3)
        for delivery in list(complete_deliveries(home, part_bytes=PART_BYTES)):
            acknowledge(
                delivery, load_key(home.key), contribution_id="", state="REJECTED",
                findings=["no"], part_bytes=PART_BYTES,
            )  # fmt: skip
    assert 0 < len(mailbox.list_acknowledgements()) <= 32
    assert mailbox.parts.held() == set()
