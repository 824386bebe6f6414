"""`molora coop invite`, `members` and `revoke`: a line to hand on, and who has used it."""

import shutil

import pytest

from molora_fed.federation.homes import CoordinatorHome
from molora_fed.federation.invitations import keep_address, parse_invitation


@pytest.fixture
def place(setup, tmp_path):
    shutil.copytree(setup.cooperative, tmp_path / "coop")
    return tmp_path / "coop"


def test_an_invitation_is_the_only_line_on_standard_output(molora, place):
    ran = molora("coop", "invite", place, "--name", "alice", "--domain", "abc")
    assert ran.code == 0, ran.err
    (line,) = ran.out.splitlines()
    invitation = parse_invitation(line)
    assert (invitation.name, invitation.domain) == ("alice", "abc")
    assert invitation.server == "127.0.0.1:8080"
    assert invitation.secret not in ran.err and "good once, until" in ran.err
    assert place.stat().st_mode & 0o077 == 0

    listed = molora("coop", "members", place)
    assert [line.split()[:3] for line in listed.out.splitlines()[1:]] == [
        ["alice", "abc", "invited"]
    ]
    assert molora("coop", "revoke", place, "alice").code == 0
    assert len(molora("coop", "members", place).out.splitlines()) == 1


def test_an_invitation_names_the_address_that_is_served(molora, place):
    assert keep_address(CoordinatorHome(place), "fed.example:9000", 8080) == ("fed.example",)
    assert keep_address(CoordinatorHome(place), "", 8080) == ("fed.example",)
    ran = molora("coop", "invite", place, "--name", "alice", "--domain", "abc")
    assert parse_invitation(ran.out).server == "fed.example:9000"
    ran = molora(
        "coop", "invite", place, "--name", "bob", "--domain", "abc", "--address", "[::1]:1"
    )
    assert parse_invitation(ran.out).server == "[::1]:1"
