"""The README of an export: what the report says, and nothing that a page would obey."""

import json
from dataclasses import replace

import pytest

from molora_fed.export.exporting import Choices, export_model
from molora_fed.models.base import load_base
from molora_fed.testing import build_random_adapter


@pytest.fixture
def subject(open_model, tiny_checkpoint, request):
    checkpoint = tiny_checkpoint("gpt_neox")
    model = load_base(checkpoint).model
    parts = {name: build_random_adapter(model, seed=i) for i, name in enumerate("ab")}
    report = json.loads((request.config.rootpath / "tests/data/report.json").read_text())
    report["not_measured"] = {"router": {"linear": "it [ran](http://x) out\x1b[2J of memory"}}
    report["headline"] = {"predictors": [min(report["forecasts"])], "reason": None}
    return replace(open_model(checkpoint, parts), report=report)


def test_a_card_says_what_the_report_says(subject, tmp_path):
    export_model(subject, tmp_path / "out", Choices("merged"), trace_root="ab" * 32)
    text = (tmp_path / "out" / "README.md").read_text()
    report = subject.report
    for part in (
        f"# Specialists of {report['cooperative']}",
        'PeftModel.from_pretrained(base, "THIS_FOLDER")',
        "| a | text-a | lora | 4 |",
        f"| {report['losses']['base'][report['domains'][0]]:.3f} |",
        "## Forecast",
        f"last signed root `{'ab' * 32}`",
        "## What was not tested",
        "the loss of this mixture of weights",
    ):
        assert part in text, part
    assert f"{report['equal_weight']['base']['low']:.3f} to" in text
    assert text.startswith("---\nbase_model: ")


def test_text_of_others_is_text(subject, tmp_path):
    export_model(subject, tmp_path / "out", Choices("peft"))
    text = (tmp_path / "out" / "README.md").read_text()
    assert "\x1b" not in text and r"it \[ran\](http://x) out" in text


def test_without_a_report_nothing_is_said_of_losses(subject, tmp_path):
    bare = replace(subject, report=None)
    export_model(bare, tmp_path / "out", Choices("gguf", weights="a=1"))
    text = (tmp_path / "out" / "README.md").read_text()
    assert "## Losses" not in text and "## Forecast" not in text
    assert "no report of these adapters" in text and "none was recorded" in text
    assert "llama-server -m base.gguf --lora-scaled a.gguf:1.0,b.gguf:0.0" in text


def test_a_malformed_report_costs_its_part_only(subject, tmp_path):
    report = {**subject.report, "losses": {"base": 3}, "domains": 7, "not_measured": [1]}
    export_model(replace(subject, report=report), tmp_path / "out", Choices("peft"))
    text = (tmp_path / "out" / "README.md").read_text()
    assert "malformed" in text and "## Members" in text


def test_every_adapter_has_a_card_of_its_own(subject, tmp_path):
    export_model(subject, tmp_path / "out", Choices("peft"))
    text = (tmp_path / "out" / "b" / "README.md").read_text()
    assert "library_name: peft" in text and "| b | text-b |" in text and "| a |" not in text
    assert 'PeftModel.from_pretrained(base, "THIS_FOLDER")' in text
