"""Pooled text: one adapter, or all of the base; the rate that suits each."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training_helpers import RULES, TRAINING, build_blocks

from molora_fed.adapters.files import load_adapter
from molora_fed.charter import AdapterRules
from molora_fed.errors import DivergedError, TrainingError
from molora_fed.models.base import load_base
from molora_fed.models.forward import compute_block_losses
from molora_fed.training.loop import CHECKPOINT_NAME
from molora_fed.training.pooled import (
    choose_rate,
    continue_base,
    load_continued,
    train_monolithic,
)
from molora_fed.types import Split


@pytest.fixture
def base(tiny_checkpoint):
    return load_base(tiny_checkpoint("gpt_neox"))


def train_adapter(base, folder, **more):
    domains = ("counting", "other")
    return train_monolithic(
        base,
        [build_blocks(Split.TRAIN, 30, seed=s, domain=d) for s, d in enumerate(domains)],
        [build_blocks(Split.VALIDATION, 6, seed=9 + s, domain=d) for s, d in enumerate(domains)],
        **{"steps": 12, "rules": RULES, "training": TRAINING, "seed": 3, **more},
        threads=1,
        folder=folder,
    )


def test_the_adapter_takes_all_its_steps_on_all_domains(base, tmp_path):
    control = train_adapter(base, tmp_path, rules=AdapterRules(kinds=("lora",)))
    assert control.loss < control.base_loss
    assert control.domain == "counting+other" and control.kind == "delta"
    assert control.record["steps"] == 12 and control.record["num_validation_blocks"] == 12
    adapter = load_adapter(control.adapter_folder)
    assert all(update.dense is not None for update in adapter.updates.values())


def test_pooling_needs_text_of_every_domain(base, tmp_path):
    blocks = build_blocks(Split.TRAIN, 4)
    with pytest.raises(TrainingError, match="train blocks of 1 of 2"):
        train_monolithic(
            base,
            [blocks, blocks.take(0)],
            [blocks],
            steps=2,
            rules=RULES,
            training=TRAINING,
            seed=1,
            threads=1,
            folder=tmp_path,
        )


def continue_tiny(base, folder, **more):
    domains = ("counting", "other")
    return continue_base(
        base,
        [build_blocks(Split.TRAIN, 30, seed=s, domain=d) for s, d in enumerate(domains)],
        [build_blocks(Split.VALIDATION, 6, seed=9 + s, domain=d) for s, d in enumerate(domains)],
        **{"steps": 12, "training": TRAINING, "seed": 3, **more},
        threads=1,
        folder=folder,
    )


def test_a_continued_base_changes_everything_and_is_read_back_as_recorded(base, tmp_path):
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    continued = continue_tiny(base, tmp_path)
    assert continued.loss < continued.base_loss
    assert all(torch.equal(before[name], value) for name, value in base.model.state_dict().items())
    loaded = continued.load()
    assert loaded.tokenizer_fingerprint == base.tokenizer_fingerprint
    changed = {
        n for n, value in loaded.model.named_parameters() if not torch.equal(before[n], value)
    }
    assert changed == dict(base.model.named_parameters()).keys()
    blocks = [build_blocks(Split.VALIDATION, 6, seed=9 + s) for s in range(2)]
    losses = torch.cat([compute_block_losses(loaded.model, part.tokens) for part in blocks])
    assert float(losses.double().mean()) == pytest.approx(continued.loss, abs=1e-5)
    assert not (tmp_path / CHECKPOINT_NAME).exists()


def test_a_finished_continuation_is_loaded_and_another_is_refused(base, tmp_path):
    continued = continue_tiny(base, tmp_path)
    (
        tmp_path / "base" / "model.safetensors"
    ).unlink()  # it would be missed, if it were trained anew
    assert continue_tiny(base, tmp_path).record == continued.record
    with pytest.raises(TrainingError, match="differs in blocks, settings"):
        continue_tiny(base, tmp_path, seed=4)
    assert load_continued(tmp_path).loss == continued.loss
    (tmp_path / "record.json").write_text(json.dumps({"loss": "low"}))
    with pytest.raises(TrainingError, match="expected a finished training"):
        load_continued(tmp_path)


def test_a_rate_that_is_too_high_is_told_apart_from_other_failures(base, tmp_path):
    wild = TRAINING.model_copy(update={"learning_rate": 1e18})
    with pytest.raises(DivergedError, match="expected a finite"):
        continue_tiny(base, tmp_path, training=wild)


@given(st.floats(-4, 4), st.floats(1e-5, 1e-1))
def test_the_rate_of_the_lowest_loss_within_reach_is_chosen(optimum, start):
    tried = []

    def attempt(rate):
        tried.append(rate)
        return (math.log2(rate / start) - optimum) ** 2

    rate, losses = choose_rate(start, attempt)
    assert sorted(losses) == sorted(tried) and len(tried) == len(set(tried)) <= 5
    reachable = [start * 2.0**power for power in range(-3, 4)]
    assert losses[rate] == pytest.approx(min(map(attempt, reachable)), abs=1e-6)


def test_a_rate_that_diverges_is_not_chosen_and_some_rate_must_do():
    rate, losses = choose_rate(0.1, lambda rate: math.inf if rate > 0.1 else -rate)
    assert rate == 0.1 and losses[0.2] == math.inf
    with pytest.raises(TrainingError, match="expected a finite loss at one of"):
        choose_rate(0.1, lambda rate: math.inf)
