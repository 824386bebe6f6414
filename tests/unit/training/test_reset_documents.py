"""Documents of a block that are trained on alone: their positions start at 0, none sees another."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_helpers import RULES, TRAINING, build_blocks, build_tokens
from transformers import AutoModelForCausalLM, BloomConfig, MambaConfig

from molora_fed.errors import TrainingError
from molora_fed.models.base import load_base
from molora_fed.models.forward import compute_block_losses
from molora_fed.models.head import find_head
from molora_fed.models.runtime import Placement
from molora_fed.models.states import can_reset, compute_positions
from molora_fed.testing.models import ARCHITECTURES, build_tiny_model
from molora_fed.training.choices import TrainingChoices
from molora_fed.training.language_model import TrainConfig, _BlockLoss, train
from molora_fed.training.launching import ARRAYS
from molora_fed.training.specialists import train_specialist
from molora_fed.types import Split

SIZE = 32
CONFIG = TrainConfig(
    steps=4, batch=2, learning_rate=1e-2, seed=5, threads=1, validate_every=2, accumulation=1
)
MODELS = {name: build_tiny_model(name) for name in ("gpt_neox", "llama")}
RESET = TrainingChoices(reset_documents=True)


@st.composite
def packed(draw):
    """A block of several documents: tokens (1, T), and where they start (1, T)."""
    starts = np.zeros((1, SIZE), dtype=np.bool_)
    starts[0, sorted(draw(st.sets(st.integers(1, SIZE - 1), min_size=1, max_size=6)))] = True
    starts[0, 0] = True
    seed = draw(st.integers(0, 2**16))
    tokens = np.random.default_rng(seed).integers(0, 257, (1, SIZE)).astype(np.int32)
    return tokens, starts


def list_documents(tokens, starts):
    return np.split(tokens[0], np.flatnonzero(starts[0])[1:])


def sum_alone(model, documents):
    """Losses of documents, each in a pass of its own: their sum, and how many there are."""
    losses = [
        compute_block_losses(model, document[None]).double()
        for document in documents
        if len(document) > 1
    ]
    return sum(float(each.sum()) for each in losses), sum(each.numel() for each in losses)


def build_loss(model, tokens, starts, targets=None, **more):
    config = replace(CONFIG, batch=len(tokens), **more)
    head = find_head(model)
    return _BlockLoss(model, head, tokens, targets, config, Placement(), starts=starts)


@pytest.mark.parametrize("architecture", ["gpt_neox", "llama"])
@given(block=packed())
@settings(max_examples=25)
def test_each_document_of_a_block_has_the_loss_that_it_has_alone(architecture, block):
    model = MODELS[architecture]
    tokens, starts = block
    documents = list_documents(tokens, starts)
    positions = compute_positions(torch.from_numpy(starts[:, :-1]))
    losses = find_head(model).compute_losses(
        torch.from_numpy(tokens).long(), position_ids=positions
    )[0]
    first = 0
    for document in documents:
        if len(document) > 1:
            alone = compute_block_losses(model, document[None])[0]
            torch.testing.assert_close(
                losses[first : first + len(alone)], alone, rtol=1e-4, atol=1e-4
            )
        first += len(document)
    total, count = sum_alone(model, documents)
    (found,) = build_loss(model, tokens, starts)(0)
    assert float(found) * max(count, 1) == pytest.approx(total, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("in_parts", [1, 3])
def test_a_batch_has_the_gradient_of_its_documents_alone(
    tiny_model, architecture, checkpointing, in_parts
):
    model = tiny_model(architecture).requires_grad_(True)
    random = np.random.default_rng(3)
    tokens = random.integers(0, 257, (3, SIZE)).astype(np.int32)
    starts = random.random(tokens.shape) < 0.1
    starts[:, 0] = True
    targets = random.random(tokens.shape) < 0.7
    weight = model.get_input_embeddings().weight
    loss = build_loss(model, tokens, starts, targets, accumulation=in_parts)  # splits the head
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
    for part in loss(0):
        part.backward()
    found, weight.grad = weight.grad, None
    model.activation_checkpointing_disable()
    model.eval()
    count = int((targets & ~starts)[:, 1:].sum())
    for row, begins, counts in zip(tokens, starts, targets, strict=True):
        places = np.flatnonzero(begins)[1:]
        for document, own in zip(np.split(row, places), np.split(counts, places), strict=True):
            if len(document) > 1:
                ids = torch.from_numpy(document[None]).long()
                losses = find_head(model).compute_losses(ids)[0]
                (losses * torch.from_numpy(own[1:])).sum().div(count).backward()
    torch.testing.assert_close(found, weight.grad, rtol=1e-3, atol=1e-5)


def test_without_it_a_document_sees_the_one_before_it(tiny_model):
    model, tokens = tiny_model(), build_tokens(1, length=SIZE)
    starts = np.zeros(tokens.shape, dtype=np.bool_)
    starts[:, [0, 12]] = True
    total, count = sum_alone(model, list_documents(tokens, starts))
    (alone,) = build_loss(model, tokens, starts)(0)
    (together,) = build_loss(model, tokens, None, ~starts)(0)
    assert float(alone) == pytest.approx(total / count, rel=1e-5)
    assert abs(float(together) - total / count) > 1e-3


def test_positions_begin_at_every_start():
    starts = torch.tensor([[1, 0, 0, 1, 1, 0], [0, 0, 1, 0, 0, 0]]).bool()
    assert compute_positions(starts).tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 0, 1, 2, 3]]


SMALL = {"hidden_size": 32, "vocab_size": 257, "bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(num_hidden_layers=2, **SMALL),  # carries a state, takes no positions
        BloomConfig(n_layer=2, n_head=4, **SMALL),  # takes no positions
    ],
    ids=lambda config: config.model_type,
)
def test_a_base_that_cannot_is_refused_in_one_line(config, tmp_path):
    model = AutoModelForCausalLM.from_config(config).eval()
    assert not can_reset(model)
    tokens, starts = build_tokens(4), np.zeros((4, 24), dtype=np.bool_)
    with pytest.raises(TrainingError, match=r"on each document .* with '.*--reset-documents") as e:
        train(
            model, list(model.parameters()), tokens, tokens, CONFIG, tmp_path, train_starts=starts
        )
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bases_whose_attention_follows_positions_can(tiny_model, architecture, dtype):
    assert can_reset(tiny_model(architecture).to(dtype))


def build_documents(split, count, seed):
    """Blocks of counting rows in which a document starts in the middle of each."""
    blocks = build_blocks(split, count, seed)
    owners = np.arange(2 * count, dtype=np.int32).reshape(count, 2)
    return replace(blocks, documents=owners.repeat(12, axis=1))


def train_documents(base, folder, choices=None, progress=None):
    return train_specialist(
        base,
        build_documents(Split.TRAIN, 40, 1),
        build_documents(Split.VALIDATION, 8, 2),
        kind="svd",
        rules=RULES,
        training=TRAINING,
        seed=3,
        threads=1,
        folder=folder,
        choices=choices,
        progress=progress,
    )


def test_a_specialist_says_that_its_documents_were_trained_on_alone(tiny_checkpoint, tmp_path):
    base = load_base(tiny_checkpoint("llama"))
    alone = train_documents(base, tmp_path / "alone", RESET)
    together = train_documents(base, tmp_path / "together")
    assert alone.record["reset_documents"] is True
    assert not {"reset_documents", "train_starts"} & set(together.record)
    assert alone.adapter_hash != together.adapter_hash
    assert alone.loss < alone.base_loss
    # What is measured is measured over whole blocks, whichever way was trained.
    assert alone.base_loss == together.base_loss
    assert alone.record["initial_loss"] == together.record["initial_loss"]
    for folder, choices in (("alone", None), ("together", RESET)):
        with pytest.raises(TrainingError, match="differs in reset_documents, train_starts"):
            train_documents(base, tmp_path / folder, choices)


def test_an_interrupted_training_keeps_to_it(tiny_checkpoint, tmp_path):
    base = load_base(tiny_checkpoint())

    class Stopped(Exception):
        pass

    def stop(done, total, **fields):
        if done >= 6:
            raise Stopped

    whole = train_documents(base, tmp_path / "whole", RESET)
    with pytest.raises(Stopped):
        train_documents(base, tmp_path / "broken", RESET, stop)
    with pytest.raises(TrainingError, match="Cannot resume"):
        train_documents(base, tmp_path / "broken")
    assert train_documents(base, tmp_path / "broken", RESET).adapter_hash == whole.adapter_hash


def test_it_is_a_choice_that_is_kept_and_sent_to_launched_processes():
    assert RESET.describe() == {"reset_documents": True}
    assert TrainingChoices().describe() == {}
    assert "train_starts" in ARRAYS
