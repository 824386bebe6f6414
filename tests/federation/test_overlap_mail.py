"""Held-out blocks that lie in another's train text are left out, though nobody shows any text."""

import json

import pytest
from stage_helpers import PLUGINS, TRAINING, Stage, write_shared

from molora_fed.charter import Amendment, FusionRules, PrivacyRules, SampleRules
from molora_fed.contributions.contributed import Contributed
from molora_fed.contributions.manifest import load_contribution
from molora_fed.corpus.blocks import load_blocks
from molora_fed.federation.coordinator import CoordinatorWorker
from molora_fed.federation.overlap_answers import OverlapAnswers
from molora_fed.federation.overlap_carrier import OverlapCarrier
from molora_fed.federation.overlap_letters import QUERY, SET
from molora_fed.federation.worker import ContributorWorker
from molora_fed.fusion.held_out import compare_held_out
from molora_fed.models.base import load_base
from molora_fed.privacy.overlap import open_receiver
from molora_fed.reporting.overlap import describe_overlap
from molora_fed.types import Split

pytestmark = pytest.mark.processes

RULES = FusionRules(router="evidence-zero", compare=(), merges=())
AMENDMENT = Amendment(
    expected=3, training=TRAINING, fusion=RULES,
    samples=SampleRules(calibration=24, admission=4, held_out=24),
)  # fmt: skip
NAMES = ("alpha", "beta", "gamma")


def build_stage(root, checkpoint, summing="masked"):
    write_shared(root, NAMES)
    privacy = PrivacyRules(mode="private", summing=summing)
    return Stage(root, checkpoint, AMENDMENT, block_size=64, privacy=privacy)


def read_overlap(root):
    return json.loads((root / "server" / "report" / "report.json").read_text())["overlap"]


def compare_pooled(root, checkpoint):
    """What a pooled fusion of the same texts leaves out."""
    samples, pooled = AMENDMENT.samples, []
    for name in NAMES:
        corpus = root / name / "corpus"
        blocks = {split: load_blocks(corpus / f"{split}.safetensors") for split in Split}
        pooled.append(
            Contributed(
                id=name,
                contributor=f"{name}-1",
                domain=name,
                adapter=corpus,
                held_out=blocks[Split.HELD_OUT].take(samples.held_out),
                calibration=blocks[Split.CALIBRATION].take(samples.calibration),
                train_text=corpus,
            )
        )
    return compare_held_out(pooled, load_base(checkpoint)).to_json()


class Killed(BaseException):
    """Nothing catches it."""


def test_what_is_left_out_is_what_a_pooled_fusion_leaves_out(tmp_path, tiny_checkpoint):
    checkpoint = tiny_checkpoint("gpt_neox")
    begun_anew = []

    def kill(homes, steps):
        """Begin a contributor's process anew after each of its answers."""
        for name, home in homes.items():
            if name in steps and (home.private / "fusion").is_dir():
                begun_anew.append(name)
                steps[name] = ContributorWorker(home, PLUGINS).steps()

    build_stage(tmp_path, checkpoint, "robust").run(*NAMES, watch=kill)
    found = read_overlap(tmp_path)
    assert found == compare_pooled(tmp_path, checkpoint) and len(begun_anew) > 9
    assert found["compared"]["train"] == [f"{name}-1" for name in NAMES]
    domains = found["domains"]
    assert 0 < domains["alpha"]["left_out"] < domains["alpha"]["blocks"]
    assert domains["beta"]["left_out"] > 0 and domains["gamma"]["left_out"] == 0
    for name in NAMES:
        manifest = load_contribution(tmp_path / name / "contribution").manifest
        assert manifest.held_out_query.blocks == domains[name]["blocks"]
    # What was carried is not kept.
    assert {path.name for path in (tmp_path / "server").rglob("overlap/*")} == {"counts"}


def test_a_coordinator_that_is_killed_goes_on(tmp_path, tiny_checkpoint, monkeypatch):
    checkpoint = tiny_checkpoint("gpt_neox")
    stage = build_stage(tmp_path, checkpoint, "masked")
    killed, places = [], []
    say = CoordinatorWorker._say
    monkeypatch.setattr(
        CoordinatorWorker,
        "_say",
        lambda self, message: places.append(message) or say(self, message),
    )

    def kill_in(method, when):
        inner, calls = getattr(OverlapCarrier, method), []

        def call(self, *arguments):
            found = inner(self, *arguments)
            if method not in killed and when(*arguments):
                calls.append(arguments)
                if len(calls) == 2 or method == "tidy":
                    killed.append(method)
                    raise Killed
            return found

        monkeypatch.setattr(OverlapCarrier, method, call)

    kill_in("take_offer", lambda name, answer: True)
    kill_in("take_answer", lambda turn, *rest: turn == 1)
    kill_in("tidy", lambda turn: turn == 1)
    kill_in("_take_counts", lambda *rest: True)
    for _ in range(4):
        with pytest.raises(Killed):
            stage.run(*NAMES)
    stage.run(*NAMES)
    assert killed == ["take_offer", "take_answer", "tidy", "_take_counts"]
    assert read_overlap(tmp_path) == compare_pooled(tmp_path, checkpoint)
    # No message round is added.
    asked = {place.partition(", ")[2].partition(":")[0] for place in places if "asking" in place}
    rounds = ("experts", "fit 0 0", "judge 0", "held-out")
    assert asked == {f"asking for {place}" for place in rounds}


def test_whose_part_is_wrong_is_named_and_nobody_else_is_hurt(
    tmp_path, tiny_checkpoint, monkeypatch, capsys
):
    offer = OverlapAnswers.offer

    def cheat(self, progress=None):
        found = offer(self, progress)
        if self._name == "beta-1":
            found[SET] = found[SET][:-8]
        if self._name == "gamma-1":
            found[QUERY] = open_receiver(
                self._member.prepared, self._member.tokenizer,
                key=self._key, identity=self._identity, name="guesses",
            ).query.to_bytes()  # fmt: skip
        return found

    monkeypatch.setattr(OverlapAnswers, "offer", cheat)
    checkpoint = tiny_checkpoint("gpt_neox")
    build_stage(tmp_path, checkpoint, "robust").run(*NAMES)
    found, pooled = read_overlap(tmp_path), compare_pooled(tmp_path, checkpoint)
    assert found["compared"]["train"] == ["gamma-1"]
    assert found["absent"] == ["alpha-1", "beta-1"]
    assert found["not_compared"] == {"alpha-1": ["beta-1"], "gamma-1": ["alpha-1", "beta-1"]}
    assert found["domains"]["beta"] == pooled["domains"]["beta"]
    assert found["domains"]["alpha"]["left_out"] < pooled["domains"]["alpha"]["left_out"]
    told = describe_overlap({"overlap": found})
    assert "Held-out text of alpha-1 was not compared with train text of beta-1." in told
    assert "Not here" not in told.replace("Not here, so not compared: the base's", "")
    said = capsys.readouterr().err
    assert "no part of 'beta-1': Cannot trust set of 'beta-1'" in said
    assert "no part of 'gamma-1': Cannot carry the query of 'gamma-1': expected the one" in said
