"""Quantised adapters on disk: read as written, and refused by name if they are not as described."""

import json
import tracemalloc

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file

from molora_fed.adapters.contract import LinearOptions
from molora_fed.adapters.files import (
    CONFIG_FILE,
    META_FILE,
    WEIGHTS_FILE,
    check_adapter_fits,
    find_non_finite,
    load_adapter,
)
from molora_fed.adapters.save import save_adapter
from molora_fed.charter import AdapterRules
from molora_fed.errors import AdapterError
from molora_fed.storage.files import hash_file
from molora_fed.testing.models import build_random_adapter

INT4 = LinearOptions(precision="int4", group=16)


@pytest.fixture(params=["lora", "delta"])
def saved(request, tiny_model, tmp_path):
    """Folder of a good adapter of 4 bits, to be spoiled."""
    model = tiny_model("gpt_neox")
    adapter = build_random_adapter(model, kind=request.param, rank=3)
    save_adapter(adapter, model, tmp_path / "adapter", options=INT4)
    return tmp_path / "adapter"


def refused(folder, rules=None):
    with pytest.raises(AdapterError) as caught:
        load_adapter(folder, name="legal-07", rules=rules)
    line = str(caught.value)
    assert "'legal-07'" in line and "expected" in line and "got" in line and "\n" not in line
    return line


def change(folder, edit):
    tensors = {key: t.clone() for key, t in load_file(folder / WEIGHTS_FILE).items()}
    edit(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


def change_config(folder, edit):
    config = json.loads((folder / CONFIG_FILE).read_bytes())
    edit(config)
    (folder / CONFIG_FILE).write_text(json.dumps(config))


def first_module(config):
    return config["modules"][min(config["modules"])]


@pytest.mark.parametrize("kind", ["lora", "svd", "delta"])
@pytest.mark.parametrize(
    ("precision", "limit"), [("bfloat16", 0.01), ("int8", 0.02), ("int4", 0.2), ("int2", 0.65)]
)
def test_the_product_is_near(kind, precision, limit, model, tmp_path):
    adapter = build_random_adapter(model, kind=kind, rank=3, frozen_depth=1)
    save_adapter(adapter, model, tmp_path / "a", options=LinearOptions(precision=precision))
    loaded = load_adapter(tmp_path / "a", rules=AdapterRules(frozen_depth=1))
    check_adapter_fits(loaded, model, rules=AdapterRules(frozen_depth=1))
    assert (loaded.kind, loaded.frozen_depth) == (kind, 1)
    assert loaded.updates.keys() == adapter.updates.keys()
    for name, update in adapter.updates.items():
        other = loaded.updates[name]
        assert other.rank == update.rank
        error = (other.product() - update.product()).norm() / update.product().norm()
        assert error < limit
        assert (other.bias is None) == (update.bias is None)
        if update.bias is not None:
            assert torch.allclose(other.bias.float(), update.bias, rtol=1e-2)


def test_files_shrink_by_bits(tiny_model, tmp_path):
    model = tiny_model("gpt_neox")
    adapter = build_random_adapter(model, kind="delta")
    sizes = {}
    for precision in ("float32", "bfloat16", "int8", "int4", "int2"):
        save_adapter(
            adapter, model, tmp_path / precision, options=LinearOptions(precision=precision)
        )
        tensors = load_file(tmp_path / precision / WEIGHTS_FILE)
        sizes[precision] = sum(t.nbytes for key, t in tensors.items() if "bias" not in key)
        assert load_adapter(tmp_path / precision).num_bytes == (
            (tmp_path / precision / WEIGHTS_FILE).stat().st_size
        )
    assert sizes["bfloat16"] == sizes["float32"] / 2
    assert sizes["int8"] < 0.32 * sizes["float32"]
    assert sizes["int4"] < 0.2 * sizes["float32"]
    assert sizes["int2"] < 0.14 * sizes["float32"]


def test_equal_adapters_give_equal_bytes(tiny_model, tmp_path):
    model = tiny_model("llama")
    adapter = build_random_adapter(model, rank=3)
    for name in ("a", "b"):
        save_adapter(adapter, model, tmp_path / name, options=INT4)
    for file in (CONFIG_FILE, WEIGHTS_FILE, META_FILE):
        assert hash_file(tmp_path / "a" / file) == hash_file(tmp_path / "b" / file)


def test_plain_peft_refuses_it_instead_of_reading_codes(tiny_model, tmp_path):
    model = tiny_model("llama")
    save_adapter(build_random_adapter(model, rank=3), model, tmp_path / "a", options=INT4)
    with pytest.raises((KeyError, TypeError, ValueError)):
        PeftModel.from_pretrained(model, tmp_path / "a")


def test_adapter_outlives_its_file(saved):
    adapter = load_adapter(saved)
    parts = [t.clone() for u in adapter.updates.values() for t in u.tensors().values()]
    (saved / WEIGHTS_FILE).write_bytes(b"")
    after = [t for u in adapter.updates.values() for t in u.tensors().values()]
    assert all(torch.equal(a, b) for a, b in zip(parts, after, strict=True))


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(file=st.sampled_from([CONFIG_FILE, WEIGHTS_FILE]), data=st.data())
def test_any_damage_is_refused_or_read_as_the_same_layout(saved, file, data):
    path = saved / file
    good = path.read_bytes()
    shapes = {name: update.shape for name, update in load_adapter(saved).updates.items()}
    where = data.draw(st.integers(0, min(len(good) - 1, 3000)))
    damaged = bytearray(good)
    damaged[where] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(damaged))
    try:
        read = load_adapter(saved, name="legal-07")
        assert {name: update.shape for name, update in read.updates.items()} == shapes
    except AdapterError as error:
        assert "'legal-07'" in str(error) and "\n" not in str(error)
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda c: c.update(bits=3), "bits"),
        (lambda c: c.update(bits="4"), "bits"),
        (lambda c: c.update(group=0), "group"),
        (lambda c: c.update(group=2**40), "group"),
        (lambda c: c.update(zero_point=8), "zero_point"),
        (lambda c: c.update(modules={}), "modules"),
        (lambda c: first_module(c).update(rows=0), "rows"),
        (lambda c: first_module(c).update(rows=True), "rows"),
        (lambda c: first_module(c).update(columns=2**40), "columns"),
        (lambda c: first_module(c).update(columns=-5), "columns"),
        (lambda c: first_module(c).update(scale=float("nan")), "NaN, which is not JSON"),
        (lambda c: first_module(c).update(scale=0.0), "scale"),
        (lambda c: first_module(c).update(rank=0), "rank"),
        (lambda c: first_module(c).pop("rank"), "rank"),
    ],
)
def test_refuses_a_config_out_of_range(edit, named, saved):
    change_config(saved, edit)
    assert named in refused(saved)


