"""The example of docs/private_fusion.md runs, and its numbers are the ones in force."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
from molora_kalavai.evidence import ZeroTrainingEvidenceRouter

from molora_fed.bank import HeldOutBank
from molora_fed.evaluation.summed import Compared
from molora_fed.fusion.shortlist import CHOICE_BLOCKS, COST_BLOCKS
from molora_fed.testing import build_synthetic_bank, take_blocks

PAGE = (Path(__file__).parents[2] / "docs" / "private_fusion.md").read_text(encoding="utf-8")


def test_the_example_runs():
    [example] = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    bank = take_blocks(build_synthetic_bank(HeldOutBank), range(8))
    bank = replace(bank, clusters=np.arange(8)[:, None].repeat(24, axis=1))
    namespace = {
        "bank": bank,
        "routers": {"evidence-zero": ZeroTrainingEvidenceRouter(3)},
        "baselines": {"wider": bank.base_nll() - 0.1},
    }
    exec(compile(example, "private_fusion.md", "exec"), namespace)
    assert namespace["report"]["losses"]["fused"]["evidence-zero"].keys() == {"legal"}


def test_its_numbers_are_the_ones_in_force():
    compared = Compared(("base", "a", "b", "c", "d"), ("r", "q"), ("w",))
    assert f"{len(compared.columns)} columns, {compared.count_numbers()} numbers" in PAGE
    assert compared.min_clusters == len(compared.others) + 3 and "K + 3 clusters" in PAGE
    assert len(compared.others) == 2 + 1 + 2  # K = R + B + 2
    report_keys = re.findall(r"^\| `([a-z_.]+)` \|", PAGE, flags=re.MULTILINE)
    assert report_keys == ["excess_nats", "baseline_gain_percent.domain_oracle"]


def test_blocks_of_shortlists_are_the_ones_in_force():
    assert f"run on {CHOICE_BLOCKS} calibration blocks" in PAGE
    assert f"On {COST_BLOCKS} held-out blocks" in PAGE
    scaling = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert f"{CHOICE_BLOCKS + COST_BLOCKS}/310 (M + 1)" in scaling
