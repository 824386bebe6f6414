"""Folders written by PEFT itself: the same logits, or a refusal; never a silent difference."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from molora_fed.adapters.compatibility import applied, check_adapter_fits
from molora_fed.adapters.files import (
    CONFIG_FILE,
    META_FILE,
    WEIGHTS_FILE,
    AdapterMeta,
    load_adapter,
)
from molora_fed.adapters.low_rank_files import write_low_rank
from molora_fed.adapters.updates import LinearUpdate
from molora_fed.errors import AdapterError, IncompatibleAdapterError
from molora_fed.testing.models import build_random_adapter

# PEFT 0.21 asks transformers 5 for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

MLP = {"gpt_neox": "dense_h_to_4h", "gpt2": "c_fc"}
ATTENTION = {"gpt_neox": "query_key_value", "gpt2": "c_attn"}


def save_with_peft(model, folder, **config):
    """Save a LoRA with random factors by PEFT's own `save_pretrained`."""
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 8},
        {"r": 4, "lora_alpha": 8, "use_rslora": True},
        {"r": 4, "lora_alpha": 3, "rank_pattern": {"MLP": 2}},
        {"r": 4, "lora_alpha": 3, "alpha_pattern": {"MLP": 16}},
        {"r": 4, "lora_alpha": 3, "rank_pattern": {"MLP": 2}, "alpha_pattern": {"ATTENTION": 9}},
        {"r": 4, "lora_alpha": 3, "rank_pattern": {"^FULL": 7}, "use_rslora": True},
        {"r": 2, "lora_alpha": 2, "layers_to_transform": [1]},
        {"r": 2, "lora_alpha": 2, "lora_dropout": 0.1, "init_lora_weights": "gaussian"},
    ],
)
def test_scales_and_patterns_are_peft_s(
    options, architecture, tiny_model, tmp_path, tokens, logits
):
    model = tiny_model(architecture)
    mlp = MLP.get(architecture, "up_proj")
    attention = ATTENTION.get(architecture, "q_proj")
    full = next(n for n, _ in model.named_modules() if n.endswith(f".1.mlp.{mlp}"))
    names = {"MLP": mlp, "ATTENTION": attention, "^FULL": f"^{full}"}
    options = {
        key: {names[n]: v for n, v in value.items()} if key.endswith("_pattern") else value
        for key, value in options.items()
    }
    folder = save_with_peft(
        tiny_model(architecture), tmp_path / "a", target_modules=[mlp, attention],
        fan_in_fan_out=architecture == "gpt2", **options,
    )  # fmt: skip
    assert not (folder / META_FILE).exists()
    adapter = load_adapter(folder)
    assert adapter.kind == "lora"
    reference = PeftModel.from_pretrained(tiny_model(architecture), folder).eval()
    with applied(model, adapter):
        found = logits(model, tokens)
    assert torch.allclose(found, logits(reference, tokens), atol=1e-5)
    assert not torch.allclose(found, logits(model, tokens), atol=1e-2)


def test_all_linear_of_peft_loads(model, tiny_model, architecture, tmp_path, tokens, logits):
    folder = save_with_peft(
        tiny_model(architecture), tmp_path / "a", target_modules="all-linear", r=3,
        fan_in_fan_out=architecture == "gpt2",
    )  # fmt: skip
    reference = PeftModel.from_pretrained(tiny_model(architecture), folder).eval()
    with applied(model, load_adapter(folder)):
        assert torch.allclose(logits(model, tokens), logits(reference, tokens), atol=1e-5)


