"""Invitations: used once, in time, by whom they name; and members who are turned away."""

import json

import pytest

from molora_fed.charter import parse_charter
from molora_fed.errors import ConfigError, FederationError, SignatureError
from molora_fed.federation.acceptance import follow_server, read_connection
from molora_fed.federation.coordinator_mail import publish_charter
from molora_fed.federation.gateway import Refusal
from molora_fed.federation.homes import ContributorHome
from molora_fed.federation.invitations import Invitation, answer_redemption, parse_invitation
from molora_fed.federation.members import Members, Redemption, build_redemption_bytes
from molora_fed.storage.files import write_json
from molora_fed.storage.keys import build_public_pem, load_or_make_key, sign


class Clock:
    def __init__(self):
        self.now = 1_800_000_000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def members(tmp_path, clock):
    return Members(tmp_path / "members", clock)


@pytest.fixture
def make_redemption(tmp_path):
    def make(secret, who="alice", signer=None):
        key = load_or_make_key(tmp_path / f"{who}.pem")
        node = build_public_pem(load_or_make_key(tmp_path / f"{who}-node.pem"))
        signing = load_or_make_key(tmp_path / f"{signer or who}.pem")
        return Redemption(
            secret=secret,
            node_key=node,
            contributor_key=build_public_pem(key),
            signature=sign(signing, build_redemption_bytes(secret, node)),
        )

    return make


def test_an_invitation_makes_one_member_with_the_name_in_it(members, make_redemption):
    secret, _ = members.invite("alice", "legal", days=7)
    member = members.redeem(make_redemption(secret))
    assert (member.name, member.domain) == ("alice", "legal")
    assert members.find(member.node_key) == member
    # Its answer may be lost: the same user asks again, nobody else.
    assert members.redeem(make_redemption(secret)) == member
    with pytest.raises(FederationError, match="unused"):
        members.redeem(make_redemption(secret, "mallory"))
    assert [each.name for each in members.list_members()] == ["alice"]
    assert members.list_invitations() == []


def test_an_invitation_expires(members, make_redemption, clock):
    secret, expires = members.invite("alice", "legal", days=2)
    assert expires == int(clock.now) + 2 * 86_400
    clock.now = expires
    with pytest.raises(FederationError, match="expired"):
        members.redeem(make_redemption(secret))
    assert members.list_invitations() == []
    members.invite("bob", "legal", days=1)
    assert len(list((members._folder / "invitations").iterdir())) == 1  # what has expired is gone


def test_a_guess_learns_nothing(members, make_redemption):
    members.invite("alice", "legal", days=1)
    for guess in ("", "x", "../../members", "a" * 128):
        with pytest.raises((FederationError, ValueError)) as failed:
            members.redeem(make_redemption(guess))
        assert "alice" not in str(failed.value)


def test_nobody_joins_with_anothers_contributor_key(members, make_redemption):
    secret, _ = members.invite("alice", "legal", days=1)
    with pytest.raises(SignatureError):
        members.redeem(make_redemption(secret, "alice", signer="mallory"))
    members.redeem(make_redemption(secret))


def test_a_signature_for_one_invitation_is_none_for_another(members, make_redemption):
    first, _ = members.invite("alice", "legal", days=1)
    second, _ = members.invite("bob", "legal", days=1)
    signed = make_redemption(first)
    with pytest.raises(SignatureError):
        members.redeem(signed.model_copy(update={"secret": second}))


def test_a_revoked_member_is_none_at_once_and_its_key_never_again(members, make_redemption):
    secret, _ = members.invite("alice", "legal", days=1)
    member = members.redeem(make_redemption(secret))
    watching = Members(members._folder)  # as the server's process does
    assert watching.find(member.node_key)
    members.revoke("alice")
    assert watching.find(member.node_key) is None
    with pytest.raises(FederationError):
        members.redeem(make_redemption(secret))
    again, _ = members.invite("alice", "legal", days=1)
    with pytest.raises(FederationError):
        members.redeem(make_redemption(again))
    assert members.redeem(make_redemption(again, "alice2")).name == "alice"


def test_revoking_takes_an_invitation_back(members, make_redemption):
    secret, _ = members.invite("alice", "legal", days=1)
    assert members.revoke("alice") == 1
    with pytest.raises(FederationError):
        members.redeem(make_redemption(secret))
    with pytest.raises(ConfigError, match="Members are: nobody"):
        members.revoke("alice")


def test_two_invitations_of_one_name_make_one_member(members, make_redemption):
    secrets = [members.invite("alice", "legal", days=1)[0] for _ in range(2)]
    members.redeem(make_redemption(secrets[0]))
    with pytest.raises(FederationError):
        members.redeem(make_redemption(secrets[1], "mallory"))
    with pytest.raises(ConfigError, match="no member has"):
        members.invite("alice", "legal", days=1)


def test_a_damaged_file_is_nobody_and_ends_nothing(members, make_redemption):
    secret, _ = members.invite("alice", "legal", days=1)
    member = members.redeem(make_redemption(secret))
    for name, text in (("a", "{"), ("b", "[" * 5_000), ("c", "1" * 9_000), ("d", '{"name": 1}')):
        (members._folder / f"{name}.json").write_text(text)
        (members._folder / "invitations" / f"{name}.json").write_text(text)
    assert members.find(member.node_key) == member
    assert members.list_invitations() == []
    assert members.revoke("alice") == 1


