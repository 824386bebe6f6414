"""Attacks through the open port of a server of members: refused, with a line, without effect.

One server in real processes, TLS, and attackers of every kind at once. Each speaks from an address
of its own below 127.0.0.0/8, so that one's limits are not another's; Linux only.
"""

import datetime
import itertools
import json
import sys
import threading
import time
from base64 import b64encode

import httpx
import psutil
import pytest
from attackers import Crowd, Member, Server, build_head, list_ports
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
from flwr.supercore.date import now
from transport_helpers import FEDERATION_TESTS, Joining, wait_until

from molora_fed.federation import contributor as joining
from molora_fed.federation.acceptance import accept_invitation
from molora_fed.federation.envelopes import Envelope
from molora_fed.federation.homes import ContributorHome
from molora_fed.federation.letters import Acknowledgement, Greeting, State
from molora_fed.federation.members import Members, Redemption, build_redemption_bytes
from molora_fed.federation.messages import Part, PartName
from molora_fed.storage.files import hash_bytes
from molora_fed.storage.keys import build_public_pem, load_key, load_or_make_key, sign

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(sys.platform != "linux", reason="other systems have one loopback address"),
]

MEMORY_LIMIT = 1_024 * 2**20
"""docs/security.md, "A hostile network": what the process on the network takes at most."""
FLEET = "/v1/fleet/"
ADDRESSES = (f"127.0.7.{number}" for number in itertools.count(1))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("attacks") / "server", "tls") as running:
        wait_until((running.home.outbox / "charter.json").exists, what="the charter")
        yield running
        peak = running.measure("VmHWM")
        print(f"the process on the network took {peak / 2**20:.0f} MiB at most")
        assert peak < MEMORY_LIMIT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("members")


@pytest.fixture(scope="module")
def alice(server, folder):
    """Whose name, node, key and signatures others would like to have."""
    member = Member(server, folder, "alice")
    member.node.activate()
    return member


@pytest.fixture(scope="module")
def mallory(server, folder):
    """A member whom nobody should have invited."""
    member = Member(server, folder, "mallory")
    member.node.activate()
    return member


@pytest.fixture
def address():
    return next(ADDRESSES)


def test_keys_that_are_wrong_missing_anothers_or_revoked_open_nothing(
    server, alice, folder, address
):
    nobody = load_or_make_key(folder / "nobody.pem")
    forged = {**alice.sign(key=nobody)}
    own = {**forged, FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(
        build_public_pem(nobody).encode()).decode()}  # fmt: skip
    cases = {"missing": ({}, "Not a member"), "wrong": (own, "Not a member"),
             "another's": (forged, "Invalid SuperNode authentication")}  # fmt: skip
    for headers, reason in cases.values():
        with server.refusing(address, "activate-node", "401", reason):
            sent = dict(content=alice.activation, headers=headers)
            assert server.ask_from(address, FLEET + "activate-node", **sent) == 401

    revoked = Member(server, folder, "revoked")
    revoked.node.activate()
    Members(server.home.members).revoke("revoked")
    with server.refusing(address, "401", "Not a member"):
        sent = dict(content=revoked.activation, headers=revoked.sign())
        assert server.ask_from(address, FLEET + "activate-node", **sent) == 401
    with server.refusing("127.0.0.1", "pull-messages", "401"), pytest.raises(httpx.HTTPError):
        revoked.node.answer_one()


