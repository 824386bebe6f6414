"""What the faults found in the product, mended by class: clocks, certificates, lost answers."""

import datetime
import json
import resource
import time
from pathlib import Path

import httpx
import pytest
from faults import write_expired
from flwr.app import Message
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supernode import node_auth_http_interceptor
from flwr.supernode.fleet_http_client import FleetHttpClient
from transport_helpers import make_cooperative, serving

from molora_fed.errors import FederationError, StorageError
from molora_fed.federation import certificates
from molora_fed.federation.certificates import ServerCertificate
from molora_fed.federation.contributor import FAREWELL_SECONDS, ContributorSupervisor
from molora_fed.federation.envelopes import Envelope
from molora_fed.federation.fleet import NOT_A_MEMBER, WRONG_CLOCK
from molora_fed.federation.flower.fleet import AHEAD_SECONDS, build_fleet_app
from molora_fed.federation.flower.grid import LinkGrid, build_state_factory
from molora_fed.federation.flower.node import FleetNode, _find_status
from molora_fed.federation.join_settings import JoinSettings
from molora_fed.federation.letters import Refusal
from molora_fed.federation.server import STALE_SECONDS, ServerSupervisor
from molora_fed.federation.supervise import raise_recorded
from molora_fed.federation.wire import pack_envelope
from molora_fed.serving.addresses import find_trouble
from molora_fed.serving.connections import Doorkeeper
from molora_fed.storage.keys import build_public_pem, load_or_make_key


class _Stop:
    def wait(self, seconds):
        return True


@pytest.fixture
def served():
    """Flower's tables behind their interface, the grid, and a port."""
    factory = build_state_factory()
    grid = LinkGrid(factory.state(), lambda key: True)
    with serving(build_fleet_app(factory), Doorkeeper()) as port:
        yield grid, port


@pytest.fixture
def node(served, tmp_path):
    key = load_or_make_key(tmp_path / "node.pem")
    client = FleetHttpClient.from_server_address(
        f"127.0.0.1:{served[1]}",
        True,
        None,
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperNode"),
            node_auth_http_interceptor.NodeAuthHttpInterceptor(key, key.public_key()),
        ],
    )
    return FleetNode(client, build_public_pem(key), lambda envelope: envelope, _Stop())


def test_a_message_whose_answer_was_lost_on_the_way_is_given_again(served, node):
    grid, _ = served
    node.activate()
    (asked,) = _send(grid, node)
    pull, lost = node._client.PullMessages, []

    def lose_first(request):
        answer = pull(request)
        if not lost:
            lost.append(len(answer.messages_list))
            raise httpx.ReadError("cut")
        return answer

    node._client.PullMessages = lose_first
    with pytest.raises(KeyboardInterrupt):  # it would try again, but was stopped
        node.answer_one()
    assert lost == [1]
    assert node.answer_one() and len(grid.pull_messages([asked])) == 1
    assert not node.answer_one()  # once replied to, it is not given again


def _send(grid, node):
    content = pack_envelope(Envelope((Refusal(reason="hello"),)))
    return grid.push_messages([Message(content, node._node.node_id, "query", ttl=60.0)])


def test_a_reply_whose_session_another_began_anew_comes_whole(served, node):
    grid, _ = served
    node.activate()
    asked = _send(grid, node)
    push, pieces, times = node._client.PushMessages, node._client.PushObject, []

    def repeat(piece):
        if len(times) == 1:  # the network says it once more, when its pieces are half here
            push(times[0])
        return pieces(piece)

    node._client.PushMessages = lambda request: times.append(request) or push(request)
    node._client.PushObject = repeat
    assert node.answer_one()
    assert len(times) == 2 and len(grid.pull_messages(asked)) == 1


def test_a_message_that_was_dropped_is_an_error_at_once(served, node):
    grid, _ = served
    node.activate()
    asked = _send(grid, node)
    assert grid.pull_messages(asked) == []
    grid._state.delete_messages(set(asked))
    (reply,) = grid.pull_messages(asked)
    assert "dropped" in reply.error.reason and reply.metadata.reply_to_message_id == asked[0]
    assert not node.answer_one()


