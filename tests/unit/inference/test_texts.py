import json

import pytest
import torch
from fusion_helpers import build_charter, build_cooperative

from molora_fed.corpus.records import TextOptions
from molora_fed.errors import ConfigError, CorpusError
from molora_fed.fusion.fuse import fuse
from molora_fed.inference.texts import evaluate_texts
from molora_fed.models.forward import compute_block_losses


@pytest.fixture(scope="module")
def fused(tiny_checkpoint, tmp_path_factory):
    root = tmp_path_factory.mktemp("fused")
    base, contributions = build_cooperative(tiny_checkpoint(), root)
    return fuse(base, build_charter(base), contributions, root / "out").fused


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("A text that no one has trained on. " * 12)
    return path


def test_base_loss_is_that_of_the_one_evaluator(fused, text):
    phases = []
    found = evaluate_texts(fused, {"mine": [text]}, block_size=32, on_phase=phases.append)
    ids = [*fused.base.tokenizer.encode(text.read_text()), fused.base.tokenizer.eos_token_id]
    count = len(ids) // 32
    tokens = torch.tensor(ids[: count * 32]).reshape(count, 32)
    expected = float(compute_block_losses(fused.base.model, tokens).double().mean())
    assert found.losses("base")["mine"] == pytest.approx(expected, rel=1e-6)
    assert f"fused:{fused.router_name}" in found.sums
    assert phases == ["reading mine", "measuring"]


def test_text_of_records_is_found_in_the_field_asked_for(fused, text):
    records = text.with_name("records.jsonl")
    line = {"text": "Not this.", "post": {"body": text.read_text()}}
    records.write_text(json.dumps(line) + "\n")
    found = evaluate_texts(fused, {"mine": [records]}, block_size=32, text=TextOptions("post.body"))
    plain = evaluate_texts(fused, {"mine": [text]}, block_size=32)
    assert found.losses("base") == plain.losses("base")


def test_too_little_text_and_too_long_blocks_are_refused(fused, text):
    with pytest.raises(CorpusError, match="at least one block of 128 tokens"):
        short = text.with_name("short.txt")
        short.write_text("Short.")
        evaluate_texts(fused, {"mine": [short]})
    with pytest.raises(ConfigError, match="128 positions"):
        evaluate_texts(fused, {"mine": [text]}, block_size=256)
