"""Adapters from outside: each bad file is one line that names the adapter and what is wrong."""

import json
import os
import pickle
import tracemalloc

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from molora_fed.adapters.files import (
    CONFIG_FILE,
    META_FILE,
    WEIGHTS_FILE,
    check_adapter_fits,
    hash_adapter_files,
    load_adapter,
    load_tensors,
)
from molora_fed.adapters.save import save_adapter
from molora_fed.charter import AdapterRules
from molora_fed.errors import AdapterError, IncompatibleAdapterError, UnknownNameError
from molora_fed.storage.files import hash_file
from molora_fed.testing.models import build_random_adapter


@pytest.fixture(params=["lora", "delta"])
def saved(request, tiny_model, tmp_path):
    """(model, folder) of a good adapter, to be spoiled."""
    model = tiny_model("gpt_neox")
    adapter = build_random_adapter(model, kind=request.param, rank=3)
    save_adapter(adapter, model, tmp_path / "adapter")
    return model, tmp_path / "adapter"


def refused(folder, error=AdapterError, model=None, rules=None):
    """The one line it is refused with, on reading or (with a model) on checking."""
    with pytest.raises(error) as caught:
        adapter = load_adapter(folder, name="legal-07", rules=rules)
        assert model is not None, "was read"
        check_adapter_fits(adapter, model, rules=rules)
    line = str(caught.value)
    assert "'legal-07'" in line
    assert "expected" in line and "got" in line
    assert "\n" not in line
    return line


def read_copies(folder):
    """Copies, as the tensors that safetensors returns are the mapped file itself."""
    return {key: tensor.clone() for key, tensor in load_file(folder / WEIGHTS_FILE).items()}


def change(folder, edit):
    tensors = read_copies(folder)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


def first_key(folder):
    return next(iter(sorted(load_file(folder / WEIGHTS_FILE))))


def layout_of(adapter):
    """All that an adapter is but its numbers."""
    tensors = {
        (name, part): (tuple(tensor.shape), tensor.dtype)
        for name, update in adapter.updates.items()
        for part, tensor in update.tensors().items()
    }
    scales = {name: update.scale for name, update in adapter.updates.items()}
    return adapter.kind, adapter.frozen_depth, scales, tensors


@pytest.mark.parametrize("kind", ["lora", "svd", "delta"])
@pytest.mark.parametrize("frozen_depth", [0, 1])
def test_round_trip(kind, frozen_depth, model, tmp_path):
    adapter = build_random_adapter(model, kind=kind, rank=3, frozen_depth=frozen_depth)
    save_adapter(adapter, model, tmp_path / "a")
    loaded = load_adapter(tmp_path / "a")
    assert (loaded.kind, loaded.frozen_depth) == (kind, frozen_depth)
    assert loaded.name == str(tmp_path / "a")
    assert loaded.updates.keys() == adapter.updates.keys()
    for name, update in adapter.updates.items():
        other = loaded.updates[name]
        assert other.scale == pytest.approx(update.scale, rel=1e-12)
        assert other.tensors().keys() == update.tensors().keys()
        for part, tensor in update.tensors().items():
            assert torch.equal(other.tensors()[part], tensor)
    check_adapter_fits(loaded, model, rules=AdapterRules(frozen_depth=frozen_depth))


def test_hash_is_of_the_files_and_nothing_beside_them(saved, tmp_path):
    _, folder = saved
    before = hash_adapter_files(folder)
    assert load_adapter(folder).hash == before
    (folder / "README.md").write_text("notes")
    folder.rename(tmp_path / "other")
    assert load_adapter(tmp_path / "other").hash == before
    change(tmp_path / "other", lambda t: t[sorted(t)[0]].add_(1))
    assert load_adapter(tmp_path / "other").hash != before


def test_reading_changes_no_byte(saved):
    _, folder = saved
    before = {path.name: hash_file(path) for path in folder.iterdir()}
    load_adapter(folder)
    assert {path.name: hash_file(path) for path in folder.iterdir()} == before


def test_adapter_outlives_its_file(saved):
    _, folder = saved
    adapter = load_adapter(folder)
    parts = [t.clone() for u in adapter.updates.values() for t in u.tensors().values()]
    (folder / WEIGHTS_FILE).write_bytes(b"")
    after = [t for u in adapter.updates.values() for t in u.tensors().values()]
    assert all(torch.equal(a, b) for a, b in zip(parts, after, strict=True))


