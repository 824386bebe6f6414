import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from molora_fed.testing.models import (
    TINY_VOCABULARY,
    build_random_adapter,
    build_tiny_model,
    build_tiny_tokenizer,
)


def test_equal_seeds_give_equal_models(architecture):
    one, same, other = (build_tiny_model(architecture, seed) for seed in (1, 1, 2))
    state = one.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in same.state_dict().items())
    assert not all(torch.equal(t, state[n]) for n, t in other.state_dict().items())


def test_building_leaves_the_global_generator_alone(architecture):
    before = torch.get_rng_state()
    build_random_adapter(build_tiny_model(architecture))
    assert torch.equal(torch.get_rng_state(), before)


def test_checkpoint_loads_by_its_folder(architecture, tiny_checkpoint, tokens):
    folder = tiny_checkpoint(architecture)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, build_tiny_model(architecture)(tokens).logits)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == TINY_VOCABULARY


@pytest.mark.parametrize("text", ["", "plain", "Grüße, 世界 🙂\n\ttab", "def f(x):\n    return x"])
def test_tokenizer_is_bytes(text):
    tokenizer = build_tiny_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == TINY_VOCABULARY - 1


def test_gemma_has_soft_caps_and_tied_heads(tiny_model):
    gemma = tiny_model("gemma2")
    assert gemma.config.final_logit_softcapping and gemma.config.attn_logit_softcapping
    assert gemma.get_output_embeddings().weight is gemma.get_input_embeddings().weight


def test_importing_the_package_loads_no_heavy_library():
    code = (
        "import sys, molora_fed.testing as t; dir(t); "
        "print([m for m in ('torch', 'transformers', 'flwr') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
