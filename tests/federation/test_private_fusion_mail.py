"""A fusion on texts that stay with their owners, over the mailboxes."""

import json

import pytest
from stage_helpers import TRAINING, Stage

from molora_fed.charter import Amendment, FusionRules, PrivacyRules, SampleRules

RULES = FusionRules(router="evidence", compare=("evidence-zero",), merges=())
AMENDMENT = Amendment(
    expected=3, training=TRAINING, fusion=RULES,
    samples=SampleRules(calibration=60, admission=4, held_out=60),
)  # fmt: skip


def build_stage(root, checkpoint, summing):
    privacy = PrivacyRules(mode="private", summing=summing)
    return Stage(root, checkpoint, AMENDMENT, privacy=privacy)


@pytest.mark.parametrize("summing", ["masked", "robust"])
def test_a_federation_fuses_texts_that_stay_with_their_owners(tmp_path, tiny_checkpoint, summing):
    stage = build_stage(tmp_path, tiny_checkpoint("gpt_neox"), summing)
    stage.run("alpha", "beta", "gamma")
    report = json.loads((tmp_path / "server" / "report" / "report.json").read_text())
    assert report["privacy_mode"] == "private"
    assert report["sums"]["members"] == {"alpha": 1, "beta": 1, "gamma": 1}
