"""Flower's fleet interface behind the gateway: nodes speak for themselves, replies come whole."""

import contextlib

import httpx
import pytest
from fastapi import HTTPException
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.serde import message_from_proto
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.superlink.routers.fleet import node_auth
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from transport_helpers import serving

from molora_fed.federation.envelopes import Envelope
from molora_fed.federation.flower import node as nodes
from molora_fed.federation.flower.fleet import GOOD_SECONDS, _Once, build_fleet_app
from molora_fed.federation.flower.grid import LinkGrid, build_state_factory
from molora_fed.federation.flower.node import FleetNode
from molora_fed.federation.letters import Refusal, State
from molora_fed.federation.messages import Part, PartName
from molora_fed.federation.wire import pack_envelope, unpack_envelope
from molora_fed.serving.connections import Doorkeeper
from molora_fed.storage.files import hash_bytes
from molora_fed.storage.keys import build_public_pem, load_or_make_key


class Fleet:
    """A server in this process, and nodes that reach it."""

    def __init__(self, folder):
        self.folder = folder
        self.members = set()
        factory = build_state_factory()
        self.state = factory.state()
        self.grid = LinkGrid(self.state, lambda key: key in self.members)
        self.app = build_fleet_app(factory)
        self.port = 0

    def add(self, name, answer=lambda envelope: envelope):
        """An active node; `answer` is what becomes of its envelopes."""
        key = load_or_make_key(self.folder / f"{name}.pem")
        client = FleetHttpClient.from_server_address(
            f"127.0.0.1:{self.port}",
            True,
            None,
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(key, key.public_key()),
            ],
        )
        self.members.add(build_public_pem(key))
        node = FleetNode(client, build_public_pem(key), answer, _Stop())
        node.activate()
        return node

    def send(self, node, text="hello"):
        envelope = Envelope((Refusal(reason=text),), _parts(3))
        message = Message(pack_envelope(envelope), node._node.node_id, "query", ttl=60.0)
        (message_id,) = self.grid.push_messages([message])
        return message_id


class _Stop:
    def wait(self, seconds):
        return True


def _parts(count):
    blobs = [bytes([number]) * 1_000 for number in range(count)]
    return tuple(Part(PartName(hash_bytes(blob), 0, len(blob)), blob) for blob in blobs)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    fleet = Fleet(tmp_path_factory.mktemp("nodes"))
    with serving(fleet.app, Doorkeeper()) as fleet.port:
        yield fleet


@pytest.fixture
def fleet(served):
    """The server without nodes; those of other tests are no members any more."""
    served.members.clear()
    assert served.grid.get_nodes() == []
    return served


def test_an_envelope_goes_to_its_node_and_comes_back(fleet):
    alice, bob = fleet.add("alice"), fleet.add("bob")
    asked = fleet.send(alice)
    assert not bob.answer_one()
    assert fleet.grid.pull_messages([asked]) == []
    assert alice.answer_one()
    (reply,) = fleet.grid.pull_messages([asked])
    envelope = unpack_envelope(reply.content, sender="server")
    assert envelope.find(Refusal) == Refusal(reason="hello") and envelope.parts == _parts(3)
    assert reply.metadata.reply_to_message_id == asked
    # Nothing stays behind in the server's memory.
    assert len(fleet.state.object_store) == 0 and fleet.state.num_message_res() == 0


def test_a_reply_is_taken_although_its_node_has_gone(fleet):
    alice = fleet.add("alice")
    asked = fleet.send(alice)
    alice.answer_one()
    alice.deactivate()
    assert len(fleet.grid.pull_messages([asked])) == 1
    assert fleet.grid.get_nodes() == []


def test_a_reply_half_sent_waits_and_keeps_nobody_else_waiting(fleet):
    own = Envelope((State(phase="JOINING"),), _parts(9)[4:])
    alice, bob = fleet.add("alice", lambda envelope: own), fleet.add("bob")
    asked = [fleet.send(alice), fleet.send(bob)]
    push = alice._client.PushObject
    sent = []

    def break_off(request):
        if len(sent) == 2:
            raise httpx.HTTPStatusError("", request=None, response=httpx.Response(400))
        sent.append(request)
        return push(request)

    alice._client.PushObject = break_off
    with contextlib.suppress(httpx.HTTPStatusError):
        alice.answer_one()
    bob.answer_one()
    (reply,) = fleet.grid.pull_messages(asked)
    assert reply.metadata.reply_to_message_id == asked[1]
    # The next message takes the place of the broken one, and of all it left.
    again = fleet.send(alice)
    alice._client.PushObject = push
    alice.answer_one()
    assert len(fleet.grid.pull_messages([again])) == 1
    assert len(fleet.state.object_store) == 0


def test_a_malformed_reply_is_an_error_of_its_node_alone(fleet, monkeypatch):
    alice, bob = fleet.add("alice"), fleet.add("bob")
    asked = [fleet.send(alice), fleet.send(bob)]
    bad = RecordDict({"letters": ConfigRecord({"version": 1, "json": "[" * 5_000})})
    monkeypatch.setattr(nodes, "pack_envelope", lambda envelope: bad)
    alice.answer_one()
    monkeypatch.undo()
    bob.answer_one()
    replies = {r.metadata.reply_to_message_id: r for r in fleet.grid.pull_messages(asked)}
    assert unpack_envelope(replies[asked[1]].content, sender="server").find(Refusal)
    with pytest.raises(Exception, match="Cannot read a message"):
        unpack_envelope(replies[asked[0]].content, sender="server")


