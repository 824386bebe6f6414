"""Simulated contributors: whose home is whose, what a pool takes, a whole federation of three."""

import json
import os
import random
import tempfile
from pathlib import Path

import pytest
from page_helpers import find_blocks, read_page
from process_helpers import find_processes, wait_until

from molora_fed.charter import (
    Amendment,
    CorpusRules,
    FusionRules,
    PrivacyRules,
    SampleRules,
    TrainingRules,
)
from molora_fed.contributions.states import ContributionState
from molora_fed.cooperative.cooperative import create_cooperative
from molora_fed.errors import ConfigError, CorpusError, FederationError
from molora_fed.federation import pool_worker
from molora_fed.federation.envelopes import parse_letter
from molora_fed.federation.fleet import PARTITIONS, find_own_home, write_partitions
from molora_fed.federation.homes import (
    HOLD_SECONDS,
    ContributorHome,
    hold_seconds,
)
from molora_fed.federation.join_settings import JoinSettings
from molora_fed.federation.letters import Task
from molora_fed.federation.local import LocalContributor
from molora_fed.federation.mailbox import read_json
from molora_fed.federation.pool_worker import PoolWorker
from molora_fed.federation.simulation import SimulationSupervisor, run_simulated
from molora_fed.federation.status import UsageFile, measure_peak_bytes
from molora_fed.models.base import load_base
from molora_fed.routing.bundle import load_fused
from molora_fed.storage.files import write_json


def test_a_partition_id_names_a_home(tmp_path, monkeypatch):
    homes = [tmp_path / name for name in ("a", "b")]
    write_partitions(tmp_path / "partitions.json", homes)
    monkeypatch.setenv(PARTITIONS, str(tmp_path / "partitions.json"))
    assert [find_own_home({"partition-id": number}) for number in (0, 1)] == homes
    assert find_own_home({"partition-id": 2}) is None  # has not joined yet
    write_json(tmp_path / "partitions.json", {})
    with pytest.raises(FederationError, match="Cannot read partitions"):
        find_own_home({"partition-id": 0})


@pytest.mark.parametrize("text", ["-1", "26", "soon", ""])
def test_how_long_answers_are_held_back_is_checked(monkeypatch, text):
    monkeypatch.setenv(HOLD_SECONDS, text)
    with pytest.raises(ConfigError, match=HOLD_SECONDS):
        hold_seconds()


def test_a_name_or_a_home_comes_once(tmp_path):
    one = LocalContributor(tmp_path / "a", JoinSettings("a", "alpha"))
    for other in (
        LocalContributor(tmp_path / "b", JoinSettings("a", "beta")),
        LocalContributor(tmp_path / "a", JoinSettings("b", "beta")),
    ):
        with pytest.raises(ConfigError, match="more than once"):
            run_simulated(tmp_path / "server", [one, other])


def test_cost_is_summed_over_restarts_and_nested_stages_count_once(tmp_path, monkeypatch):
    clock = iter([0.0, 1.0, 4.0, 9.0])
    usage = UsageFile(tmp_path / "usage.json")
    usage.add("outer", 2.0)
    again = UsageFile(tmp_path / "usage.json")
    monkeypatch.setattr("molora_fed.federation.status.time.process_time", lambda: next(clock))
    with again.stage("outer"), again.stage("inner"):
        pass
    kept = json.loads((tmp_path / "usage.json").read_text())
    assert kept["seconds"] == {"outer": 2.0 + 6.0, "inner": 3.0}
    assert 0 < kept["peak_bytes"] <= measure_peak_bytes()


class Steps:
    """Stands for a contributor's worker; `arrive` lets the next step be done."""

    def __init__(self, home, plugins):
        self.home = home

    def steps(self):
        while not (self.home.root / "trained").exists():
            yield
        if (self.home.root / "bad").exists():
            raise CorpusError("Cannot prepare domain: expected text, got none. Add some.")
        write_json(self.home.offer_file, {})
        while not (self.home.root / "result").exists():
            yield
        write_json(self.home.state_file, {"phase": "DONE", "message": ""})


@pytest.fixture
def homes(tmp_path, monkeypatch):
    monkeypatch.setattr(pool_worker, "ContributorWorker", Steps)
    homes = [ContributorHome(tmp_path / str(number)) for number in range(4)]
    for home in homes[:3]:
        home.keep_task(parse_letter(Task, {"id": "train-0", "kind": "train"}, what="a task"))
    return homes


@pytest.fixture
def partitions(homes, tmp_path):
    write_partitions(tmp_path / "partitions.json", [home.root for home in homes])
    return tmp_path / "partitions.json"


def holds(worker):
    return sorted(int(path.name) for path in worker._held)


def test_a_pool_shares_the_contributors_that_have_a_task(homes, partitions):
    one, two = (PoolWorker(partitions, None) for _ in range(2))
    one.look()
    two.look()
    one.look()
    # Each works for one; the third waits, and the fourth has no task yet.
    assert (holds(one), holds(two)) == ([0], [1])
    (homes[0].root / "trained").touch()
    one.look()
    assert holds(one) == [0, 2]
    (homes[0].root / "result").touch()
    one.look()
    two.look()
    # Done means done: nobody takes it again.
    assert (holds(one), holds(two)) == ([2], [1])


def test_bad_news_of_one_contributor_leaves_the_others_alone(homes, partitions):
    (homes[0].root / "trained").touch()
    (homes[0].root / "bad").touch()
    worker = PoolWorker(partitions, None)
    worker.look()
    assert read_json(homes[0].error_file)["type"] == "CorpusError"
    worker.look()
    assert holds(worker) == [1]