@pytest.mark.parametrize("field", ["rows", "columns"])
def test_refuses_a_config_that_promises_more_than_the_file_holds(field, saved):
    change_config(saved, lambda c: first_module(c).update({field: 2**30}))
    tracemalloc.start()
    assert "instead of" in refused(saved)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 2**20


def test_refuses_a_scale_of_a_difference(tiny_model, tmp_path):
    model = tiny_model("gpt_neox")
    save_adapter(build_random_adapter(model, kind="delta"), model, tmp_path / "a", options=INT4)
    change_config(tmp_path / "a", lambda c: first_module(c).update(scale=2.0))
    assert "scale 1 of a difference" in refused(tmp_path / "a")


@pytest.mark.parametrize(
    ("dtype", "part"), [(torch.int8, "codes"), (torch.float32, "scales"), (torch.int64, "codes")]
)
def test_refuses_another_dtype(dtype, part, saved):
    change(saved, lambda t: t.update({k: v.to(dtype) for k, v in t.items() if k.endswith(part)}))
    refused(saved)


def test_refuses_missing_and_extra_tensors(saved):
    good = {key: t.clone() for key, t in load_file(saved / WEIGHTS_FILE).items()}
    change(saved, lambda t: t.pop(min(k for k in t if k.endswith("scales"))))
    assert "missing tensor" in refused(saved)
    save_file({**good, "lm_head.codes": torch.zeros(2, 2)}, saved / WEIGHTS_FILE)
    assert "extra tensor 'lm_head.codes'" in refused(saved)
    save_file({**good, "lm_head.bias": torch.zeros(2)}, saved / WEIGHTS_FILE)
    assert "extra tensor 'lm_head.bias'" in refused(saved)


def test_the_charter_s_limits_count(tiny_model, tmp_path):
    model = tiny_model("gpt_neox")
    save_adapter(build_random_adapter(model, rank=5), model, tmp_path / "a", options=INT4)
    assert "rank 5 above the charter's 4" in refused(tmp_path / "a", AdapterRules(max_rank=4))
    size = (tmp_path / "a" / WEIGHTS_FILE).stat().st_size
    assert f"at most {size - 1} bytes" in refused(tmp_path / "a", AdapterRules(max_bytes=size - 1))
    load_adapter(tmp_path / "a", rules=AdapterRules(max_rank=5, max_bytes=size))


def test_infinite_scales_are_found_as_every_non_finite_number(saved):
    key = min(k for k in load_file(saved / WEIGHTS_FILE) if k.endswith("scales"))
    change(saved, lambda t: t[key].fill_(float("inf")))
    assert find_non_finite(load_adapter(saved))
