"""Fingerprints of a checkpoint: what they are of, and when one that was kept still counts."""

import hashlib
import json
import os
import shutil
import tracemalloc

import pytest
import torch
from safetensors.torch import load_file, save_file

from molora_fed.errors import BaseCheckpointError
from molora_fed.models import fingerprints
from molora_fed.models.base import load_base
from molora_fed.models.fingerprints import (
    fingerprint_checkpoint,
    fingerprint_tensors,
    fingerprint_weights,
)
from molora_fed.storage.files import canonical_json, hash_file

WEIGHTS = "model.safetensors"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of kept fingerprints, where small checkpoints and fresh files count, too."""
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprints, "KEPT_FROM_BYTES", 0)
    monkeypatch.setattr(fingerprints, "_SETTLED_SECONDS", 0.0)
    return tmp_path / "cache" / "fingerprints"


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    """A checkpoint that may be changed."""
    return shutil.copytree(tiny_checkpoint("llama"), tmp_path / "base")


@pytest.fixture
def count_reads(monkeypatch):
    """How often weights were read so far."""
    reads, real = [], fingerprints._hash_tensors

    def hash_tensors(*arguments, **more):
        reads.append(1)
        return real(*arguments, **more)

    monkeypatch.setattr(fingerprints, "_hash_tensors", hash_tensors)
    return lambda: len(reads)


def change(folder, by=1.0):
    """Other weights of the same size, in the same file."""
    tensors = load_file(folder / WEIGHTS)
    name = min(tensors)
    tensors[name] = tensors[name] + by
    save_file(tensors, folder / "other.safetensors", metadata={"format": "pt"})
    (folder / WEIGHTS).write_bytes((folder / "other.safetensors").read_bytes())
    (folder / "other.safetensors").unlink()


def test_they_are_over_names_types_shapes_and_bytes(folder):
    tensors = load_file(folder / WEIGHTS)
    kinds = {torch.float32: "F32", torch.bfloat16: "BF16"}
    whole = hashlib.sha256()
    for name in sorted(tensors):
        head = canonical_json([name, kinds[tensors[name].dtype], list(tensors[name].shape)])
        whole.update(head + b"\n" + tensors[name].numpy().tobytes())
    found, each = fingerprint_tensors(folder)
    assert found == whole.hexdigest() == fingerprint_weights(folder)
    assert each.keys() == tensors.keys()
    known = fingerprint_checkpoint(folder)
    assert known.files[WEIGHTS] == hash_file(folder / WEIGHTS)


def test_what_did_not_change_is_read_once(folder, cache, count_reads):
    first = load_base(folder)
    assert count_reads() == 1 and len(list(cache.iterdir())) == 1
    second = load_base(folder)
    assert count_reads() == 1
    assert second.whole_identity() == first.whole_identity()
    os.rename(folder, folder.with_name("moved"))
    assert fingerprint_weights(folder.with_name("moved")) == first.weights
    assert count_reads() == 1


def replace_file(folder):
    """Another file of the same name, size and time of change."""
    before = (folder / WEIGHTS).stat()
    other = shutil.copytree(folder, folder.with_name("other"))
    change(other)
    os.utime(other / WEIGHTS, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other / WEIGHTS, folder / WEIGHTS)


def write_over(folder):
    """Other bytes in the same file, whose time of change is set back."""
    before = (folder / WEIGHTS).stat()
    change(folder)
    os.utime(folder / WEIGHTS, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("cheat", [change, replace_file, write_over])
def test_what_changed_is_read_again_whatever_its_size_and_time_say(
    folder, cache, count_reads, cheat
):
    before = fingerprint_checkpoint(folder)
    size = (folder / WEIGHTS).stat().st_size
    cheat(folder)
    assert (folder / WEIGHTS).stat().st_size == size
    after = fingerprint_checkpoint(folder)
    assert count_reads() == 2
    assert after.weights != before.weights and after.files != before.files
    assert after.files[WEIGHTS] == hash_file(folder / WEIGHTS)


def test_another_file_beside_unchanged_weights_is_seen(folder, cache, count_reads):
    before = fingerprint_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    after = fingerprint_checkpoint(folder)
    assert count_reads() == 2 and after.weights == before.weights
    assert after.files["config.json"] != before.files["config.json"]


def test_a_file_that_changed_a_moment_ago_is_not_kept(folder, cache, monkeypatch):
    monkeypatch.setattr(fingerprints, "_SETTLED_SECONDS", 3_600.0)
    fingerprint_checkpoint(folder)
    assert not cache.exists()


def test_a_small_checkpoint_is_not_kept(folder, cache, monkeypatch):
    monkeypatch.setattr(fingerprints, "KEPT_FROM_BYTES", 2**24)
    told = []
    fingerprint_checkpoint(folder, lambda *counts: told.append(counts))
    assert not cache.exists() and not told


@pytest.mark.parametrize(
    "spoil",
    [
        lambda entry, value: entry.chmod(0o666),  # others may have written it
        lambda entry, value: entry.write_bytes(b"{"),
        lambda entry, value: entry.write_text(json.dumps({**value, "format_version": 0})),
        lambda entry, value: entry.write_text(json.dumps({**value, "marks": {}})),
        lambda entry, value: entry.write_text(json.dumps({**value, "files": {}})),
        lambda entry, value: entry.write_text("[" * 100_000),
        lambda entry, value: (entry.unlink(), entry.mkdir()),
    ],
)
def test_an_entry_that_is_not_ours_or_not_whole_does_not_count(folder, cache, count_reads, spoil):
    expected = fingerprint_checkpoint(folder)
    (entry,) = cache.iterdir()
    spoil(entry, json.loads(entry.read_text()))
    assert fingerprint_checkpoint(folder) == expected
    assert count_reads() == 2


def test_entries_are_closed_to_others_and_few(folder, cache, monkeypatch):
    monkeypatch.setattr(fingerprints, "_MAX_ENTRIES", 2)
    for by in range(4):
        change(folder, float(by + 1))
        fingerprint_checkpoint(folder)
    assert len(list(cache.iterdir())) == 2
    assert cache.stat().st_mode & 0o077 == 0
    assert all(entry.stat().st_mode & 0o077 == 0 for entry in cache.iterdir())


def test_a_cache_that_cannot_be_written_costs_time_alone(folder, cache):
    cache.parent.write_text("no folder")
    assert fingerprint_checkpoint(folder) == fingerprint_checkpoint(folder)


def build_large(folder, count=10, numbers=2**20):
    """A checkpoint of 4 * count * numbers bytes, in two files."""
    folder.mkdir()
    names = [f"layer.{i}" for i in range(count)]
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, inside in shards.items():
        save_file({n: torch.full((numbers,), float(len(n))) for n in inside}, folder / file)
    places = {name: file for file, inside in shards.items() for name in inside}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return 4 * count * numbers


def test_a_large_one_is_read_in_pieces_and_told(tmp_path, monkeypatch):
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))
    size = build_large(tmp_path / "large")
    told = []
    tracemalloc.start()
    try:
        fingerprint_checkpoint(tmp_path / "large", lambda done, total: told.append((done, total)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < size / 3
    assert len(told) > 5 and told == sorted(told)
    assert told[-1][0] == pytest.approx(told[-1][1], abs=1)
    assert told[-1][1] == pytest.approx(2 * size / 1e6, abs=2)  # as tensors and as files


def test_a_file_cut_short_is_one_line(folder):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BaseCheckpointError, match="expected whole safetensors files") as error:
        fingerprint_checkpoint(folder)
    assert "\n" not in str(error.value)
