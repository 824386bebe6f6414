"""llama-server gives our log-probabilities at any scales; skipped where none is named."""

import shlex

import pytest
import torch
from llama_server import VARIABLE, find_binary, serving

from molora_fed.export.exporting import Choices, export_model
from molora_fed.export.gguf_lora import build_command, build_request
from molora_fed.models.base import load_base
from molora_fed.testing import build_random_adapter

pytestmark = pytest.mark.skipif(find_binary() is None, reason=f"{VARIABLE} names no llama-server")


@pytest.mark.parametrize(("architecture", "near"), [("llama", 1e-4), ("gpt_neox", 5e-3)])
def test_a_server_gives_our_log_probabilities(
    architecture, near, open_model, tiny_checkpoint, tmp_path, tokens, our_logits
):
    checkpoint = tiny_checkpoint(architecture)
    model = load_base(checkpoint).model
    parts = {name: build_random_adapter(model, rank=3, seed=i) for i, name in enumerate("ab")}
    subject = open_model(checkpoint, parts)
    choices = Choices("gguf", weights="a=0.25,b=-0.5", dtype="float32")
    export_model(subject, tmp_path / "out", choices)
    started = {"a": 0.25, "b": -0.5}
    arguments = shlex.split(build_command(subject, started))[1:]
    text = "it's 12 🦙\n"
    with serving(find_binary(), arguments, tmp_path / "out") as server:
        assert server.tokenize(text) == subject.base.tokenizer(text)["input_ids"]
        cases = [(w, build_request(subject, w)) for w in ({}, {"a": 1.0}, {"a": 0.4, "b": -0.7})]
        for weights, lora in [*cases, (started, None), ({"b": 0.3}, [{"id": 1, "scale": 0.3}])]:
            ours = torch.log_softmax(our_logits(subject, weights)[0, -1], dim=-1)
            found = server.ask(tokens[0].tolist(), lora, 50)
            assert len(found) == 50
            assert max(abs(value - float(ours[token])) for token, value in found.items()) < near
