"""The contributor's flow: the same contribution, trained here or made of an adapter given."""

import random

import pytest

from molora_fed.charter import (
    Amendment,
    CorpusRules,
    FusionRules,
    PopulationRules,
    PrivacyRules,
    SampleRules,
    TrainingRules,
)
from molora_fed.contributions.manifest import load_contribution
from molora_fed.cooperative.contribute import (
    make_contribution,
    open_charter_and_base,
    prepare_domain,
)
from molora_fed.cooperative.cooperative import create_cooperative
from molora_fed.models.base import load_base
from molora_fed.storage.keys import load_or_make_key

PRIVATE = {
    "population": PopulationRules(data="private", rank=2, guard="spending"),
    "fusion": FusionRules(mode="population"),
}


@pytest.mark.parametrize("rules", [{}, PRIVATE], ids=["pooled", "private"])
def test_an_adapter_given_makes_the_contribution_of_its_training(rules, tmp_path, tiny_checkpoint):
    draw = random.Random(0)
    (tmp_path / "text").mkdir()
    for number in range(240):
        words = (draw.choice("abcd") * 2 + str(draw.randrange(10)) for _ in range(12))
        (tmp_path / "text" / f"{number}.txt").write_text(" ".join(words))
    training = TrainingRules(kind="lora", rank=2, steps=4, batch=4, validate_every=2)
    samples = SampleRules(calibration=300, admission=4, held_out=60)
    if not rules:
        samples = SampleRules(calibration=8, admission=4, held_out=8)
    create_cooperative(
        tmp_path / "coop", "test", load_base(tiny_checkpoint("gpt_neox")),
        corpus=CorpusRules(block_size=16),
        amendment=Amendment(training=training, samples=samples, **rules),
        privacy=PrivacyRules(mode="pooled"),
    )  # fmt: skip
    under = open_charter_and_base(tmp_path / "coop")
    corpus = prepare_domain(under, "mine", [tmp_path / "text"], tmp_path)
    key = load_or_make_key(tmp_path / "key.pem")
    phases = []
    made = make_contribution(
        under, corpus, tmp_path, key=key, training_folder=tmp_path / "run", on_phase=phases.append
    )
    again = make_contribution(
        under, corpus, tmp_path / "again", key=key, given=tmp_path / "run", on_phase=phases.append
    )
    assert phases == ["training", "building", "measuring", "building"]
    manifest = load_contribution(tmp_path / "contribution").manifest
    # Where texts are private, no sample goes along on which a start could be compared.
    assert (manifest.start_loss is None) == (not manifest.sample_files) == bool(rules)
    assert again.contribution.manifest.adapter_files == manifest.adapter_files
    assert again.adapter.loss == pytest.approx(made.adapter.loss, abs=1e-6)
    assert again.contribution.manifest.training == manifest.training