def test_bytes_that_flower_cannot_read_are_an_error_not_an_exception(fleet, monkeypatch):
    alice = fleet.add("alice")
    asked = fleet.send(alice)
    alice.answer_one()
    monkeypatch.setattr(
        "molora_fed.federation.flower.grid.inflate_object_from_contents",
        lambda *args: (_ for _ in ()).throw(RecursionError("\x1b[2J" + "x" * 10_000)),
    )
    (reply,) = fleet.grid.pull_messages([asked])
    assert reply.has_error() and len(reply.error.reason) <= 200 and "\x1b" not in reply.error.reason
    assert len(fleet.state.object_store) == 0


def test_nobody_answers_in_anothers_name(fleet):
    alice, mallory = fleet.add("alice"), fleet.add("mallory")
    asked = fleet.send(alice)
    mallory._node, own = alice._node, mallory._node
    with pytest.raises(httpx.HTTPStatusError) as refused:
        mallory.answer_one()  # cannot even fetch what is alice's
    assert refused.value.response.status_code == 401
    mallory._node = own
    message = alice._insist(lambda: alice._client.PullMessages(_pull(alice))).messages_list[0]
    forged = Message(pack_envelope(Envelope()), reply_to=message_from_proto(message))
    with pytest.raises(httpx.HTTPStatusError) as refused:
        mallory._push(forged)
    assert refused.value.response.status_code == 403
    assert fleet.grid.pull_messages([asked]) == []


def _pull(node):
    return PullMessagesRequest(node=node._node)


def test_an_answer_comes_once(fleet):
    alice = fleet.add("alice")
    asked = fleet.send(alice)
    pushed = []
    push = alice._push
    alice._push = lambda reply: pushed.append(reply) or push(reply)
    alice.answer_one()
    assert len(fleet.grid.pull_messages([asked])) == 1
    push(pushed[0])  # said again: nobody asked, so nothing is kept
    assert fleet.grid.pull_messages([asked]) == [] and len(fleet.state.object_store) == 0


def test_who_is_no_member_any_more_gets_no_mail(fleet):
    alice = fleet.add("alice")
    assert len(fleet.grid.get_nodes()) == 1
    fleet.send(alice)
    fleet.members.clear()
    assert fleet.grid.get_nodes() == [] and len(fleet.state.object_store) == 0


def test_a_node_that_was_killed_comes_back_at_once_with_its_id(fleet):
    alice = fleet.add("alice")
    (before,) = fleet.grid.get_nodes()
    first, since = before.node_id, before.last_activated_at
    again = fleet.add("alice")
    (after,) = fleet.grid.get_nodes()
    assert (after.node_id, again._node.node_id) == (first, alice._node.node_id)
    assert after.last_activated_at != since  # the relay sees another process, and starts anew


def test_a_request_without_the_keys_signature_is_refused(fleet):
    alice = fleet.add("alice")
    alice._client._interceptors = ()
    with pytest.raises(httpx.HTTPStatusError) as refused:
        alice.answer_one()
    assert refused.value.response.status_code == 401


def test_a_signature_is_good_once(fleet):
    alice = fleet.add("alice")
    fleet.send(alice)
    replayed = []

    class Replay:
        """Sends every request twice."""

        def intercept(self, context, call_next):
            answer = call_next(context)
            replayed.append(call_next(context).status_code)
            return answer

    alice._client._interceptors = (*alice._client._interceptors, Replay())
    alice.answer_one()
    assert len(replayed) > 3 and set(replayed) == {401}


def test_what_is_known_of_used_signatures_is_bounded():
    once = _Once()
    once._MOST = 100
    for second in range(60):
        for key in ("alice", "bob"):
            once.use(key, f"2026-01-01T00:00:{second:02d}+00:00")
    assert len(once._used) == 100
    with pytest.raises(HTTPException):  # the same moment, written otherwise
        once.use("alice", "2026-01-01T01:00:59.000000+01:00")


def test_what_a_server_sends_beyond_measure_is_not_taken(fleet, monkeypatch):
    alice = fleet.add("alice")
    asked = fleet.send(alice)
    monkeypatch.setattr(nodes, "MAX_MESSAGE_BYTES", 2_000)
    assert alice.answer_one()
    (reply,) = fleet.grid.pull_messages([asked])
    assert reply.error.reason == "not answered"
    fleet.send(alice, "again")
    monkeypatch.setattr(nodes, "MAX_OBJECTS", 2)
    assert alice.answer_one()


def test_the_run_never_ends_and_no_token_is_left(fleet):
    assert not fleet.state.task_token_store and not fleet.state.task_token_to_task_id


def test_a_used_signature_is_remembered_for_as_long_as_any_is_taken():
    """By what Flower's check goes by here, which allows clocks to be further ahead than its own."""
    earliest = node_auth.SYSTEM_TIME_TOLERANCE
    latest = node_auth.TIMESTAMP_TOLERANCE + node_auth.SYSTEM_TIME_TOLERANCE
    assert earliest + latest <= GOOD_SECONDS
