"""`molora export`: its output, and its failures in one line."""

import json
import shutil
from pathlib import Path

import pytest

from molora_fed.cooperative.audit import find_trace_root

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture
def fused(fused_once):
    return fused_once / "out"


def test_every_form_of_a_fusion(molora, fused, tmp_path):
    ran = molora("export", fused, "--to", "peft", "--out", tmp_path / "peft")
    assert ran.code == 0 and "abc-1" in ran.out and "PEFT adapter, rank 4" in ran.out
    assert (tmp_path / "peft" / "xyz-1" / "adapter_model.safetensors").is_file()
    ran = molora("export", fused, "--to", "merged", "--out", tmp_path / "merged")
    assert ran.code == 0 and "mean gates of the router" in ran.out
    more = ("--as", "checkpoint", "--weights", "abc-1=0.5")
    ran = molora("export", fused, "--to", "merged", *more, "--out", tmp_path / "whole")
    (line,) = (line for line in ran.out.splitlines() if line.startswith("weights"))
    assert ran.code == 0 and {"abc-1 0.5", "xyz-1 0"} == {  # experts come in the order of their ids
        part.strip() for part in line.removeprefix("weights").split(" (")[0].split(",")
    }
    assert (tmp_path / "whole" / "config.json").is_file()
    ran = molora("export", fused, "--to", "gguf", "--out", tmp_path / "gguf")
    assert ran.code == 0 and "16-bit" in ran.err
    mixture = json.loads((tmp_path / "gguf" / "mixture.json").read_text())
    assert set(mixture["requests_by_domain"]) == {"abc", "xyz"}
    assert "| base |" in (tmp_path / "gguf" / "README.md").read_text()


def test_failures_are_one_line(molora, fused, tmp_path):
    out = ("--out", tmp_path / "out")
    cases = {
        ("--to", "merged", "--weights", "nobody=1"): "'nobody', which is none of them",
        ("--to", "peft", "--weights", "abc-1=1"): "got one folder a specialist",
        ("--to", "peft", "--dtype", "float16"): "Leave out --dtype",
    }
    for options, expected in cases.items():
        ran = molora("export", fused, *options, *out)
        assert ran.code == 10 and expected in ran.err and ran.err.count("\n") == 1
        assert not (tmp_path / "out").exists()
    ran = molora("export", tmp_path, "--to", "peft", *out)
    assert ran.code == 10 and "Cannot open a model" in ran.err
    assert molora("export", fused, "--to", "onnx", *out).code == 2


def test_a_specialist_alone(molora, setup, tmp_path):
    trained = setup.trained["abc"]
    ran = molora("export", trained, "--to", "peft", "--out", tmp_path / "out")
    assert ran.code == 10 and "expected the folder of its base" in ran.err
    ran = molora(
        "export", trained, "--to", "peft", "--base", setup.cooperative, "--out", tmp_path / "out"
    )
    assert ran.code == 0 and "trained-abc" in ran.out


def test_the_root_of_a_recorded_trace_is_in_the_readme(molora, fused_once, tmp_path):
    shutil.copytree(fused_once, tmp_path / "once")
    cooperative = tmp_path / "once" / "tiny"
    assert molora("trace", "record", cooperative).code == 0
    root = find_trace_root(cooperative)
    assert len(root) == 64
    shutil.copytree(tmp_path / "once" / "out" / "fused", cooperative / "fused")
    ran = molora("export", cooperative, "--to", "peft", "--out", tmp_path / "out")
    assert ran.code == 0
    assert root in (tmp_path / "out" / "README.md").read_text()
    (segment,) = (cooperative / "trace").glob("*.jsonl")
    segment.write_bytes(segment.read_bytes().replace(b"admission", b"admissiom", 1))
    assert find_trace_root(cooperative) == ""


def test_the_commands_of_the_page_run(molora, fused, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    commands = [line.split()[1:] for line in page.splitlines() if line.startswith("molora export ")]
    assert len(commands) == 4
    monkeypatch.chdir(tmp_path)
    shutil.copytree(fused.parent, tmp_path / "once")
    (tmp_path / "fused").symlink_to(tmp_path / "once" / "out")
    for words in commands:
        ran = molora(*(w.replace("alice", "abc-1").replace("bob", "xyz-1") for w in words))
        assert ran.code == 0, ran.err
    assert (tmp_path / "gguf" / "abc-1.gguf").is_file()