def test_secrets_lie_as_hashes_and_for_the_owner_only(members):
    secret, _ = members.invite("alice", "legal", days=1)
    (path,) = (members._folder / "invitations").iterdir()
    assert secret not in path.read_text() and secret not in path.name
    assert path.stat().st_mode & 0o077 == 0
    assert path.parent.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("days", [0, -1, float("nan"), float("inf"), 366])
def test_an_invitation_lasts_a_year_at_most(members, days):
    with pytest.raises(ConfigError, match="days"):
        members.invite("alice", "legal", days=days)


INVITATION = Invitation(
    server="fed.example:8080", authority="a" * 64, charter="b" * 64, coordinator="c" * 64,
    secret="s3cret-s3cret", name="alice", domain="legal", expires=1_800_000_000,
)  # fmt: skip


def test_an_invitation_is_one_line_and_reads_back():
    line = str(INVITATION)
    assert line.startswith("molora1.") and len(line.split()) == 1 and len(line) < 700
    assert parse_invitation(f"  {line[:80]}\n{line[80:]}\n") == INVITATION
    assert INVITATION.secret not in repr(INVITATION) and INVITATION.secret not in line


def change(**values):
    from dataclasses import replace

    return str(replace(INVITATION, **values))


@pytest.mark.parametrize(
    "text",
    [
        "", "molora1", "molora1..", "molora1.e30.00000000", str(INVITATION)[:-1],
        str(INVITATION).replace("molora1", "molora2"), "molora1." + "x" * 10_000,
        change(name="../x"), change(authority="A" * 64), change(charter="b"), change(expires=True),
        change(expires=2**70), change(domain=""), change(server=7),
        change(server="fed.example:1/x?"), change(server="user@fed.example:1"), change(server="x"),
    ],
)  # fmt: skip
def test_another_line_is_refused_in_one_line(text):
    with pytest.raises(ConfigError) as failed:
        parse_invitation(text)
    assert "\n" not in str(failed.value)


@pytest.fixture
def home(tmp_path):
    from transport_helpers import make_cooperative

    home = make_cooperative(tmp_path / "home")
    charter = parse_charter(home.charter.read_text(), where="test")
    publish_charter(home, charter, load_or_make_key(home.key), part_bytes=1_000)
    return home


def test_the_authority_is_given_to_everybody_and_the_charter_to_members(
    home, members, make_redemption
):
    assert answer_redemption(b"{}", members, home, "PEM") == {"authority": "PEM"}
    secret, _ = members.invite("alice", "legal", days=1)
    body = make_redemption(secret).model_dump_json().encode()
    answer = answer_redemption(body, members, home, "PEM")
    assert answer["charter"]["text"] == home.charter.read_text() and answer["name"] == "alice"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"null", b"{", b'{"secret": 1}', b"[" * 4_000, b'{"secret": "x"}',
        json.dumps({"secret": "x" * 200, "node_key": "", "contributor_key": "", "signature": ""}),
        json.dumps({"secret": "\ud800", "node_key": "", "contributor_key": "", "signature": ""}),
        json.dumps({"secret": "x", "node_key": "x", "contributor_key": "x", "signature": "x"}),
        json.dumps({"secret": "x", "node_key": 10**400, "contributor_key": "", "signature": ""}),
    ],
)  # fmt: skip
def test_whatever_a_stranger_sends_is_refused_shortly(home, members, body):
    body = body if isinstance(body, bytes) else body.encode()
    with pytest.raises(Refusal) as refused:
        answer_redemption(body, members, home, "PEM")
    assert refused.value.status in (403, 422) and len(refused.value.reason) < 401


def test_before_the_charter_is_published_an_invitation_is_not_used_up(
    home, members, make_redemption
):
    secret, _ = members.invite("alice", "legal", days=1)
    letter = home.outbox / "charter.json"
    kept = letter.read_bytes()
    letter.unlink()
    body = make_redemption(secret).model_dump_json().encode()
    with pytest.raises(Refusal) as refused:
        answer_redemption(body, members, home, "PEM")
    assert refused.value.status == 503
    letter.write_bytes(kept)
    assert answer_redemption(body, members, home, "PEM")["name"] == "alice"


def test_a_member_follows_the_server_to_another_address(tmp_path):
    home = ContributorHome(tmp_path / "alice")
    home.root.mkdir()
    with pytest.raises(ConfigError, match="invitation"):
        follow_server(home, "new.example.org")
    kept = {"invitation": "0" * 64, "name": "alice", "domain": "legal"}
    write_json(home.connection_file, {"server": "old.example.org:8443", **kept})
    assert follow_server(home, "new.example.org").server == "new.example.org:8443"
    assert follow_server(home, "[::1]:9000").server == "[::1]:9000"
    moved = read_connection(home)
    assert (moved.server, moved.name, moved.invitation) == ("[::1]:9000", "alice", "0" * 64)
    with pytest.raises(ConfigError):
        follow_server(home, "new.example.org:port")
    assert read_connection(home) == moved