def test_invitations_that_are_used_wrong_expired_or_taken_back_make_no_member(
    server, alice, folder, address
):
    used = server.invite("bob")
    accept_invitation(used, ContributorHome(folder / "bob"))
    expired, taken_back = server.invite("late", days=1e-6), server.invite("unwanted")
    wait_until(lambda: expired.expires <= time.time(), what="its end")
    Members(server.home.members).revoke("unwanted")
    key, node_key = (load_or_make_key(folder / f"thief-{n}.pem") for n in ("key", "node"))
    node = build_public_pem(node_key)

    def redeem(secret, *, contributor=key):
        redemption = Redemption(
            secret=secret, node_key=node, contributor_key=build_public_pem(contributor),
            signature=sign(key, build_redemption_bytes(secret, node)),
        )  # fmt: skip
        return server.ask_from(address, "/v1/invitation", content=redemption.model_dump_json())

    for secret in (used.secret, "a" * 32, expired.secret, taken_back.secret):
        with server.refusing(address, "/v1/invitation", "403", "expected one that is unused"):
            assert redeem(secret) == 403
    stolen = server.invite("carol")
    with server.refusing(address, "/v1/invitation", "403", "Cannot trust invitation"):
        assert redeem(stolen.secret, contributor=load_key(alice.home.key)) == 403
    with server.refusing(address, "/v1/invitation", "422"):
        assert server.ask_from(address, "/v1/invitation", content=b'{"secret": 1}') == 422
    assert not any(secret in server.read_log() for secret in (used.secret, stolen.secret))


def test_a_signed_request_that_is_replayed_late_or_of_another_node_is_refused(
    server, alice, mallory, address
):
    pull = PullMessagesRequest(node=Node(node_id=mallory.node._node.node_id)).SerializeToString()
    headers = mallory.sign()
    assert server.ask_from(address, FLEET + "pull-messages", content=pull, headers=headers) == 200
    for path, content in (("pull-messages", pull), ("activate-node", mallory.activation)):
        with server.refusing(address, path, "401", "A signature is good once"):
            sent = dict(content=content, headers=headers)
            assert server.ask_from(address, FLEET + path, **sent) == 401
    old = mallory.sign(at=now() - datetime.timedelta(minutes=10))
    of_alice = PullMessagesRequest(node=Node(node_id=alice.node._node.node_id))
    for content, headers in ((pull, old), (of_alice.SerializeToString(), mallory.sign())):
        with server.refusing(address, "pull-messages", "401", "Invalid SuperNode"):
            sent = dict(content=content, headers=headers)
            assert server.ask_from(address, FLEET + "pull-messages", **sent) == 401


def test_a_hello_for_another_cooperative_or_of_another_member_lets_nobody_in(
    server, alice, mallory
):
    def relay(owner, **changed):
        return lambda envelope: Envelope(
            (owner.hello(envelope.find(Greeting), **changed), State(phase="JOINING"))
        )

    mallory.node.activate()
    refused = ("message skipped", "an unknown node")
    with server.refusing(*refused, "Cannot trust hello"):
        mallory.talk(relay(mallory, identity="f" * 64))
    for of_alice in (relay(alice), relay(alice, coordinator="f" * 64)):
        with server.refusing(*refused, "member 'mallory'", "expected the key"):
            mallory.talk(of_alice)
    assert "mallory" not in {mailbox.name for mailbox in server.home.contributors()}


def test_a_member_neither_decides_nor_answers_for_another(server, alice, mallory):
    for member in (alice, mallory):
        member.enter()
    forged = Acknowledgement(
        shipment="a" * 64, contribution_id="b" * 64, state="ADMITTED", findings=[], signature="ab"
    )
    with server.refusing("message skipped", "mallory", "Cannot read letters"):
        mallory.talk(lambda envelope: Envelope((forged,)))
    # What the node says it comes from is not what the server goes by.
    own, mallory.node._node = mallory.node._node, alice.node._node
    with (
        server.refusing("127.0.0.1", "pull-messages", "401", "Invalid SuperNode"),
        pytest.raises(httpx.HTTPStatusError),
    ):
        mallory.node.answer_one()
    mallory.node._node = own


