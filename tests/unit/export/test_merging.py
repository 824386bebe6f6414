"""Merged adapters and checkpoints, loaded by plain PEFT and transformers."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from molora_fed.errors import AdapterError
from molora_fed.export.exporting import Choices, export_model
from molora_fed.export.merging import concatenate
from molora_fed.models.base import load_base
from molora_fed.models.layout import weight_of
from molora_fed.testing import build_random_adapter
from molora_fed.testing.models import build_tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
WEIGHTS = {"one": 0.7, "two": -0.25, "three": 0.0}
ASKED = "one=0.7,two=-0.25"
ADAPTER = Choices("merged", weights=ASKED)
CHECKPOINT = Choices("merged", "checkpoint", ASKED)


def build_parts(checkpoint, *kinds):
    model = load_base(checkpoint).model
    names = ("one", "two", "three")
    return {
        name: build_random_adapter(model, kind=kind, rank=2 + seed, seed=seed, name=name)
        for seed, (name, kind) in enumerate(zip(names, kinds, strict=True))
    }


def test_a_merged_adapter_is_the_weighted_sum(
    model, architecture, open_model, tiny_checkpoint, tmp_path, our_logits, peft_logits
):
    checkpoint = tiny_checkpoint(architecture)
    subject = open_model(checkpoint, build_parts(checkpoint, "lora", "svd", "lora"))
    done = export_model(subject, tmp_path / "out", ADAPTER)
    assert done.weights.values == WEIGHTS and done.weights.source == "as asked for"
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 2 + 3  # the third has weight 0
    found = peft_logits(checkpoint, tmp_path / "out")
    torch.testing.assert_close(found, our_logits(subject, WEIGHTS), rtol=1e-5, atol=2e-5)


def test_factors_side_by_side_give_the_sum_of_products(open_model, tiny_checkpoint):
    checkpoint = tiny_checkpoint("llama")
    subject = open_model(checkpoint, build_parts(checkpoint, "lora", "lora", "lora"))
    merged = concatenate(subject.specialists, WEIGHTS)
    for name, update in merged.updates.items():
        exact = sum(
            WEIGHTS[each.name]
            * each.adapter.updates[name].scale
            * (each.adapter.updates[name].b.double() @ each.adapter.updates[name].a.double())
            for each in subject.specialists
        )
        found = update.scale * (update.b.double() @ update.a.double())
        assert float((found - exact).abs().max()) < 2e-7 * float(exact.abs().max())


def test_dense_differences_go_into_a_checkpoint_only(
    open_model, tiny_checkpoint, tmp_path, our_logits, plain_logits
):
    checkpoint = tiny_checkpoint("gpt_neox")
    subject = open_model(checkpoint, build_parts(checkpoint, "lora", "delta", "lora"))
    with pytest.raises(AdapterError, match="Cannot merge 'two' into one adapter"):
        export_model(subject, tmp_path / "out", ADAPTER)
    assert not (tmp_path / "out").exists()
    export_model(subject, tmp_path / "out", CHECKPOINT)
    found = plain_logits(tmp_path / "out")
    torch.testing.assert_close(found, our_logits(subject, WEIGHTS), rtol=1e-5, atol=2e-5)


def test_a_checkpoint_of_every_architecture(
    model, architecture, open_model, tiny_checkpoint, tmp_path, our_logits, plain_logits
):
    checkpoint = tiny_checkpoint(architecture)
    subject = open_model(checkpoint, build_parts(checkpoint, "lora", "svd", "lora"))
    before = {name: value.clone() for name, value in subject.base.model.state_dict().items()}
    export_model(subject, tmp_path / "out", CHECKPOINT)
    found = plain_logits(tmp_path / "out")
    torch.testing.assert_close(found, our_logits(subject, WEIGHTS), rtol=1e-5, atol=2e-5)
    after = subject.base.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert load_base(tmp_path / "out").tokenizer_fingerprint == subject.base.tokenizer_fingerprint


@pytest.fixture
def tied_base(tmp_path):
    """A Llama in bfloat16 with a tied head, a chat template and a generation config."""
    folder = tmp_path / "tied"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = LlamaConfig(
            vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
            max_position_embeddings=128, bos_token_id=256, eos_token_id=256,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.generation_config.max_new_tokens = 17
    model.save_pretrained(folder)
    tokenizer = build_tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def test_a_checkpoint_keeps_dtype_ties_and_the_files_beside_the_weights(
    tied_base, open_model, tmp_path
):
    subject = open_model(tied_base, build_parts(tied_base, "lora", "lora", "lora"))
    out = tmp_path / "out"
    tmp_path.chmod(0o755)
    export_model(subject, out, CHECKPOINT)
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (out / name).read_bytes() == (tied_base / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert config == json.loads((tied_base / "config.json").read_text())
    assert str(tmp_path) not in (out / "config.json").read_text()
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert merged.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(out).chat_template
    assert (out / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_checkpoint_is_rounded_once(tied_base, open_model, tmp_path):
    subject = open_model(tied_base, build_parts(tied_base, "lora", "delta", "lora"))
    export_model(subject, tmp_path / "out", CHECKPOINT)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name in subject.specialists[0].adapter.updates:
        exact = weight_of(subject.base.model.get_submodule(name)).double().numpy()
        for each in subject.specialists:
            update = each.adapter.updates[name]
            if update.dense is not None:
                change = update.dense.double().numpy()
            else:
                change = update.scale * (update.b.double().numpy() @ update.a.double().numpy())
            exact = exact + WEIGHTS[each.name] * change
        written = weight_of(plain.get_submodule(name)).detach().double().numpy()
        gap = np.abs(written - exact)
        # Half a unit in the last of the 8 binary places of bfloat16.
        _, exponent = np.frexp(exact)
        assert (gap <= np.ldexp(0.5000001, exponent - 8)).all()