def test_truncated(saved):
    _, folder = saved
    data = (folder / WEIGHTS_FILE).read_bytes()
    for length in (0, 5, 8, 100, len(data) // 2, len(data) - 1):
        (folder / WEIGHTS_FILE).write_bytes(data[:length])
        assert "truncated" in refused(folder)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_damage_is_refused_or_read_as_the_same_layout(saved, data):
    _, folder = saved
    weights = folder / WEIGHTS_FILE
    good, layout = weights.read_bytes(), layout_of(load_adapter(folder))
    where = data.draw(st.integers(0, min(len(good) - 1, 3000)))
    damaged = bytearray(good)
    damaged[where] ^= data.draw(st.integers(1, 255))
    weights.write_bytes(bytes(damaged))
    try:
        assert layout_of(load_adapter(folder, name="legal-07")) == layout
    except AdapterError as error:
        assert "'legal-07'" in str(error) and "\n" not in str(error)
    finally:
        weights.write_bytes(good)


@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_pickle_renamed(saved, writer):
    _, folder = saved
    tensors = read_copies(folder)
    if writer == "torch":
        torch.save(tensors, folder / WEIGHTS_FILE)
    else:
        (folder / WEIGHTS_FILE).write_bytes(pickle.dumps(tensors))
    assert "a pickle" in refused(folder)


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_header_whose_length_begins_like_a_pickle(tmp_path, length):
    path = tmp_path / WEIGHTS_FILE
    tensors = {"a": torch.ones(2)}
    bare = int.from_bytes(save(tensors, metadata={"pad": ""})[:8], "little")
    data = save(tensors, metadata={"pad": "x" * (length - bare)})
    assert data[:1] == b"\x80" and int.from_bytes(data[:8], "little") == length
    path.write_bytes(data)
    loaded = load_tensors(path, "legal-07", max_bytes=None, check=lambda headers: None)
    assert torch.equal(loaded["a"], tensors["a"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite(saved, value):
    model, folder = saved
    key = first_key(folder)
    change(folder, lambda t: t[key].view(-1)[-1:].fill_(value))
    line = refused(folder, IncompatibleAdapterError, model)
    assert "expected finite numbers" in line
    assert key.removeprefix("base_model.model.").rpartition(".")[0].rpartition(".lora_")[0] in line


def test_extra_tensor(saved):
    _, folder = saved
    change(folder, lambda t: t.update({"lm_head.weight": torch.zeros(2, 2)}))
    assert "extra tensor 'lm_head.weight'" in refused(folder)


def test_missing_tensor(saved):
    _, folder = saved
    key = first_key(folder)
    change(folder, lambda t: t.pop(key))
    assert "missing tensor" in refused(folder)


def test_no_tensor(saved):
    _, folder = saved
    save_file({}, folder / WEIGHTS_FILE)
    refused(folder)


def test_wrong_shape(saved):
    model, folder = saved

    def widen(tensors):
        for key in sorted(tensors):
            if tensors[key].ndim == 2 and not key.endswith("lora_B.weight"):
                tensors[key] = torch.zeros(tensors[key].shape[0], 7)
                return

    change(folder, widen)
    line = refused(folder, IncompatibleAdapterError, model)
    assert "expected a change of shape (32, 32), got (32, 7)" in line


def test_wrong_number_of_dimensions(saved):
    _, folder = saved
    key = first_key(folder)
    change(folder, lambda t: t.update({key: torch.zeros(2, 3, 4)}))
    assert "(2, 3, 4)" in refused(folder)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.uint8, torch.bool])
def test_wrong_dtype(saved, dtype):
    _, folder = saved
    key = first_key(folder)
    change(folder, lambda t: t.update({key: t[key].to(dtype)}))
    line = refused(folder)
    assert "tensors of F32, F16, BF16" in line and key in line


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_accepted(saved, dtype):
    model, folder = saved
    change(folder, lambda t: t.update({k: v.to(dtype) for k, v in t.items()}))
    check_adapter_fits(load_adapter(folder), model)


def test_rank_over_the_limit(tiny_model, tmp_path):
    model = tiny_model()
    save_adapter(build_random_adapter(model, rank=9), model, tmp_path / "a")
    load_adapter(tmp_path / "a", rules=AdapterRules(max_rank=9))
    line = refused(tmp_path / "a", rules=AdapterRules(max_rank=8))
    assert "rank 9 above the charter's 8" in line


def test_limits_count_before_anything_is_allocated(tiny_model, tmp_path):
    model = tiny_model()
    save_adapter(build_random_adapter(model), model, tmp_path / "a")
    weights = tmp_path / "a" / WEIGHTS_FILE
    rank = 2**30
    name = next(iter(build_random_adapter(model).updates))
    shapes = {"A": [rank, 1], "B": [1, rank]}
    start = 0
    header = {}
    for part, shape in shapes.items():
        key = f"base_model.model.{name}.lora_{part}.weight"
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [start, start + 4 * rank]}
        start += 4 * rank
    text = json.dumps(header).encode()
    with weights.open("wb") as file:  # sparse: 8 GiB that no disk and no memory holds
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + start)
    config = json.loads((tmp_path / "a" / CONFIG_FILE).read_text())
    (tmp_path / "a" / CONFIG_FILE).write_text(json.dumps({**config, "target_modules": [name]}))
    tracemalloc.start()
    assert f"at most {2**20} bytes" in refused(tmp_path / "a", rules=AdapterRules(max_bytes=2**20))
    # Even where the bytes are allowed, the header's rank decides before the tensors are read.
    generous = AdapterRules(max_bytes=2**40)
    assert f"rank {rank} and {rank} instead of 4" in refused(tmp_path / "a", rules=generous)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_header_that_claims_too_much(saved):
    _, folder = saved
    (folder / WEIGHTS_FILE).write_bytes((2**40).to_bytes(8, "little") + b"{}")
    assert "header of 1099511627776" in refused(folder)


