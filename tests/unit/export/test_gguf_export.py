"""GGUF bases and LoRA files, read back by `gguf.GGUFReader`, and by transformers."""

import json

import gguf
import numpy as np
import pytest
import torch
from adapter_folders import make, quiet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from molora_fed.errors import AdapterError, BaseCheckpointError, ConfigError
from molora_fed.export.exporting import Choices, export_model
from molora_fed.export.gguf_layout import find_layout
from molora_fed.export.subject import open_subject
from molora_fed.models import gguf_files
from molora_fed.models.base import load_base
from molora_fed.testing import build_random_adapter
from molora_fed.testing.models import build_tiny_model, build_tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
GGUF = Choices("gguf")


def read(file):
    """Metadata and numbers of a file."""
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: (tensor, np.array(tensor.data)) for tensor in reader.tensors}


def undo_llama(rows, heads):
    """Rows of a query or key as transformers has them, from llama.cpp's pairs."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def undo_neox(rows, heads):
    """Rows of queries, keys and values head by head, from llama.cpp's three blocks."""
    return rows.reshape(3, heads, -1, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)


@pytest.fixture(params=["llama", "gpt_neox"])
def subject(request, open_model, tiny_checkpoint):
    checkpoint = tiny_checkpoint(request.param)
    model = load_base(checkpoint).model
    parts = {name: build_random_adapter(model, rank=3, seed=i) for i, name in enumerate("ab")}
    return open_model(checkpoint, parts)


def restore(subject, module, rows):
    part = module.rpartition(".")[2]
    if part == "query_key_value":
        return undo_neox(rows, 4)
    return (
        undo_llama(rows, {"q_proj": 4, "k_proj": 2}[part]) if part in ("q_proj", "k_proj") else rows
    )


def test_a_base_has_all_its_numbers(subject, tmp_path):
    export_model(subject, tmp_path / "out", GGUF)
    fields, tensors = read(tmp_path / "out" / "base.gguf")
    layout = find_layout(subject.base)
    named = dict(subject.base.model.named_parameters())
    assert len(tensors) == len(named)
    for name, values in named.items():
        tensor, found = tensors[layout.find_name(name)]
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        restored = restore(subject, name.rpartition(".")[0], found)
        assert np.array_equal(restored, values.numpy()), name
    arch = layout.name
    config = subject.base.model.config
    assert fields["general.architecture"] == arch and fields["general.type"] == "model"
    assert fields[f"{arch}.block_count"] == 2
    assert fields[f"{arch}.attention.head_count"] == 4
    assert fields[f"{arch}.rope.freq_base"] == config.rope_parameters["rope_theta"]
    assert fields[f"{arch}.vocab_size"] == 257


@pytest.fixture
def merging_base(tmp_path):
    """A tiny Llama whose tokenizer has merges, an added token, and fewer tokens than the model."""
    merges = [("Ġ", "t"), ("1", "2"), ("Ċ", "Ċ"), ("Ġt", "h")]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|end|>", *letters, *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|end|>", eos_token="<|end|>"
    )
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(tmp_path / "base")
    with torch.random.fork_rng():
        torch.manual_seed(4)
        config = LlamaConfig(
            vocab_size=270, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
            bos_token_id=0, eos_token_id=0, initializer_range=0.15,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_transformers_reads_a_llama_base_with_the_same_logits_and_tokens(
    merging_base, tmp_path, tokens, our_logits
):
    subject = open_subject(merging_base)
    export_model(subject, tmp_path / "out", GGUF)
    with quiet(), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", gguf_file="base.gguf", dtype=torch.float32
        )
        found = model.eval()(tokens).logits
        again = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="base.gguf")
    torch.testing.assert_close(found, our_logits(subject, {}), rtol=1e-5, atol=1e-5)
    text = "the it's 12345 naïve 🦙\n\n  x"
    assert again(text)["input_ids"] == subject.base.tokenizer(text)["input_ids"]
    fields, _ = read(tmp_path / "out" / "base.gguf")
    types = fields["tokenizer.ggml.token_type"]
    assert [types[n] for n in (0, 1, 261, 262, 269)] == [3, 1, 4, 5, 5]
    assert fields["tokenizer.ggml.tokens"][261:263] == ["<tool>", "[PAD262]"]
    assert fields["tokenizer.ggml.merges"] == ["Ġ t", "1 2", "Ċ Ċ", "Ġt h"]
    assert fields["tokenizer.ggml.eos_token_id"] == 0
    assert not fields["tokenizer.ggml.add_bos_token"]


