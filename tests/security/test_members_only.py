"""A server of members over TLS, in real processes: invited, connected, turned away."""

import ssl
import sys
from dataclasses import replace

import httpx
import pytest
from transport_helpers import (
    CLOSED_PATHS,
    FEDERATION_TESTS,
    Detour,
    Joining,
    StandInServer,
    wait_until,
)

from molora_fed.errors import ConfigError, FederationError, ServerUnreachableError
from molora_fed.federation import contributor as joining
from molora_fed.federation.acceptance import accept_invitation, read_connection
from molora_fed.federation.homes import ContributorHome
from molora_fed.federation.invitations import make_invitation
from molora_fed.federation.members import Members
from molora_fed.federation.messages import describe_folder

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with StandInServer(tmp_path_factory.mktemp("members") / "server", "tls") as running:
        wait_until((running.home.outbox / "charter.json").exists, what="the charter")
        yield running


@pytest.fixture
def invite(server):
    def make(name):
        return make_invitation(
            server.home, name, "python", days=1, server=f"127.0.0.1:{server.port}"
        )

    return make


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    monkeypatch.setattr(joining, "WORKER_MODULE", "fake_worker")
    monkeypatch.setenv("PYTHONPATH", str(FEDERATION_TESTS))


@pytest.mark.parametrize(("method", "path"), CLOSED_PATHS)
def test_a_stranger_finds_invitations_and_the_fleet_only(server, method, path):
    assert server.ask(method, path) in (404, 429)


def test_only_tls_1_3_and_only_the_invitations_authority(server):
    authority = str(server.home.root / "tls" / "authority.pem")
    old = ssl.create_default_context(cafile=authority)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    for context in (old, ssl.create_default_context()):
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health", verify=context)
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://127.0.0.1:{server.port}/health")


def test_an_invited_contributor_gets_all_the_way_in(server, invite, tmp_path):
    home = ContributorHome(tmp_path / "alice")
    invitation = invite("alice")
    accept_invitation(invitation, home)
    accept_invitation(invitation, home)  # again: nothing happens
    members = Members(server.home.members)
    assert [member.name for member in members.list_members()] == ["alice"]
    assert {path.stat().st_mode & 0o077 for path in (home.key, home.node_key, home.root)} == {0}
    with Joining(home, "alice") as alice:
        alice.thread.join(timeout=120)
        assert alice.answers and alice.answers[0]["state"] == "ADMITTED", alice.errors
        sent = describe_folder(home.contribution)
        assert describe_folder(server.home.root / "received" / "alice") == sent

    # The processes on the network: what they hold is in no command line and no environment.
    link = server.processes()["link"]
    shown = " ".join([*link.cmdline(), *link.environ().values()])
    assert invitation.secret not in shown and "PRIVATE" not in shown
    logs = [*server.home.logs.iterdir(), *home.logs.iterdir()]
    for log in logs:
        text = log.read_text(errors="replace")
        assert invitation.secret not in text and "PRIVATE KEY" not in text
        assert "not confined" not in text or sys.platform != "linux"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have one loopback address")
def test_a_member_comes_back_from_another_address_as_who_it_was(server, invite, tmp_path):
    home = ContributorHome(tmp_path / "erin")
    accept_invitation(invite("erin"), home)

    def find_mailboxes():
        return [mailbox for mailbox in server.home.contributors() if mailbox.name == "erin"]

    for address, is_far_enough in (
        ("127.0.8.1", find_mailboxes),  # in the middle of its work
        ("127.0.8.2", home.read_acknowledgement),
    ):
        with (
            Detour(server.port, address) as detour,
            Joining(home, "erin", server=f"127.0.0.1:{detour.port}") as erin,
        ):
            wait_until(is_far_enough, seconds=120, what=f"its work from {address}")
        assert not erin.errors
    assert home.read_acknowledgement().state == "ADMITTED"
    (mailbox,) = find_mailboxes()
    assert len(mailbox.list_acknowledgements()) == 1
    assert [each.name for each in Members(server.home.members).list_members()].count("erin") == 1
    sent = describe_folder(home.contribution)
    assert describe_folder(server.home.root / "received" / "erin") == sent


def test_a_revoked_member_is_out_at_once(server, invite, tmp_path):
    home = ContributorHome(tmp_path / "dave")
    accept_invitation(invite("dave"), home)
    with Joining(home, "dave") as dave:
        wait_until(
            lambda: "dave" in {mailbox.name for mailbox in server.home.contributors()},
            what="the hello",
        )
        Members(server.home.members).revoke("dave")
        dave.thread.join(timeout=60)
        assert "expected to be a member" in str(dave.errors[0])


def test_a_member_takes_neither_another_name_nor_another_domain(server, invite, tmp_path):
    home = ContributorHome(tmp_path / "bob")
    accept_invitation(invite("bob"), home)
    with Joining(home, "alice2", "python") as liar:
        log = server.home.logs / "link.log"
        wait_until(lambda: "expected the name bob" in log.read_text(), what="the refusal")
        assert not liar.answers
    assert "alice2" not in {mailbox.name for mailbox in server.home.contributors()}


def test_an_invitation_to_another_server_gives_its_secret_to_nobody(server, invite, tmp_path):
    invitation = invite("carol")
    for wrong in (
        replace(invitation, authority="0" * 64),
        replace(invitation, charter="0" * 64),
        replace(invitation, coordinator="0" * 64),
        replace(invitation, secret="a" * 32),
    ):
        home = ContributorHome(tmp_path / wrong.charter[:4] / wrong.authority[:4] / wrong.secret)
        with pytest.raises((FederationError, ServerUnreachableError)) as failed:
            accept_invitation(wrong, home)
        assert "\n" not in str(failed.value) and read_connection(home) is None
    # With the wrong authority nothing but the question for it was sent.
    home = ContributorHome(tmp_path / "carol")
    with pytest.raises(ConfigError):
        make_invitation(server.home, "bad name", "python", days=1, server="x:1")
    assert home.connection_file.exists() is False


def test_a_thousand_silent_connections_disturb_nobody(server):
    import socket

    silent = []
    try:
        for _ in range(1_000):
            silent.append(socket.create_connection(("127.0.0.1", server.port)))
        assert server.ask("GET", "/health") == 200
        wait_until(lambda: server.ask("GET", "/health") == 200, what="an answer")
    finally:
        for each in silent:
            each.close()
