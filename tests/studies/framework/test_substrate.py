"""The substrate's tasks, run one after the other in this process on the smallest models."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from molora_studies.framework.contract import Done, Task
from molora_studies.framework.fusions import _read_losses
from molora_studies.framework.substrate import (
    BaseSettings,
    FusionSettings,
    Member,
    SpecialistSettings,
    plan_base,
    plan_base_text,
    plan_continued_base,
    plan_corpus,
    plan_fusion,
    plan_mean,
    plan_pooled,
    plan_specialist,
)
from safetensors.torch import save_file

from molora_fed.corpus.overlap import Overlap
from molora_fed.errors import ConfigError

DOMAINS = ("readme", "science")
BASE = plan_base(
    BaseSettings(hidden=32, layers=2, heads=2, vocab_size=400, steps=60, domains=DOMAINS)
)
CORPORA = [plan_corpus(BASE, domain) for domain in DOMAINS]
Run = Callable[[Task], Done]


def plan_two(seed: int, **settings: Any) -> Task:
    recipe = SpecialistSettings(steps=40, seed=seed)
    members = [
        Member(domain, plan_specialist(BASE, corpus, recipe), corpus)
        for domain, corpus in zip(DOMAINS, CORPORA, strict=True)
    ]
    chosen = FusionSettings(
        **{
            "routers": {"evidence": {}, "five": {"router": "linear", "steps": 5}},
            "seed": seed,
            "calibration": 12,
            "held_out": 12,
            **settings,
        }
    )
    pooled = plan_pooled(BASE, CORPORA, recipe)
    return plan_fusion(f"two, seed {seed}", BASE, members, chosen, baselines={"control": pooled})


def test_equal_settings_are_one_task():
    assert plan_two(1).key == plan_two(1).key
    assert plan_two(1).key != plan_two(2).key
    again = plan_base(BaseSettings(**BASE.settings))
    assert again.key == BASE.key
    assert plan_corpus(BASE, "readme").key != plan_corpus(BASE, "science").key
    assert plan_corpus(BASE, "readme").key != plan_corpus(plan_base(), "readme").key


def test_names_and_estimates_do_not_decide_the_key():
    task = plan_corpus(BASE, "readme")
    renamed = Task("other", task.action, task.settings, task.needs, seconds=999)
    assert renamed.key == task.key
    assert Task("x", task.action, task.settings, task.needs, version=2).key != task.key


def test_a_fusion_reports_losses_gains_and_members(run: Run):
    done = run(plan_two(1))
    result = done.result
    assert set(result["gains"]) == {"evidence", "five"}
    assert set(result["held_out"]["fused"]["five"]) == set(DOMAINS)
    assert result["evaluation"]["losses"]["control"].keys() == set(DOMAINS)
    assert "weight_average" in result["evaluation"]["losses"]
    assert result["calibration"]["own_domain"] == {d: d for d in DOMAINS}
    assert result["overlap"].keys() == set(DOMAINS)
    for row in result["overlap"].values():
        # The base was trained on the same domains, and on nothing else.
        assert 0 <= row["own"] <= row["base"] <= row["union"] <= 1
        assert row["blocks"] == 12 > row["left_out"] and row["after"] <= 0.1
    for domain in DOMAINS:
        member = result["members"][domain]
        assert member["steps"] == 40
        assert member["adapter_bytes"] > 0
        own = result["evaluation"]["losses"]["specialists"][domain][domain]
        assert own < result["held_out"]["base"][domain]


def test_losses_of_other_models_are_those_of_the_blocks_that_are_kept(tmp_path):
    losses = {domain: torch.arange(24.0).reshape(8, 3) for domain in DOMAINS}
    save_file(losses, tmp_path / "held_out.safetensors")
    overlaps = [
        Overlap(domain, np.full(6, 10), np.array(known), own=0, union=0, base=0)
        for domain, known in zip(DOMAINS, ([0, 9, 0, 1, 2, 0], [0] * 6), strict=True)
    ]
    found = _read_losses(tmp_path / "held_out.safetensors", overlaps, "wider")
    expected = [losses[DOMAINS[0]][[0, 2, 3, 5]], losses[DOMAINS[1]][:6]]
    assert torch.equal(found, torch.cat(expected))
    save_file({DOMAINS[0]: losses[DOMAINS[0]][:4]}, tmp_path / "few.safetensors")
    with pytest.raises(ConfigError, match=r"expected losses of 6 blocks .*got 4"):
        _read_losses(tmp_path / "few.safetensors", overlaps, "wider")


def test_a_fusion_rests_on_what_its_base_was_trained_on():
    task = plan_two(1)
    assert [t.key for t in plan_base_text(BASE)] == [corpus.key for corpus in CORPORA]
    assert {corpus.key for corpus in CORPORA} <= {need.key for need in task.needs}
    continued = plan_continued_base(BASE, CORPORA[:1], steps=4)
    assert {t.key for t in plan_base_text(continued)} == {corpus.key for corpus in CORPORA}
    assert plan_base_text(plan_base(BaseSettings(source="some/folder"))) == []


def test_the_mean_over_seeds_averages_every_method(run: Run):
    fusions = [run(plan_two(seed)) for seed in (1, 2)]
    mean = run(plan_mean("mean", [done.task for done in fusions])).result
    for method in ("base", "control", "domain_oracle"):
        parts = [f.result["evaluation"]["equal_weight"][method]["point"] for f in fusions]
        found = mean["evaluation"]["equal_weight"][method]["point"]
        assert found == pytest.approx(sum(parts) / 2, abs=1e-9)
    interval = mean["evaluation"]["gain_interval_percent"]["evidence"]["vs_best_alone"]
    assert interval["low"] < interval["high"]
    assert mean["fusions"] == 2


def test_fusions_of_other_blocks_are_not_averaged(run: Run):
    tasks = [plan_two(1), plan_two(1, held_out=8)]
    with pytest.raises(ConfigError, match="same held-out blocks"):
        run(plan_mean("mean", tasks))


def test_a_continued_base_is_another_base_with_the_same_tokenizer(run: Run):
    continued = run(plan_continued_base(BASE, CORPORA, steps=40))
    assert continued.result["weights"] != run(BASE).result["weights"]
    specialist = plan_specialist(continued.task, CORPORA[0], SpecialistSettings(steps=5))
    assert run(specialist).result["steps"] == 5