def test_a_lora_file_is_the_adapter(subject, tmp_path):
    export_model(subject, tmp_path / "out", GGUF)
    layout = find_layout(subject.base)
    for each in subject.specialists:
        fields, tensors = read(tmp_path / "out" / f"{each.name}.gguf")
        assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
        assert fields["general.architecture"] == layout.name
        assert len(tensors) == 2 * len(each.adapter.updates)
        for module, update in each.adapter.updates.items():
            name = layout.find_name(f"{module}.weight")
            (a, a_found), (b, b_found) = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
            # As llama.cpp computes it: one alpha a file, the rank of each module.
            scale = fields["adapter.lora.alpha"] / b_found.shape[1]
            product = scale * restore(subject, module, b_found @ a_found)
            assert np.abs(product - update.product().numpy()).max() < 1e-6
            assert np.array_equal(a_found, update.a.numpy())
            assert np.array_equal(restore(subject, module, b_found), update.b.numpy())
            assert a.tensor_type == b.tensor_type == gguf.GGMLQuantizationType.F32


def test_scales_that_one_alpha_cannot_give_go_into_the_factors(
    open_model, tiny_checkpoint, tmp_path
):
    patterns = {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"q_proj": 11}}
    make(tmp_path / "made", targets="all-linear", use_rslora=True, **patterns)
    subject = open_model(tiny_checkpoint("llama"), {"a": tmp_path / "made"})
    export_model(subject, tmp_path / "out", GGUF)
    fields, tensors = read(tmp_path / "out" / "a.gguf")
    layout = find_layout(subject.base)
    assert len({update.scale for update in subject.specialists[0].adapter.updates.values()}) == 3
    for module, update in subject.specialists[0].adapter.updates.items():
        name = layout.find_name(f"{module}.weight")
        b, a = tensors[f"{name}.lora_b"][1], tensors[f"{name}.lora_a"][1]
        scale = fields["adapter.lora.alpha"] / b.shape[1]
        product = scale * restore(subject, module, b @ a)
        exact = update.product().numpy()
        assert np.abs(product - exact).max() < 1e-6 * np.abs(exact).max() + 1e-7


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_base_in_16_bits(dtype, subject, tmp_path):
    export_model(subject, tmp_path / "out", Choices("gguf", dtype=dtype))
    fields, tensors = read(tmp_path / "out" / "base.gguf")
    layout = find_layout(subject.base)
    kind = {"float16": "F16", "bfloat16": "BF16"}[dtype]
    assert fields["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{kind}"]
    for name, values in subject.base.model.named_parameters():
        tensor, found = tensors[layout.find_name(name)]
        if values.ndim == 1:
            assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
            continue
        assert tensor.tensor_type == gguf.GGMLQuantizationType[kind]
        plain = gguf.quants.dequantize(found, tensor.tensor_type)
        rounded = values.to(getattr(torch, dtype)).float().numpy()
        assert np.array_equal(restore(subject, name.rpartition(".")[0], plain), rounded), name


