import logging

import numpy as np
import pytest
import torch

from molora_fed.bank import Expert, build_calibration_bank
from molora_fed.bank.prune import prune_bank
from molora_fed.corpus.blocks import Blocks
from molora_fed.models import batches
from molora_fed.models.base import load_base
from molora_fed.models.batches import (
    PassBytes,
    choose_batch,
    fit_batch,
    halve_until,
    list_batches,
)
from molora_fed.types import Split

NEEDS = PassBytes(weights=2**30, fixed=2**29, per_token=2**18)


@pytest.fixture
def base(tiny_checkpoint):
    return load_base(tiny_checkpoint("llama"))


def make_blocks(count):
    tokens = np.arange(count * 32, dtype=np.int32).reshape(count, 32) % 250
    rows = np.zeros_like(tokens)
    return Blocks("text", Split.CALIBRATION, tokens, rows, rows.copy())


def give_memory(monkeypatch, base, batch):
    """A device on which a pass of so many blocks of 32 tokens just fits."""
    monkeypatch.setattr(batches, "_STEP", 1)
    needs = PassBytes.of(base.model, 32)
    memory = needs.weights + 2 * needs.count(batch * 32)
    monkeypatch.setattr(batches, "find_memory_bytes", lambda device: memory)


def test_a_pass_is_of_as_many_tokens_however_long_the_blocks_are():
    assert [choose_batch(size) for size in (32, 128, 512, 2_048, 4_096)] == [16, 16, 4, 1, 1]


def test_fewer_blocks_where_memory_does_not_suffice():
    wanted, size = 16, 128
    assert halve_until(wanted, size, NEEDS, 2**34) == 16
    exact = NEEDS.weights + 2 * NEEDS.count(4 * size)
    assert halve_until(wanted, size, NEEDS, exact) == 4
    less = halve_until(wanted, size, NEEDS, exact - 1)  # of the step of memory below
    assert less < 4 and halve_until(wanted, size, NEEDS, exact - 2**27) == less
    assert halve_until(wanted, size, NEEDS, 0) == 1
    for memory in range(2**30, 2**33, 2**28):
        found = halve_until(13, size, NEEDS, memory)
        assert found in list_batches(13) == [13, 6, 3, 1]
        assert halve_until(found, size, NEEDS, memory) == found


def test_what_a_pass_takes_follows_model_and_blocks(base):
    short, long = PassBytes.of(base.model, 32), PassBytes.of(base.model, 64)
    assert long.per_token > short.per_token and long.weights == short.weights
    half = PassBytes.of(base.model.to(torch.bfloat16), 32)
    assert half.weights * 2 == short.weights and half.per_token < short.per_token


def test_the_memory_that_happens_to_be_free_decides_nothing(base, monkeypatch):
    monkeypatch.setattr("molora_fed.models.runtime.find_free_bytes", lambda device: 0)
    assert fit_batch(base.model, 32, 16) == 16


def test_a_bank_takes_fewer_blocks_and_says_so(base, tmp_path, monkeypatch, caplog):
    blocks, ran = make_blocks(8), []

    def watch(module, args, kwargs):
        ran.append(len(kwargs["input_ids"]))

    def build(folder):
        ran.clear()
        handle = base.model.get_decoder().register_forward_pre_hook(watch, with_kwargs=True)
        bank = build_calibration_bank(folder, base, [Expert("base", None)], [blocks], batch=8)
        handle.remove()
        return bank.base_logprob.clone()

    whole = build(tmp_path / "whole")
    assert ran == [8]
    give_memory(monkeypatch, base, 2)
    with caplog.at_level(logging.WARNING):
        parts = build(tmp_path / "parts")
    assert ran == [2, 2, 2, 2]
    assert "2 blocks of 32 tokens per pass instead of 8" in caplog.text
    assert torch.allclose(whole, parts, atol=1e-5)
    build(tmp_path / "parts")
    assert ran == []  # found again
    columns = sorted((tmp_path / "parts").glob("*.bin"))
    freed = prune_bank(
        tmp_path / "parts", base=base.weights, adapters=[], blocks=[blocks.fingerprint], batch=8,
        frozen_depth=0,
    )  # fmt: skip
    assert freed == 0 and sorted((tmp_path / "parts").glob("*.bin")) == columns