def test_a_worker_that_could_not_even_say_that_the_disk_is_full(tmp_path):
    with pytest.raises(StorageError, match="Free some space"):
        raise_recorded(tmp_path / "error.json", code=StorageError.exit_code, otherwise="?")
    with pytest.raises(FederationError, match="unknown"):
        raise_recorded(tmp_path / "error.json", code=1, otherwise="unknown")
    assert not (tmp_path / "error.json").exists()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))
    try:
        with pytest.raises(StorageError, match="Free some space"):
            raise_recorded(tmp_path / "error.json", code=1, otherwise="unknown")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("ahead", "is_taken"), [(AHEAD_SECONDS - 20, True), (3_600, False), (-3_600, False)]
)
def test_a_clock_that_is_off_is_told_from_a_key_that_is_no_members(
    node, monkeypatch, ahead, is_taken
):
    shifted = datetime.timedelta(seconds=ahead)
    now = node_auth_http_interceptor.now
    monkeypatch.setattr(node_auth_http_interceptor, "now", lambda: now() + shifted)
    if is_taken:
        node.activate()
        return
    with pytest.raises(httpx.HTTPStatusError) as refused:
        node.activate()
    assert _find_status(refused.value.response) == WRONG_CLOCK
    gateways = httpx.Response(401, json={"detail": "Not a member"})
    assert _find_status(gateways) == NOT_A_MEMBER


def test_a_certificate_made_while_the_clock_was_ahead_is_made_again(tmp_path, monkeypatch):
    certificate = ServerCertificate(tmp_path)

    class Ahead(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return super().now(tz) + datetime.timedelta(days=200)

    certificate.prepare_authority()
    with monkeypatch.context() as patch:
        patch.setattr(certificates.datetime, "datetime", Ahead)
        certificate.prepare(["a"])
    first = Path(certificate.paths[0]).read_bytes()
    certificate.prepare(["a"])
    assert Path(certificate.paths[0]).read_bytes() != first


def test_an_expired_certificate_is_named_and_made_again(tmp_path):
    async def answer(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    certificate = ServerCertificate(tmp_path)
    for makes_it, expected in ((certificate.prepare, ""), (_expire(tmp_path), "check both clocks")):
        makes_it(["127.0.0.1"])
        with serving(answer, Doorkeeper(), certificate.paths) as port:
            trouble = find_trouble("127.0.0.1", port, certificate.authority_file)
        assert expected in trouble and bool(trouble) == bool(expected)
    expired = Path(certificate.paths[0]).read_bytes()
    certificate.prepare(["127.0.0.1"])
    assert Path(certificate.paths[0]).read_bytes() != expired


def _expire(home):
    return lambda names: write_expired(home)


@pytest.fixture
def supervisor(tmp_path):
    """A supervisor of a server that was not started."""
    home = make_cooperative(tmp_path / "server")
    supervisor = ServerSupervisor(home.root, 1, lambda event: None, names=())
    home.pulse.prepare()
    return supervisor


def test_a_clock_that_was_set_renews_certificates_at_once(supervisor, monkeypatch):
    supervisor._certify()
    assert supervisor._is_certified()
    real = time.time
    for step in (-86_400.0, 86_400.0):
        monkeypatch.setattr(time, "time", lambda step=step: real() + step)
        assert not supervisor._is_certified()


def test_a_clock_that_was_set_is_no_silence_of_the_mail(supervisor, monkeypatch):
    warned = []
    monkeypatch.setattr(supervisor, "_warn", warned.append)
    monkeypatch.setattr(supervisor._processes, "exit_code", lambda name: None)
    monkeypatch.setattr(supervisor._processes, "stop", lambda *names, **more: None)
    monkeypatch.setattr(supervisor, "_start_link", lambda: None)
    now = [10_000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    supervisor._started = now[0] - 1_000.0
    for pulse in range(3):  # it beats, with times an hour and more away from this clock's
        now[0] += STALE_SECONDS - 1.0
        supervisor.home.pulse.post(json.dumps({"pid": 1, "time": time.time() - 9_999.0 * pulse}))
        supervisor._watch_link()
    assert warned == []
    now[0] += STALE_SECONDS + 1.0
    supervisor._watch_link()
    assert len(warned) == 1


@pytest.mark.parametrize(("code", "ends"), [(14, True), (0, False)])
def test_a_worker_that_failed_ends_the_command_though_answers_never_pause(
    tmp_path, monkeypatch, code, ends
):
    supervisor = ContributorSupervisor(
        "127.0.0.1:1", tmp_path, JoinSettings("a", "b"), print, consent=lambda charter: True
    )
    monkeypatch.setattr(supervisor._processes, "exit_code", lambda name: code)
    now = [10_000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    supervisor._worker_ended = now[0]
    assert not supervisor._has_failed()
    now[0] += FAREWELL_SECONDS
    assert supervisor._has_failed() == ends
