"""Where models are put, and what a machine refuses before it starts."""

import json
import os
import struct

import pytest
import torch

from molora_fed.errors import ComputeError
from molora_fed.models import base as base_module
from molora_fed.models import runtime
from molora_fed.models.base import fetch_base, load_base
from molora_fed.models.fingerprints import count_tensors
from molora_fed.models.runtime import Placement, check_memory, choose_placement, format_bytes
from molora_fed.storage.compute import Compute


def test_auto_is_an_accelerator_where_there_is_one_and_the_usual_dtype(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_placement(Compute()) == Placement(torch.device("cpu"), torch.float32)
    assert choose_placement(Compute(), "bfloat16").dtype is torch.bfloat16
    assert choose_placement(Compute(dtype="float32"), "bfloat16").dtype is torch.float32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_placement(Compute()).device == torch.device("cuda", 0)
    assert choose_placement(Compute(device="cuda:1")).device == torch.device("cuda", 1)


def test_a_device_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ComputeError, match=r"'cuda:1'.*none that torch can use.*--device cpu"):
        choose_placement(Compute(device="cuda:1"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ComputeError, match=r"'cuda:2'.*got 2 of them"):
        choose_placement(Compute(device="cuda:2"))


def test_a_dtype_that_the_device_lacks_is_named(monkeypatch):
    class Elsewhere:
        def __init__(self, device):
            pass

        __enter__ = __exit__ = lambda self, *arguments: None

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", Elsewhere)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old One")
    with pytest.raises(ComputeError, match=r"bfloat16 on 'cuda:0'.*Old One.*--dtype float32"):
        choose_placement(Compute(dtype="bfloat16"))
    assert choose_placement(Compute()).dtype is torch.float32


def test_a_base_larger_than_the_memory_is_refused_before_it_is_read(
    tiny_checkpoint, monkeypatch, tmp_path
):
    folder = tiny_checkpoint()
    needed = sum(p.numel() for p in load_base(folder).model.parameters()) * 4
    monkeypatch.setattr(runtime, "find_free_bytes", lambda device: needed // 2)
    with pytest.raises(
        ComputeError, match=r"needs about .* on cpu, .* free\. Use --dtype"
    ) as found:
        load_base(folder)
    assert "\n" not in str(found.value) and format_bytes(needed // 2) in str(found.value)
    # Neither hashed nor copied before: of a large base either takes minutes.
    monkeypatch.setattr(base_module, "fingerprint_weights", None)
    monkeypatch.setattr(base_module, "copy_base", None)
    for refused in (lambda: load_base(folder), lambda: fetch_base(str(folder), tmp_path / "base")):
        with pytest.raises(ComputeError, match="needs about"):
            refused()
    assert not (tmp_path / "base").exists()
    monkeypatch.setattr(runtime, "find_free_bytes", lambda device: needed // 4)
    with pytest.raises(ComputeError, match=r"free\. Use another --device"):
        load_base(folder, Placement(dtype=torch.bfloat16))
    monkeypatch.undo()
    monkeypatch.setattr(runtime, "find_free_bytes", lambda device: int(needed * 0.6))
    assert load_base(folder, Placement(dtype=torch.bfloat16)).model.dtype is torch.bfloat16


def test_tensors_of_a_file_larger_than_any_memory_are_counted(tmp_path):
    """Before it is known whether the model fits; the file is one hole, and takes no disk."""
    size = 2**42
    header = json.dumps({"a": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}})
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode())
    os.truncate(path, 8 + len(header) + size)
    assert count_tensors(tmp_path) == 1


def test_what_fits_is_let_through():
    check_memory(1, torch.device("cpu"), what="Cannot", fix="")
    with pytest.raises(ComputeError, match=r"Cannot: needs about 1000000000\.0 GB on cpu"):
        check_memory(10**18, torch.device("cpu"), what="Cannot", fix="")