def test_bodies_that_are_too_large_endless_or_slow_are_not_taken(server, mallory, address):
    path = FLEET + "push-object"
    with server.refusing(address, path, "413", "Expected at most"):
        length = {"content-length": str(7 * 2**20), **mallory.sign()}
        with server.connect(address) as large:
            large.sendall(build_head(path, length))
            assert b" 413 " in large.recv(1_000)  # before a byte of it came

    def endless():
        while True:
            yield bytes(2**16)

    with server.refusing(address, path, "413", "Expected at most"):
        assert server.ask_from(address, path, content=endless(), headers=mallory.sign()) in (413, 0)
    with server.refusing(address, path, "401", "Not a member"):
        assert server.ask_from(address, path, content=endless()) in (401, 0)
    with (
        server.refusing(address, "Closed: no whole request within 10 s"),
        server.refusing(address, "/v1/invitation", "408", "Too slow"),
        server.refusing(address, "Closed: no TLS handshake within 10 s"),
        server.connect(address) as head,
        server.connect(address) as body,
        server.connect(address, tls=False) as silent,
    ):
        head.sendall(b"POST /v1/invitation HTTP/1.1\r\nhost: 127.0.0.1\r\nx-slow: ")
        body.sendall(build_head("/v1/invitation", {"content-length": "100"}) + b"{")
        assert b" 408 " in body.recv(1_000)
        assert head.recv(1_000) == b"" and silent.recv(1_000) == b""


def test_a_flood_of_refusals_fills_no_log_and_hides_nobody_elses(server, address):
    before = len(server.read_log())
    codes = {server.ask_from(address, "/v1/control/start-run%1b%5b2J") for _ in range(60)}
    assert codes == {404, 429}
    with server.refusing(other := next(ADDRESSES), "404", "Not served"):
        assert server.ask_from(other, "/docs") == 404
    lines = map(json.loads, server.read_log()[before:].splitlines())
    told = [line["path"] for line in lines if line.get("address") == address]
    assert 20 <= len(told) <= 40  # in one minute, or two
    assert "\x1b" not in "".join(told)


def test_a_member_gets_through_a_thousand_connections_held_open(
    server, folder, address, monkeypatch
):
    monkeypatch.setattr(joining, "WORKER_MODULE", "fake_worker")
    monkeypatch.setenv("PYTHONPATH", str(FEDERATION_TESTS))
    home = ContributorHome(folder / "dora")
    accept_invitation(server.invite("dora"), home)
    quiet = server.measure("VmRSS")
    with Crowd(server, address, with_tls=200) as crowd, Joining(home, "dora") as dora:
        wait_until(lambda: home.read_acknowledgement(), seconds=180, what="the acknowledgement")
        assert home.read_acknowledgement().state == "ADMITTED" and not dora.errors
        assert crowd.num_opened >= 1_000
        crowded = server.measure("VmRSS")
        print(f"{quiet / 2**20:.0f} MiB without a crowd, {crowded / 2**20:.0f} MiB with it")
        # No process of either side listens anywhere but on the server's own port.
        assert list_ports(psutil.Process()) == {server.port}
    lines = [line for line in server.read_log().splitlines() if address in line]
    assert any(json.loads(line)["reason"].startswith("Closed") for line in lines)


def test_the_largest_that_a_member_may_send_stays_within_the_limit(server, mallory):
    blobs = [bytes([number]) * 2**22 for number in range(15)]  # 60 MiB
    parts = tuple(Part(PartName(hash_bytes(blob), 0, len(blob)), blob) for blob in blobs)
    before, quiet = server.list_effects(), server.measure("VmRSS")
    mallory.enter()
    mallory.talk(lambda envelope: Envelope((State(phase="JOINING"),), parts))
    # And as many bodies at once as are let through, all of them nonsense.
    address, path, body = next(ADDRESSES), FLEET + "push-object", bytes(6 * 2**20)
    codes = []
    threads = [
        threading.Thread(
            target=lambda: codes.append(
                server.ask_from(address, path, content=body, headers=mallory.sign())
            )
        )
        for _ in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not [code for code in codes if code == 200]
    changed = {
        path.name for path, data in server.list_effects().items() if before.get(path) != data
    }
    assert changed <= {"state.json", "hello.json"}
    print(f"{quiet / 2**20:.0f} MiB before, {server.measure('VmHWM') / 2**20:.0f} MiB at most")
