"""PEFT folders of specialists, loaded by plain PEFT with its plain scale alpha / r."""

import json
import math
from dataclasses import replace

import pytest
import torch
from adapter_folders import make
from safetensors.torch import load_file

from molora_fed.adapters.files import load_adapter
from molora_fed.errors import ConfigError
from molora_fed.export.exporting import Choices, export_model
from molora_fed.models.base import load_base
from molora_fed.testing import build_random_adapter

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
PEFT = Choices("peft")


@pytest.fixture(params=["rslora", "patterns", "bfloat16", "svd"])
def part(request, tmp_path, tiny_checkpoint):
    """An adapter of the tiny Llama with a scale, ranks or a dtype of its own."""
    folder = tmp_path / "made"
    if request.param == "rslora":
        make(folder, targets="all-linear", use_rslora=True, r=5, lora_alpha=7)
    elif request.param == "patterns":
        patterns = {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"q_proj": 11}}
        make(folder, targets="all-linear", use_rslora=True, **patterns)
    elif request.param == "bfloat16":
        adapter = build_random_adapter(load_base(tiny_checkpoint("llama")).model, rank=3)
        updates = {
            name: replace(update, a=update.a.bfloat16(), b=update.b.bfloat16())
            for name, update in adapter.updates.items()
        }
        return replace(adapter, updates=updates)
    else:
        return build_random_adapter(load_base(tiny_checkpoint("llama")).model, kind="svd", rank=6)
    return folder


def test_plain_peft_gives_our_logits(
    part, open_model, tiny_checkpoint, tmp_path, our_logits, peft_logits
):
    checkpoint = tiny_checkpoint("llama")
    subject = open_model(checkpoint, {"one": part})
    export_model(subject, tmp_path / "out", PEFT)
    config = json.loads((tmp_path / "out" / "one" / "adapter_config.json").read_text())
    assert config["use_rslora"] is False and config["bias"] == "none"
    assert set(config["target_modules"]) == set(subject.specialists[0].adapter.updates)
    found = peft_logits(checkpoint, tmp_path / "out" / "one")
    torch.testing.assert_close(found, our_logits(subject, {"one": 1.0}), rtol=1e-5, atol=2e-5)


def test_numbers_dtype_and_scale_are_those_of_the_adapter(
    part, open_model, tiny_checkpoint, tmp_path
):
    subject = open_model(tiny_checkpoint("llama"), {"one": part})
    export_model(subject, tmp_path / "out", PEFT)
    tensors = load_file(tmp_path / "out" / "one" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "out" / "one" / "adapter_config.json").read_text())
    for name, update in subject.specialists[0].adapter.updates.items():
        a = tensors[f"base_model.model.{name}.lora_A.weight"]
        b = tensors[f"base_model.model.{name}.lora_B.weight"]
        assert a.dtype == update.a.dtype and torch.equal(a, update.a) and torch.equal(b, update.b)
        rank = config["rank_pattern"].get(name, config["r"])
        alpha = config["alpha_pattern"].get(name, config["lora_alpha"])
        assert rank == update.rank
        assert math.isclose(alpha / rank, update.scale, rel_tol=1e-15)
    again = load_adapter(tmp_path / "out" / "one")
    assert again.base_weights == subject.base.weights


@pytest.mark.parametrize("architecture", ["gpt_neox", "gpt2", "gemma2", "qwen3"])
def test_every_architecture(
    architecture, open_model, tiny_checkpoint, tmp_path, our_logits, peft_logits
):
    checkpoint = tiny_checkpoint(architecture)
    adapter = build_random_adapter(load_base(checkpoint).model, rank=3, seed=2)
    subject = open_model(checkpoint, {"one": adapter})
    export_model(subject, tmp_path / "out", PEFT)
    found = peft_logits(checkpoint, tmp_path / "out" / "one")
    torch.testing.assert_close(found, our_logits(subject, {"one": 1.0}), rtol=1e-5, atol=2e-5)


def test_a_dense_specialist_becomes_a_checkpoint_and_says_so(
    open_model, tiny_checkpoint, tmp_path, our_logits, plain_logits, peft_logits
):
    checkpoint = tiny_checkpoint("gpt_neox")
    model = load_base(checkpoint).model
    dense = build_random_adapter(model, kind="delta", seed=1)
    subject = open_model(checkpoint, {"dense": dense, "thin": build_random_adapter(model)})
    done = export_model(subject, tmp_path / "out", PEFT)
    (note,) = done.notes
    assert note.startswith("dense: its differences are dense") and "--rank" in note
    text = (tmp_path / "out" / "README.md").read_text()
    assert 'PeftModel.from_pretrained(base, "THIS_FOLDER/thin")' in text
    ours = our_logits(subject, {"dense": 1.0})
    torch.testing.assert_close(plain_logits(tmp_path / "out" / "dense"), ours, rtol=1e-5, atol=2e-5)
    found = peft_logits(checkpoint, tmp_path / "out" / "thin")
    torch.testing.assert_close(found, our_logits(subject, {"thin": 1.0}), rtol=1e-5, atol=2e-5)


def test_factors_of_a_dense_specialist_are_written_on_request_with_their_loss(
    open_model, tiny_checkpoint, tmp_path, our_logits, peft_logits
):
    checkpoint = tiny_checkpoint("llama")  # without biases, so that full rank loses nothing
    dense = build_random_adapter(load_base(checkpoint).model, kind="delta", seed=1)
    subject = open_model(checkpoint, {"dense": dense})
    done = export_model(subject, tmp_path / "full", Choices("peft", rank=48))
    assert "lose" in done.notes[0] and float(done.notes[0].split("lose ")[1].split(" %")[0]) < 1e-3
    found = peft_logits(checkpoint, tmp_path / "full" / "dense")
    torch.testing.assert_close(found, our_logits(subject, {"dense": 1.0}), rtol=1e-4, atol=1e-4)
    done = export_model(subject, tmp_path / "thin", Choices("peft", rank=4))
    assert 10 < float(done.notes[0].split("lose ")[1].split(" %")[0]) < 100


def test_what_is_there_stays(open_model, tiny_checkpoint, tmp_path):
    checkpoint = tiny_checkpoint("gpt_neox")
    subject = open_model(checkpoint, {"one": build_random_adapter(load_base(checkpoint).model)})
    out = tmp_path / "out"
    out.mkdir()
    export_model(subject, out, PEFT)
    with pytest.raises(ConfigError, match=r"into '.*out': expected a new or empty"):
        export_model(subject, out, PEFT)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="expected a new or empty folder"):
        export_model(subject, tmp_path / "file", PEFT)
    assert (tmp_path / "file").read_text() == "mine"


def test_an_export_that_fails_leaves_nothing(open_model, tiny_checkpoint, tmp_path):
    checkpoint = tiny_checkpoint("gpt_neox")
    dense = build_random_adapter(load_base(checkpoint).model, kind="delta")
    subject = open_model(checkpoint, {"dense": dense})

    def stop(done, total, **fields):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_model(subject, tmp_path / "out", PEFT, progress=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["coop", "parts"]