def test_our_patterns_are_read_by_peft(model, tiny_model, architecture, tmp_path, tokens, logits):
    parts = [build_random_adapter(model, rank=r, seed=r) for r in (2, 5)]
    updates = {
        name: parts[index % 2].updates[name]
        for index, name in enumerate(parts[0].updates)
    }  # fmt: skip
    write_low_rank(
        tmp_path / "a", updates, AdapterMeta(kind="lora", frozen_depth=0),
        transposed=architecture == "gpt2", use_rslora=False,
    )  # fmt: skip
    adapter = load_adapter(tmp_path / "a")
    for name, update in updates.items():
        assert torch.equal(adapter.updates[name].a, update.a)
        assert adapter.updates[name].scale == pytest.approx(update.scale, rel=1e-12)
    reference = PeftModel.from_pretrained(tiny_model(architecture), tmp_path / "a").eval()
    with applied(model, adapter):
        assert torch.allclose(logits(model, tokens), logits(reference, tokens), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
    ],
)
def test_refuses_features_beyond_a_low_rank_change(options, named, tiny_model, tmp_path):
    base = tiny_model("llama")
    folder = save_with_peft(base, tmp_path / "a", target_modules=["q_proj"], r=2, **options)
    with pytest.raises(AdapterError) as caught:
        load_adapter(folder, name="legal-07")
    assert "'legal-07'" in str(caught.value) and named in str(caught.value)
    assert "\n" not in str(caught.value)


def edit(folder, **changes):
    config = json.loads((folder / CONFIG_FILE).read_text())
    config.update(changes)
    (folder / CONFIG_FILE).write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"some_future_feature": {"on": True}}, "some_future_feature"),
        ({"bias": "every"}, "bias 'every'"),
        ({"target_modules": []}, "list of module names"),
        ({"target_modules": [3]}, "list of module names"),
        ({"r": 0}, "positive ranks"),
        ({"r": True}, "positive ranks"),
        ({"r": None}, "positive ranks"),
        ({"lora_alpha": "8"}, "positive ranks"),
        ({"lora_alpha": float("nan")}, "NaN, which is not JSON"),
        ({"alpha_pattern": {"(a+)+(?=b)": 3}}, "linear time"),
        ({"alpha_pattern": {"q_proj": 0}}, "positive ranks"),
        ({"rank_pattern": [1]}, "positive ranks"),
        ({"use_rslora": "yes"}, "positive ranks"),
    ],
)
def test_refuses_a_config_it_cannot_honour(changes, named, tiny_model, tmp_path):
    folder = save_with_peft(tiny_model("llama"), tmp_path / "a", target_modules=["q_proj"], r=2)
    load_adapter(folder)
    edit(folder, **changes)
    with pytest.raises(AdapterError) as caught:
        load_adapter(folder, name="legal-07")
    assert "'legal-07'" in str(caught.value) and named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_named_module_without_tensors_does_not_fit(tiny_model, tmp_path):
    folder = save_with_peft(tiny_model("llama"), tmp_path / "a", target_modules=["q_proj"], r=2)
    tensors = load_file(folder / WEIGHTS_FILE)
    kept = {key: tensor for key, tensor in tensors.items() if ".layers.0." not in key}
    save_file(kept, folder / WEIGHTS_FILE)
    adapter = load_adapter(folder, name="legal-07")
    with (
        pytest.raises(IncompatibleAdapterError, match=r"layers\.0\.self_attn\.q_proj.*got none"),
        applied(tiny_model("llama"), adapter),
    ):
        pass


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens", "model.norm", "nowhere"])
def test_an_update_outside_the_blocks_does_not_fit(name, tiny_model, tmp_path):
    updates = {name: LinearUpdate(a=torch.ones(1, 32), b=torch.ones(257, 1))}
    meta = AdapterMeta(kind="lora", frozen_depth=0)
    write_low_rank(tmp_path / "a", updates, meta, transposed=False, use_rslora=False)
    adapter, model = load_adapter(tmp_path / "a"), tiny_model("llama")
    with pytest.raises(IncompatibleAdapterError, match=f"{name}: expected a linear layer in"):
        check_adapter_fits(adapter, model)


def test_ranks_and_scales_survive_rslora(tmp_path):
    updates = {"h.0.x": LinearUpdate(a=torch.ones(9, 4), b=torch.ones(3, 9), scale=16 / 3)}
    meta = AdapterMeta(kind="lora", frozen_depth=0)
    write_low_rank(tmp_path / "a", updates, meta, transposed=False, use_rslora=True)
    config = json.loads((tmp_path / "a" / CONFIG_FILE).read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (9, 16, True)
    assert load_adapter(tmp_path / "a").updates["h.0.x"].scale == pytest.approx(16 / 3)
