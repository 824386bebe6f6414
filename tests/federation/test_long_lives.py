"""Long and broken lives: late joiners, stragglers, restarts at bad moments, and coming back."""

import contextlib
import os
import time

import pytest
from test_workers import Stage, take_turns, texts  # noqa: F401 (fixtures)

from molora_fed.contributions.states import ContributionState
from molora_fed.errors import AdmissionError
from molora_fed.federation import coordinator
from molora_fed.federation.homes import ContributorHome, ContributorMailbox
from molora_fed.federation.join_settings import prepare_home
from molora_fed.federation.mailbox import read_json
from molora_fed.federation.messages import describe_folder
from molora_fed.federation.server_dialogue import RemoteContributor
from molora_fed.federation.strangers import find_refusal
from molora_fed.federation.withdrawal import withdraw_contributor
from molora_fed.storage.files import write_json


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@contextlib.contextmanager
def killing(monkeypatch, name, *, after=False):
    """The coordinator's worker dies once, before or after it calls a function of its module."""
    call = getattr(coordinator, name)

    def die(*args, **options):
        if after:
            call(*args, **options)
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(coordinator, name, die)
        yield


def list_admitted(stage):
    with stage.cooperative.read_ledger() as ledger:
        found = ledger.contributions(ContributionState.ADMITTED)
    return [entry.contributor for entry in found]


def read_fused(stage):
    """Ids of the contributions in the published result."""
    return read_json(stage.server.outbox / "result.json")["summary"]["contributions"]


def come_back(stage, name, domain, texts):  # noqa: F811
    """`molora join` once more: the same home, another connection."""
    home = ContributorHome(stage.root / name)
    prepare_home(home, home.read_settings())
    return stage.join(name, domain, texts)


class Reached(Exception):
    """The moment that a test waits for."""


def run_until(stage, is_there):
    """Carry letters until something is true, which is not that everybody has ended."""

    def look():
        if is_there():
            raise Reached

    with pytest.raises(Reached):
        stage.run(meddle=look)


def is_in(home):
    return home.read_state().get("phase") == "ADMITTED"


def test_without_a_quorum_the_deadline_fuses_nothing_and_says_what_is_missing(
    tmp_path,
    tiny_checkpoint,
    texts,  # noqa: F811
):
    stage = Stage(tmp_path, tiny_checkpoint("gpt_neox"), expected=3, deadline_seconds=0.01)
    alpha = stage.join("alpha-1", "alpha", texts)
    run_until(stage, lambda: is_in(alpha) and "more" in stage.server.read_state()["message"])
    assert list_admitted(stage) == ["alpha-1"] and stage.failures == {}
    assert read_json(stage.server.outbox / "result.json") is None
    assert stage.server.read_state()["message"] == (
        "1 of 3 contributions admitted; the deadline has passed, and the quorum is 2: "
        "waiting for 1 more"
    )

    # The second makes the quorum: both are fused, and the third is not waited for.
    stage.join("beta-1", "beta", texts)
    stage.run()
    assert stage.failures == {} and len(read_fused(stage)) == 2
    before = read_json(alpha.result_letter)["id"]
    stage.members.clear()  # done: their commands have ended

    # A straggler's upload, long after the deadline, is taken, and fused into the next result.
    gamma = stage.join("gamma-1", "gamma", texts)
    stage.run()
    assert stage.failures == {} and len(read_fused(stage)) == 3

    # Those who were done come back for the new one; nobody trains or is counted anew.
    come_back(stage, "alpha-1", "alpha", texts)
    stage.run()
    after = read_json(alpha.result_letter)
    assert after["id"] != before and after["summary"]["contributions"] == read_fused(stage)
    assert describe_folder(alpha.result / "fused") == describe_folder(gamma.result / "fused")
    assert len(list_admitted(stage)) == 3


@pytest.mark.parametrize(
    ("moment", "after"), [("acknowledge", False), ("acknowledge", True)], ids=["before", "after"]
)
def test_a_server_killed_around_an_acknowledgement_counts_nobody_twice(
    tmp_path,
    tiny_checkpoint,
    texts,  # noqa: F811
    monkeypatch,
    moment,
    after,
):
    stage = Stage(tmp_path, tiny_checkpoint("gpt_neox"), expected=2)
    stage.join("alpha-1", "alpha", texts)
    with killing(monkeypatch, moment, after=after):
        stage.run()
    assert list_admitted(stage) == ["alpha-1"]  # committed, acknowledged or not
    stage.join("beta-1", "beta", texts)
    stage.run()  # a new worker, on the same folders
    assert stage.failures == {}
    assert sorted(list_admitted(stage)) == ["alpha-1", "beta-1"]
    assert len(set(read_fused(stage))) == len(read_fused(stage)) == 2
    with stage.cooperative.read_ledger() as ledger:
        assert len(ledger.contributions()) == 2
    for mailbox in stage.server.contributors():
        assert len(mailbox.list_acknowledgements()) == 1 and mailbox.parts.held() == set()


def test_who_is_withdrawn_while_it_waits_is_told_and_waits_no_longer(
    tmp_path,
    tiny_checkpoint,
    texts,  # noqa: F811
):
    stage = Stage(tmp_path, tiny_checkpoint("gpt_neox"), expected=3)
    alpha = stage.join("alpha-1", "alpha", texts)
    run_until(stage, lambda: is_in(alpha))
    withdraw_contributor(stage.cooperative, "alpha-1")
    stage.run()
    error = stage.failures.pop("alpha-1")
    assert isinstance(error, AdmissionError) and "WITHDRAWN" in str(error)


def test_one_that_was_admitted_keeps_its_place_however_long_it_is_away(
    tmp_path,
    tiny_checkpoint,
    texts,  # noqa: F811
):
    stage = Stage(tmp_path, tiny_checkpoint("gpt_neox"), expected=2)
    home = stage.join("alpha-1", "alpha", texts)
    run_until(stage, lambda: is_in(home))
    (mailbox,) = stage.server.contributors()
    for path in (mailbox.hello_file, mailbox.folder):
        long_ago = time.time() - 400 * 86_400
        os.utime(path, (long_ago, long_ago))

    # All places of strangers are taken by others; and its name is asked for.
    write_json(stage.server.outbox / "limits.json", {"contribution_bytes": 2**30, "strangers": 1})
    stranger = ContributorMailbox(mailbox.folder.with_name("f" * 64))
    write_json(stranger.hello_file, {**read_json(mailbox.hello_file), "name": "other"})
    assert "at most 1" in find_refusal(stage.server, "e" * 64, "newcomer")
    assert "name nobody else has" in find_refusal(stage.server, "e" * 64, "alpha-1")
    assert mailbox.folder.is_dir()

    # It comes back over another connection, and is who it was.
    remote = RemoteContributor()
    stage.members = {"alpha-1": (home, stage.members["alpha-1"][1], remote)}
    stage.join("beta-1", "beta", texts)
    write_json(stage.server.outbox / "limits.json", {"contribution_bytes": 2**30})
    stage.run()
    assert stage.failures == {} and remote.fingerprint == mailbox.fingerprint
    assert len(read_fused(stage)) == 2
