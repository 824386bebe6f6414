"""A whole two-contributor federation through real Flower processes, real training and fusing."""

import json
import random

import psutil
import pytest
from process_helpers import find_processes

from molora_fed.charter import Amendment, CorpusRules, PrivacyRules, SampleRules, TrainingRules
from molora_fed.contributions.states import ContributionState, CooperativeState
from molora_fed.cooperative.cooperative import create_cooperative
from molora_fed.corpus.prepare import load_corpus
from molora_fed.federation.homes import ContributorHome
from molora_fed.federation.join_settings import JoinSettings
from molora_fed.federation.local import LocalContributor, run_local
from molora_fed.federation.messages import describe_folder
from molora_fed.models.base import load_base
from molora_fed.routing.bundle import load_fused
from molora_fed.training.adapter_job import load_specialist
from molora_fed.training.specialists import train_specialist
from molora_fed.types import Split

pytestmark = pytest.mark.processes

STEPS = 400
TRAINING = TrainingRules(
    kind="lora", rank=4, steps=STEPS, batch=4, validate_every=50, patience=100, learning_rate=1e-2
)
WORDS = {"alpha": ("ka", "lo", "mi", "nu"), "beta": ("zz", "xx", "yy", "ww")}


def write_text(folder, domain):
    """Documents in which one of a few words follows another at random."""
    draw = random.Random(domain)
    folder.mkdir(parents=True)
    for number in range(60):
        words = (draw.choice(WORDS[domain]) + str(draw.randrange(10)) for _ in range(150))
        (folder / f"{number}.txt").write_text(" ".join(words))
    return folder


def build_members(root):
    return [
        LocalContributor(
            root / domain,
            JoinSettings(f"{domain}-1", domain, (write_text(root / "text" / domain, domain),)),
        )
        for domain in WORDS
    ]


def kill_worker(home):
    """SIGKILL the contributor's worker, and say whether there was one."""
    for process in find_processes(home):
        if "molora_fed.federation.worker" in process.cmdline():
            process.kill()
            return True
    return False


def test_two_contributors_train_submit_and_get_the_fused_model(stage_root, tiny_checkpoint):
    base = load_base(tiny_checkpoint("gpt_neox"))
    amendment = Amendment(
        domains=tuple(WORDS),
        expected=2,
        training=TRAINING,
        samples=SampleRules(calibration=8, admission=4, held_out=8),
    )
    cooperative = create_cooperative(
        stage_root / "server", "test", base, corpus=CorpusRules(block_size=32),
        amendment=amendment, privacy=PrivacyRules(mode="pooled"),
    )  # fmt: skip
    members = build_members(stage_root)
    events, killed = [], []

    def watch(event):
        events.append(event)
        in_training = event.phase == "TRAINING" and event.contributor == "alpha-1"
        if in_training and not killed and (event.step or 0) >= 50:
            killed.append(event.step if kill_worker(stage_root / "alpha") else None)

    answers = run_local(cooperative.folder, members, watch, threads=1)

    # Killed in mid-training, started again, and the bytes are those of an undisturbed run.
    assert killed and killed[0] is not None and killed[0] < STEPS
    assert any("signal 9" in e.message and e.problem for e in events)
    home = ContributorHome(stage_root / "alpha")
    (training,) = home.training.iterdir()
    corpus = load_corpus(home.corpus)
    undisturbed = train_specialist(
        base, corpus.blocks[Split.TRAIN], corpus.blocks[Split.VALIDATION], kind="lora",
        rules=cooperative.charter.identity.adapters, training=TRAINING, seed=amendment.seed,
        threads=1, folder=stage_root / "undisturbed",
    )  # fmt: skip
    assert load_specialist(training).record == undisturbed.record
    sent = describe_folder(home.contribution / "adapter")
    assert describe_folder(undisturbed.adapter_folder) == sent

    # The ledger holds what was acknowledged; forecasts were written down and scored.
    assert {name: answer["state"] for name, answer in answers.items()} == {
        "alpha-1": "ADMITTED", "beta-1": "ADMITTED",
    }  # fmt: skip
    with cooperative.read_ledger() as ledger:
        entries = ledger.contributions(ContributionState.ADMITTED)
        assert ledger.cooperative_state == CooperativeState.PUBLISHED
        records = ledger.records("forecast")
    assert {entry.id for entry in entries} == {a["contribution_id"] for a in answers.values()}
    assert records and all(record.outcome is not None for record in records)

    # Every contributor has the same fused model, on the base it received itself.
    for member in members:
        fused = load_fused(member.home / "result" / "fused")
        assert [expert.name for expert in fused.experts[1:]] == [e.contributor for e in entries]
        assert load_base(member.home / "base").weights == base.weights
        report = json.loads((member.home / "result" / "report" / "report.json").read_text())
        assert report == json.loads((cooperative.folder / "result.json").read_text())
        assert set(report["losses"]["specialists"]) == {"alpha-1", "beta-1"}
        mine = describe_folder(member.home / "contribution" / "adapter").files
        received = describe_folder(
            member.home / "result" / "fused" / "adapters" / member.settings.name
        )
        hashes = {entry.sha256 for entry in received.files}
        assert {e.sha256 for e in mine if e.name.endswith(".safetensors")} <= hashes

    # What left a contributor's machine: the adapter, the counted samples, manifest, signature.
    names = {entry.name for entry in describe_folder(home.contribution).files}
    assert {name.split("/")[0] for name in names} == {
        "adapter", "samples", "manifest.json", "signature",
    }  # fmt: skip
    assert not [p for p in find_processes(stage_root) if p.status() != psutil.STATUS_ZOMBIE]