def test_numbers_too_large_for_float16_are_refused(subject, tmp_path):
    subject.base.model.get_input_embeddings().weight[3, 5] = 1e5
    with pytest.raises(BaseCheckpointError, match="at most 65504, got 100000"):
        export_model(subject, tmp_path / "out", Choices("gguf", dtype="float16"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_a_tied_head(architecture, tmp_path):
    model = build_tiny_model(architecture)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied")
    build_tiny_tokenizer().save_pretrained(tmp_path / "tied")
    subject = open_subject(tmp_path / "tied")
    head, embedding = (
        subject.base.model.get_output_embeddings(),
        subject.base.model.get_input_embeddings(),
    )
    assert head.weight is embedding.weight
    done = export_model(subject, tmp_path / "out", GGUF)
    assert [name for name, _ in done.rows] == ["base.gguf"] and done.weights is None
    _, tensors = read(tmp_path / "out" / "base.gguf")
    # llama.cpp ties Llama's by itself, and wants GPT-NeoX's written out.
    assert ("output.weight" in tensors) == (architecture == "gpt_neox")
    if architecture == "gpt_neox":
        assert np.array_equal(tensors["output.weight"][1], embedding.weight.numpy())


def test_requests_hold_the_weights_and_ids_follow_the_command(subject, tmp_path):
    export_model(subject, tmp_path / "out", Choices("gguf", weights="a=0.25,b=-1"))
    mixture = json.loads((tmp_path / "out" / "mixture.json").read_text())
    assert mixture["request"] == {"lora": [{"id": 0, "scale": 0.25}, {"id": 1, "scale": -1.0}]}
    words = mixture["command"].split()
    assert words == [
        "llama-server", "-m", "base.gguf", "--lora-scaled", "a.gguf:0.25,b.gguf:-1.0"
    ]  # fmt: skip
    assert [each["file"] for each in mixture["adapters"]] == ["a.gguf", "b.gguf"]
    assert "requests_by_domain" not in mixture  # no report says them


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2", "gpt2"])
def test_other_architectures_are_refused_by_name(architecture, tiny_checkpoint, tmp_path):
    subject = open_subject(tiny_checkpoint(architecture))
    with pytest.raises(BaseCheckpointError, match=r"expected one of llama, gpt_neox, got") as found:
        export_model(subject, tmp_path / "out", GGUF)
    assert "\n" not in str(found.value) and not (tmp_path / "out").exists()


def test_what_llama_cpp_does_not_compute_is_refused(tiny_checkpoint, tmp_path):
    subject = open_subject(tiny_checkpoint("llama"))
    subject.base.model.config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4}
    subject.base.model.config.hidden_act = "relu"
    with pytest.raises(BaseCheckpointError, match="got rope type 'yarn', activation 'relu'"):
        export_model(subject, tmp_path / "out", GGUF)


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}},
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}},
    ],
)
def test_a_tokenizer_that_splits_otherwise_is_refused(change, tiny_checkpoint, tmp_path):
    folder = tmp_path / "base"
    base = load_base(tiny_checkpoint("llama"))
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(content | change))
    with pytest.raises(BaseCheckpointError, match="expected byte-level BPE split as GPT-2"):
        export_model(open_subject(folder), tmp_path / "out", GGUF)
    assert not (tmp_path / "out").exists()


def test_digits_apart_are_smollms_splitting(tiny_checkpoint, tmp_path):
    folder = tmp_path / "base"
    base = load_base(tiny_checkpoint("llama"))
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    digits = {"type": "Digits", "individual_digits": True}
    steps = [digits, content["pre_tokenizer"]]
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    export_model(open_subject(folder), tmp_path / "out", GGUF)
    assert read(tmp_path / "out" / "base.gguf")[0]["tokenizer.ggml.pre"] == "smollm"


def test_dense_differences_are_refused_before_anything_is_written(
    open_model, tiny_checkpoint, tmp_path
):
    checkpoint = tiny_checkpoint("gpt_neox")
    dense = build_random_adapter(load_base(checkpoint).model, kind="delta")
    subject = open_model(checkpoint, {"dense": dense})
    with pytest.raises(AdapterError, match="Cannot write 'dense' as a GGUF LoRA"):
        export_model(subject, tmp_path / "out", GGUF)
    assert not (tmp_path / "out").exists()
    done = export_model(subject, tmp_path / "out", Choices("gguf", rank=4))
    assert ("dense.gguf", "LoRA in float32, rank 4") in done.rows


def test_without_the_package_it_says_what_to_install(subject, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_files, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install molora-fed\[gguf\]"):
        export_model(subject, tmp_path / "out", GGUF)
