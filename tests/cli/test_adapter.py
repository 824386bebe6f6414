"""`molora adapter check` and `convert`, and `molora contribute --adapter`."""

import json

import pytest
import torch
from adapter_folders import edit, make, rename, train_with_peft

from molora_fed.contributions.manifest import load_contribution
from molora_fed.models.base import load_base
from molora_fed.testing.models import build_tiny_model, build_tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture
def foreign(tmp_path):
    """A LoRA for the tiny base, as another program leaves it."""
    make(tmp_path / "a", "gpt_neox", targets=("query_key_value",))
    rename(tmp_path / "a", lambda key: key.replace(".weight", ".default.weight"))
    edit(tmp_path / "a", base_model_name_or_path="unsloth/tiny-bnb-4bit\x1b[2J", revision="main")
    return tmp_path / "a"


def test_check_says_what_it_is(molora, setup, foreign):
    ran = molora("adapter", "check", foreign)
    assert (ran.code, ran.err) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in ran.out.splitlines())
    assert lines["usable"] == "yes, as far as headers tell without a base"
    assert lines["rank"] == "4" and lines["scale"] == "alpha / R, alpha 8"
    assert lines["modules"] == "2" and lines["targets"] == "query_key_value"
    assert lines["precision"] == "4 tensors F32"
    assert "unsloth" in lines["made"] and "\x1b" not in ran.out
    assert "adapter name 'default' in the keys taken off" in ran.out
    ran = molora("adapter", "check", foreign, "--base", setup.cooperative)
    assert ran.code == 0 and "2 changed of 2" in ran.out and "names and shapes fit" in ran.out
    ran = molora("adapter", "check", foreign, "--base", setup.cooperative / "base", "--json")
    found = json.loads(ran.out)
    assert found["usable"] and found["changed"] == found["modules"] == 2
    assert found["claims"]["revision"] == "main"


def test_check_refuses_in_one_line(molora, foreign, tmp_path):
    edit(foreign, init_lora_weights="pissa")
    ran = molora("adapter", "check", foreign)
    assert ran.code == 20 and ran.out == "" and ran.err.count("\n") == 1
    assert "path_initial_model_for_weight_conversion" in ran.err
    ran = molora("adapter", "check", foreign, "--json")
    assert ran.code == 20 and not json.loads(ran.out)["usable"]
    assert molora("adapter", "check", tmp_path / "nowhere").code == 20


def test_convert_writes_the_normal_form_and_overwrites_nothing(molora, setup, foreign, tmp_path):
    arguments = ("adapter", "convert", foreign, tmp_path / "b", "--base", setup.cooperative)
    ran = molora(*arguments)
    assert ran.code == 0 and "lora of 2 modules, 2 of them changed" in ran.out
    again = molora(*arguments)
    assert again.code == 10 and "one that holds something" in again.err
    checked = molora("adapter", "check", tmp_path / "b", "--json")
    assert json.loads(checked.out)["is_normal"] and json.loads(checked.out)["notes"] == []
    make(tmp_path / "dora", "gpt_neox", targets=("query_key_value",), use_dora=True)
    ran = molora("adapter", "check", tmp_path / "dora")
    assert ran.code == 20 and "--kind svd" in ran.err
    more = ("--base", setup.cooperative, "--kind", "svd", "--rank", 8)
    ran = molora("adapter", "convert", tmp_path / "dora", tmp_path / "svd", *more)
    assert ran.code == 0 and "% of the difference" in ran.out


def test_contribute_an_adapter_of_another_program(molora, setup, tmp_path):
    text = " ".join(path.read_text() for path in sorted(setup.texts["abc"].iterdir())[:100])
    ids = torch.tensor(build_tiny_tokenizer()(text)["input_ids"])
    blocks = ids[: len(ids) // 32 * 32].view(-1, 32)
    train_with_peft(tmp_path / "peft", build_tiny_model("gpt_neox"), blocks)
    arguments = (
        "contribute", "--cooperative", setup.cooperative, "--domain", "abc", "--data",
        setup.texts["abc"], "--out", tmp_path / "out", "--name", "abc-9",
    )  # fmt: skip
    ran = molora(*arguments)
    assert ran.code == 10 and "expected --checkpoint or --adapter, got neither" in ran.err
    ran = molora(*arguments, "--adapter", tmp_path / "peft", "--checkpoint", tmp_path)
    assert ran.code == 10 and "got both" in ran.err
    ran = molora(*arguments, "--adapter", tmp_path / "peft", "--kind", "svd")
    assert ran.code == 10 and "no --kind" in ran.err
    ran = molora(*arguments, "--adapter", tmp_path / "peft")
    assert (ran.code, ran.err) == (0, "")
    manifest = load_contribution(tmp_path / "out" / "contribution").manifest
    assert manifest.origin.tool == "PEFT" and manifest.contamination is None
    gain = manifest.specialist_loss - manifest.base_loss
    assert f"on your text {gain:+.4f} nats per token" in ran.out and gain < -0.1
    layers = len([n for n, _ in load_base(setup.cooperative / "base").model.named_modules()
                  if n.endswith((".dense", "query_key_value", "h_to_4h", "4h_to_h"))])  # fmt: skip
    assert f"Changes {layers} of {layers} modules" in ran.out
