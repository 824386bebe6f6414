"""H7, H9: admission takes time and memory in proportion to the bytes that were sent."""

import json
import resource
import sys
import time

import pytest
import torch
from forking_helpers import run_forked
from safetensors.torch import save_file

from molora_fed.adapters.files import MAX_TENSORS, load_adapter
from molora_fed.adapters.limits import BaseLimits
from molora_fed.adapters.low_rank_files import load_low_rank
from molora_fed.adapters.quantised_files import load_quantised
from molora_fed.charter import AdapterRules
from molora_fed.errors import AdapterError

RULES = AdapterRules()
LENGTH = 40


def write_config(folder, **values):
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q"], **values}
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_factors(folder, names):
    tensors = {}
    for name in names:
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.zeros(1, 1)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.zeros(1, 1)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def measure(load):
    """Processor seconds of a call; the better of two."""
    taken = []
    for _ in range(2):
        start = time.process_time()
        load()
        taken.append(time.process_time() - start)
    return min(taken)


@pytest.mark.parametrize("what", ["patterns", "targets", "endings"])
def test_time_grows_with_the_bytes_not_with_their_square(tmp_path, what):
    def build(count):
        names = [f"m{n:06}.q".rjust(LENGTH, "a") for n in range(count)]
        folder = tmp_path / f"{what}-{count}"
        if what == "patterns":
            other = {f"b{n:06}": 1 for n in range(count)}
            write_config(folder, rank_pattern=other, alpha_pattern=other)
        elif what == "targets":
            write_config(folder, target_modules=names)
        else:
            names = [".".join(["a"] * 60 + [f"m{n:06}", "q"]) for n in range(count)]
            write_config(folder)
        write_factors(folder, names)
        return folder

    small, large = (build(count) for count in (1_000, 8_000))
    ratio = measure(lambda: load_low_rank(large, RULES, "x")) / measure(
        lambda: load_low_rank(small, RULES, "x")
    )
    assert ratio < 24  # 8 if it is linear, 64 if it is quadratic


def test_more_tensors_than_any_base_has_are_refused_by_their_number(tmp_path):
    folder = write_config(tmp_path / "many")
    tensors = {f"t{n}": torch.zeros(0) for n in range(MAX_TENSORS + 1)}
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="at most 65536 tensors, got 65537"):
        load_adapter(folder, rules=RULES, name="legal-1")


def write_bomb(folder, *, rows, columns, rank=None, name="gpt_neox.layers.0.mlp.dense_h_to_4h"):
    """A quantised adapter of 2 bits; its file is as large as its codes."""
    folder.mkdir()
    entry = {"rows": rows, "columns": columns, "rank": rank, "scale": 1.0}
    config = {"format": "quantised", "bits": 2, "group": 65536, "modules": {name: entry}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    parts = (
        {"dense": (rows, columns)} if rank is None else {"a": (rank, columns), "b": (rank, rows)}
    )
    tensors = {}
    for part, (lines, numbers) in parts.items():
        tensors[f"{name}.{part}.codes"] = torch.zeros(lines, -(-numbers // 4), dtype=torch.uint8)
        scales = torch.ones(lines, -(-numbers // 65536), dtype=torch.bfloat16)
        tensors[f"{name}.{part}.scales"] = scales
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "molora_adapter.json").write_text(
        json.dumps({"format_version": 1, "kind": "delta" if rank is None else "lora",
                    "frozen_depth": 0, "base_weights": ""})
    )  # fmt: skip
    return folder


@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        ({"rows": 4096, "columns": 4096}, r"shape \(4096, 4096\) instead of \(48, 32\)"),
        ({"rows": 48, "columns": 32, "rank": 40}, "rank 40 above its 32 dimensions"),
        ({"rows": 48, "columns": 32, "name": "elsewhere"}, "no linear layer of the base"),
        ({"rows": 48, "columns": 32, "rank": 65}, "above the charter's 64"),
    ],
)
def test_shapes_are_held_against_the_base_before_anything_is_expanded(
    tmp_path, tiny_model, monkeypatch, sizes, found
):
    folder = write_bomb(tmp_path / "bomb", **sizes)

    def expand(*_):
        raise AssertionError("expanded")

    monkeypatch.setattr("molora_fed.adapters.quantised_files._unpack", expand)
    with pytest.raises(AdapterError, match=found):
        load_adapter(folder, rules=RULES, model=tiny_model(), name="legal-1")


FACTOR = 20
"""Bytes of memory that reading a quantised file takes at most for each of its own."""
SLACK = 96 * 2**20


def load_within(folder, limit):
    """Read a file in a process that may not take more address space than so many bytes beside."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + limit, now + limit))
    adapter = load_quantised(folder, RULES, "x")
    sys.stdout.write(
        str(sum(t.nbytes for u in adapter.updates.values() for t in u.tensors().values()))
    )


@pytest.mark.parametrize("rank", [None, 64])
def test_memory_is_a_stated_multiple_of_the_files_bytes(tmp_path, rank):
    sizes = {"rows": 8192, "columns": 8192} if rank is None else {"rows": 2**20, "columns": 64}
    folder = write_bomb(tmp_path / "large", rank=rank, **sizes)
    size = (folder / "adapter_model.safetensors").stat().st_size
    assert size > 16 * 10**6
    ended = run_forked(tmp_path / "said", load_within, folder, FACTOR * size + SLACK)
    assert ended.code == 0, ended.err[-500:]
    assert int(ended.out) > 15 * size  # all its numbers are there


def test_limits_know_the_bases_layers(tiny_model):
    model = tiny_model("gpt2")
    limits = BaseLimits.of(RULES, model)
    assert limits.max_rank == RULES.max_rank
    assert limits.layers["transformer.h.0.attn.c_attn"] == (96, 32)
    assert limits.find_misfit("transformer.h.0.attn.c_attn", (96, 32), 32) is None