def test_what_a_killed_worker_had_goes_to_another(homes, partitions):
    write_partitions(partitions, [homes[0].root])
    one, two = (PoolWorker(partitions, None) for _ in range(2))
    one.look()
    two.look()
    assert holds(two) == []
    one._held[homes[0].root].lock.__exit__(None, None, None)  # as the system does for a dead one
    two.look()
    assert holds(two) == [0]


DOMAINS = ("alpha", "beta", "gamma")


def write_text(folder, domain):
    draw = random.Random(domain)
    letters = draw.sample("abcdefghijklmnopqrstuvwxyz", 4)
    folder.mkdir(parents=True)
    for number in range(60):
        words = (draw.choice(letters) * 2 + str(draw.randrange(10)) for _ in range(150))
        (folder / f"{number}.txt").write_text(" ".join(words))
    return folder


def find_pool(root):
    return [p for p in find_processes(root) if pool_worker.__name__ in p.cmdline()]


@pytest.mark.processes
def test_two_simulated_contributors_fuse_and_a_third_joins_them(
    stage_root, tiny_checkpoint, monkeypatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    short = Path(tempfile.mkdtemp(prefix="ml"))  # the paths of Ray's sockets must be short
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    cooperative = create_cooperative(
        stage_root / "server", "test", load_base(tiny_checkpoint("gpt_neox")),
        corpus=CorpusRules(block_size=32),
        privacy=PrivacyRules(mode="pooled"),
        amendment=Amendment(
            domains=DOMAINS,
            expected=2,
            training=TrainingRules(
                kind="lora", rank=4, steps=30, validate_every=10, learning_rate=1e-2
            ),
            samples=SampleRules(calibration=8, admission=4, held_out=8),
            fusion=FusionRules(compare=()),
        ),
    )  # fmt: skip
    members = [
        LocalContributor(
            stage_root / domain,
            JoinSettings(domain, domain, (write_text(stage_root / "text" / domain, domain),)),
        )
        for domain in DOMAINS
    ]
    events, killed = [], []

    def watch(event):
        events.append(event)
        if event.phase == "TRAINING" and event.contributor and not killed:
            killed.extend(find_pool(stage_root)[:1])
            killed[0].kill()

    left = Path(tempfile.mkdtemp(prefix="molora-"))  # as by a simulation that was killed
    write_json(cooperative.folder / "mail" / "scratch.json", {"folder": str(left)})
    supervisor = SimulationSupervisor(
        cooperative.folder, members[:2], watch, workers=2, threads=1, reserve=1
    )
    with supervisor:
        wait_until(
            lambda: supervisor.poll() or supervisor.is_finished, what="the fused model", seconds=180
        )
        first = read_json(cooperative.folder / "mail" / "outbox" / "result.json")
        # Two have published; the third joins while the server runs.
        supervisor.join(members[2])
        with pytest.raises(ConfigError, match="expected a free node of 3"):
            supervisor.join(LocalContributor(stage_root / "delta", JoinSettings("delta", "beta")))
        wait_until(
            lambda: supervisor.poll() or supervisor.is_finished, what="the grown model", seconds=180
        )
    outcome = supervisor.outcome

    assert any(e.problem and "started again" in e.message for e in events)
    assert {n: a["state"] for n, a in outcome.acknowledgements.items()} == dict.fromkeys(
        DOMAINS, "ADMITTED"
    )
    assert outcome.mail_seconds > 0
    with cooperative.read_ledger() as ledger:
        entries = ledger.contributions(ContributionState.ADMITTED)
    assert len(first["summary"]["contributions"]) == 2
    for member, count in zip(members, (2, 2, 3), strict=True):
        experts = load_fused(member.home / "result" / "fused").experts[1:]
        assert len(experts) == count and member.settings.name in [expert.name for expert in experts]
    assert [expert.name for expert in experts] == [entry.contributor for entry in entries]
    # Who paid for what: corpora and training by contributor, admission and fusion by coordinator.
    assert {"admission", "fusion"} <= set(read_json(cooperative.folder / "usage.json")["seconds"])
    for member in members:
        assert {"corpus", "training"} <= set(read_json(member.home / "usage.json")["seconds"])
    wait_until(lambda: not find_processes(stage_root), seconds=10, what="the end of all processes")
    assert os.listdir(short) == []
    short.rmdir()


@pytest.mark.processes
def test_the_code_of_the_page(stage_root, tiny_checkpoint, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MOLORA_CACHE", str(stage_root / "cache"))
    monkeypatch.chdir(stage_root)
    create_cooperative(
        Path("my-cooperative"), "my-cooperative", load_base(tiny_checkpoint("gpt_neox")),
        corpus=CorpusRules(block_size=32),
        privacy=PrivacyRules(mode="pooled"),
        amendment=Amendment(
            expected=3,
            training=TrainingRules(kind="lora", rank=4, steps=4),
            samples=SampleRules(calibration=8, admission=4, held_out=8),
            fusion=FusionRules(compare=()),
        ),
    )  # fmt: skip
    (code,) = find_blocks(read_page("federation.md"), "python")
    namespace = {}
    exec(code, namespace)
    states = {a["state"] for a in namespace["outcome"].acknowledgements.values()}
    assert states <= {"ADMITTED", "REJECTED"} and len(namespace["members"]) == 3
