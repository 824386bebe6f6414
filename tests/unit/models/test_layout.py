from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import GPTNeoXConfig

from molora_fed.errors import AdapterError, BaseCheckpointError
from molora_fed.models.layout import (
    adaptable_modules,
    block_index,
    decoder_blocks,
    is_transposed,
    weight_of,
)

PREFIXES = {"gpt_neox": "gpt_neox.layers", "gpt2": "transformer.h"}
LINEAR_PER_BLOCK = {"gpt_neox": 4, "llama": 7, "qwen3": 7, "gemma2": 7, "gpt2": 4}


def test_finds_decoder_blocks(model, architecture):
    prefix, blocks = decoder_blocks(model)
    assert prefix == PREFIXES.get(architecture, "model.layers")
    assert len(blocks) == 2


def test_lists_linear_layers_from_the_frozen_depth_on(model, architecture):
    modules = adaptable_modules(model, 0)
    later = adaptable_modules(model, 1)
    prefix, _ = decoder_blocks(model)
    assert len(modules) == 2 * LINEAR_PER_BLOCK[architecture]
    assert list(later) == [n for n in modules if n.startswith(f"{prefix}.1.")]
    assert len(later) == LINEAR_PER_BLOCK[architecture]


def test_leaves_out_embedding_head_and_norms(model):
    changed = {id(p) for m in adaptable_modules(model, 0).values() for p in m.parameters()}
    assert id(model.get_input_embeddings().weight) not in changed
    assert id(model.get_output_embeddings().weight) not in changed
    norms = [p for n, p in model.named_parameters() if "norm" in n or ".ln_" in n]
    assert norms and not changed & {id(p) for p in norms}


def test_weight_is_out_by_in_and_writable(model, tokens):
    for name, module in adaptable_modules(model, 0).items():
        weight = weight_of(module)
        columns = weight.shape[1]
        inputs = torch.randn(3, columns)
        bias = 0 if module.bias is None else module.bias
        assert torch.allclose(module(inputs), inputs @ weight.T + bias, atol=1e-5), name
        with torch.no_grad():
            weight.zero_()
        assert not module.weight.any()


def test_only_gpt2_is_transposed(model, architecture):
    flags = {is_transposed(m) for m in adaptable_modules(model, 0).values()}
    assert flags == {architecture == "gpt2"}


@pytest.mark.parametrize("depth", [2, 5, -1])
def test_refuses_a_frozen_depth_that_leaves_nothing(tiny_model, depth):
    with pytest.raises(AdapterError, match="frozen depth from 0 to 1"):
        adaptable_modules(tiny_model(), depth)


def test_refuses_a_model_without_one_block_list():
    config = SimpleNamespace(get_text_config=GPTNeoXConfig)
    none = nn.Sequential(nn.Linear(2, 2))
    none.config = config
    with pytest.raises(BaseCheckpointError, match="decoder blocks, got none"):
        decoder_blocks(none)


def test_refuses_linear_layers_that_share_a_weight(tiny_model):
    model = tiny_model("llama")
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    with pytest.raises(BaseCheckpointError, match="sharing weights"):
        adaptable_modules(model, 0)


@pytest.mark.parametrize(
    ("name", "index"),
    [("h.0.mlp", 0), ("h.11.mlp.fc", 11), ("h", None), ("head.0.x", None), ("h.x.y", None)],
)
def test_block_index(name, index):
    assert block_index(name, "h") == index