def test_header_over_the_limit(saved):
    _, folder = saved
    data = (folder / WEIGHTS_FILE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, tensors = data[8 : 8 + length], data[8 + length :]
    limit = 16 * 2**20
    for size in (limit, limit + 8):  # JSON may be followed by spaces
        padded = size.to_bytes(8, "little") + header.ljust(size) + tensors
        (folder / WEIGHTS_FILE).write_bytes(padded)
        if size == limit:
            load_adapter(folder)
        else:
            assert f"header of {size}" in refused(folder)


@pytest.mark.parametrize("file", [WEIGHTS_FILE, CONFIG_FILE])
def test_missing_file(saved, file):
    _, folder = saved
    (folder / file).unlink()
    assert f"a file '{file}'" in refused(folder)


def test_no_folder(tmp_path):
    assert "no such folder" in refused(tmp_path / "nowhere")


@pytest.mark.parametrize("file", [WEIGHTS_FILE, CONFIG_FILE, META_FILE])
def test_a_pipe_is_not_waited_for(saved, file):
    _, folder = saved
    (folder / file).unlink()
    os.mkfifo(folder / file)
    assert "a regular file" in refused(folder)


@pytest.mark.parametrize("file", [CONFIG_FILE, META_FILE])
@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "null", "\xff", "[" * 100_000, '{"a": ' * 100_000, "x" * (2**20 + 1)]
)
def test_broken_json(saved, file, text):
    _, folder = saved
    (folder / file).write_text(text, encoding="latin-1")
    assert file in refused(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"format_version": 2},
        {"frozen_depth": -1},
        {"frozen_depth": "0"},
        {"kind": "../lora"},
        {"base_weights": "x"},
        {"unknown": 1},
    ],
)
def test_broken_meta(saved, changes):
    _, folder = saved
    meta = json.loads((folder / META_FILE).read_text())
    (folder / META_FILE).write_text(json.dumps({**meta, **changes}))
    assert next(iter(changes)) in refused(folder)


def test_broken_delta_config(saved):
    _, folder = saved
    (folder / META_FILE).write_text(
        json.dumps({"format_version": 1, "kind": "delta", "frozen_depth": 0})
    )
    for config in ({}, {"kind": "delta", "tensors": [1]}, {"kind": "lora", "tensors": []}):
        (folder / CONFIG_FILE).write_text(json.dumps(config))
        assert "list of tensors" in refused(folder)


def test_kind_the_charter_does_not_accept(saved):
    _, folder = saved
    kind = load_adapter(folder).kind
    line = refused(folder, rules=AdapterRules(kinds=("svd",)))
    assert f"a kind among svd, got '{kind}'" in line


def test_kind_nobody_registered(saved):
    _, folder = saved
    meta = json.loads((folder / META_FILE).read_text())
    (folder / META_FILE).write_text(json.dumps({**meta, "kind": "lorra"}))
    with pytest.raises(UnknownNameError, match=r"Did you mean 'lora'\?"):
        load_adapter(folder)


def test_writing_is_whole_or_not_at_all(tiny_model, tmp_path, monkeypatch):
    model = tiny_model()
    save_adapter(build_random_adapter(model, seed=1), model, tmp_path / "a")
    before = hash_adapter_files(tmp_path / "a")

    def fail(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("molora_fed.adapters.files.write_json", fail)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(build_random_adapter(model, seed=2), model, tmp_path / "a")
    assert hash_adapter_files(tmp_path / "a") == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_link_to_a_name_that_no_disk_can_hold_is_a_missing_file(saved):
    _, folder = saved
    for file in (CONFIG_FILE, WEIGHTS_FILE, META_FILE):
        (folder / file).unlink()
        (folder / file).symlink_to("x" * 300)
        refused(folder)
