"""A base folder from outside: what it may change, where its links may lead, what loading costs."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from molora_fed.adapters.save import save_adapter
from molora_fed.charter import Identity, load_charter
from molora_fed.cooperative.contribute import open_charter_and_base
from molora_fed.cooperative.cooperative import create_cooperative
from molora_fed.cooperative.measured_adapter import _check_links, _read_record
from molora_fed.errors import AdapterError, BaseCheckpointError
from molora_fed.models.base import check_base, fetch_base, load_base, load_model
from molora_fed.models.base_config import _find_faults
from molora_fed.models.base_files import copy_checkpoint
from molora_fed.testing.models import build_random_adapter

SECRET = "-----BEGIN PRIVATE KEY-----\nsecret\n"


@pytest.fixture
def cooperative(tmp_path, tiny_checkpoint):
    return create_cooperative(tmp_path / "coop", "tiny", load_base(tiny_checkpoint()))


@pytest.fixture
def folder(tmp_path, tiny_checkpoint) -> Path:
    return Path(shutil.copytree(tiny_checkpoint(), tmp_path / "checkpoint"))


def edit(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def drop_last_layer(folder):
    edit(folder, num_hidden_layers=1)


CHANGES = {
    "activation": lambda folder: edit(folder, hidden_act="relu"),
    "no parallel residual": lambda folder: edit(folder, use_parallel_residual=False),
    "epsilon": lambda folder: edit(folder, layer_norm_eps=0.5),
    "one layer fewer": drop_last_layer,
    "rotary base": lambda folder: edit(folder, rope_parameters={"rope_type": "default",
                                                                "rope_theta": 3.0}),
    "generation": lambda folder: (folder / "generation_config.json").write_text("{}"),
    "spaces only": lambda folder: (folder / "config.json").write_text(
        (folder / "config.json").read_text() + "\n"
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_base_of_another_function_is_refused_by_both_ends(cooperative, change):
    CHANGES[change](cooperative.base_folder)
    with pytest.raises(BaseCheckpointError, match="Cannot use base"):
        cooperative.load_base()
    with pytest.raises(BaseCheckpointError, match="Cannot use base"):
        open_charter_and_base(cooperative.folder / "cooperative.toml")


def test_the_same_file_read_otherwise_is_refused(cooperative, monkeypatch):
    """As by a version of transformers with other defaults."""
    monkeypatch.setattr("molora_fed.models.base.fingerprint_config", lambda config: "0" * 64)
    with pytest.raises(BaseCheckpointError, match="version of transformers"):
        cooperative.load_base()


def test_an_adapter_beside_the_weights_has_no_effect(cooperative, tiny_model, tmp_path):
    tokens = torch.arange(20)[None]
    before = cooperative.load_base().model(tokens).logits
    save_adapter(build_random_adapter(tiny_model()), tiny_model(), tmp_path / "adapter")
    for file in (tmp_path / "adapter").iterdir():
        shutil.copy(file, cooperative.base_folder)
    assert (cooperative.base_folder / "adapter_config.json").is_file()
    assert torch.equal(cooperative.load_base().model(tokens).logits, before)
    assert torch.equal(load_model(cooperative.base_folder)(tokens).logits, before)


def test_code_beside_the_weights_never_runs(cooperative, tmp_path):
    ran = tmp_path / "ran"
    for name in ("modeling_own.py", "configuration_own.py", "tokenization_own.py", "__init__.py"):
        (cooperative.base_folder / name).write_text(f"open({str(ran)!r}, 'w')")
    cooperative.load_base()
    assert not ran.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_config_cannot_name_kernels_to_be_fetched(folder, key):
    edit(folder, **{key: "someone/kernels"})
    with pytest.raises(BaseCheckpointError, match="someone/kernels"):
        load_base(folder)


def test_a_charter_of_version_1_binds_what_it_always_has(cooperative):
    identity = cooperative.charter.identity
    assert identity.version == 2 and identity.base.config and identity.base.files
    assert load_charter(cooperative.folder).identity_hash == cooperative.charter.identity_hash
    base = identity.base.model_copy(update={"config": None, "files": {}})
    first = identity.model_copy(update={"version": 1, "base": base}).model_dump(mode="json")
    assert first.keys() == {"name", "base", "adapters", "corpus", "privacy_mode"}
    assert first["base"].keys() == {"id", "revision", "weights", "tokenizer"}
    edit(cooperative.base_folder, layer_norm_eps=0.5)
    check_base(load_base(cooperative.base_folder), base)


@pytest.mark.parametrize("version", [1, 2])
def test_an_identity_has_the_keys_of_its_version(cooperative, version):
    whole = cooperative.charter.identity.model_dump(mode="json")
    if version == 1:
        del whole["version"]
    else:
        del whole["base"]["files"]
    with pytest.raises(ValidationError, match="version"):
        Identity.model_validate(whole)


@pytest.mark.parametrize("name", ["merges.txt", "config.json", "model.safetensors", "base.json"])
def test_a_link_out_of_a_base_folder_copies_nothing(folder, tmp_path, name):
    key = tmp_path / "key.pem"
    key.write_text(SECRET)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(key)
    (tmp_path / "copy").mkdir()
    if name != "base.json":  # which is never copied, but written anew
        with pytest.raises(BaseCheckpointError, match="leads out of the folder"):
            copy_checkpoint(folder, tmp_path / "copy")
    for use in (
        lambda: fetch_base(str(folder), tmp_path / "base"),
        lambda: load_base(folder),
    ):
        with pytest.raises(BaseCheckpointError, match="leads out of the folder"):
            use()
    assert not [
        path for place in ("copy", "base")
        for path in (tmp_path / place).rglob("*") if SECRET in path.read_text(errors="replace")
    ]  # fmt: skip


def test_a_snapshot_of_the_hub_links_into_its_own_blobs(folder, tmp_path, tiny_checkpoint):
    hub = tmp_path / "models--some--model"
    snapshot = hub / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    (hub / "blobs").mkdir()
    for file in folder.iterdir():
        shutil.move(file, hub / "blobs" / f"b-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/b-{file.name}")
    assert load_base(snapshot).weights == load_base(tiny_checkpoint()).weights
    shutil.move(hub / "blobs", tmp_path / "elsewhere")
    (hub / "blobs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BaseCheckpointError, match="leads out of the folder"):
        load_base(snapshot)


@pytest.mark.parametrize(
    "values",
    [
        {"num_hidden_layers": 5_000},
        {"num_hidden_layers": 10**15},
        {"num_hidden_layers": 1_000, "hidden_size": 4_096},
        {"hidden_size": 2**40},
        {"intermediate_size": 2**24},
        {"vocab_size": 2**31},
    ],
)
def test_a_config_of_a_larger_model_than_its_weights_costs_nothing(folder, values):
    edit(folder, **values)
    began = time.monotonic()
    with pytest.raises(BaseCheckpointError):
        load_base(folder)
    assert time.monotonic() - began < 5


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**20) | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)


@settings(
    max_examples=15,  # each builds a model
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_whatever_a_config_says_ends_in_one_line(folder, data):
    whole = json.loads((folder / "config.json").read_text())
    key = data.draw(st.sampled_from(sorted(whole)) | st.text(max_size=20))
    before = (folder / "config.json").read_text()
    try:
        (folder / "config.json").write_text(json.dumps({**whole, key: data.draw(JSON)}))
        load_base(folder)
    except BaseCheckpointError as error:
        assert "\n" not in str(error) and len(str(error)) < 1_500
    finally:
        (folder / "config.json").write_text(before)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(["num_hidden_layers", "n_layer", "text_config", "x"]), JSON))
def test_whatever_a_config_says_of_sizes_is_within_bounds_or_refused(raw):
    faults = list(_find_faults(raw, 8))
    layers = [raw[key] for key in ("num_hidden_layers", "n_layer") if key in raw]
    if any(isinstance(n, int | float) and not isinstance(n, bool) and n > 8 for n in layers):
        assert faults


@pytest.mark.parametrize("name", ["record.json", "adapter/adapter_config.json", "adapter"])
def test_a_link_out_of_an_adapter_that_is_given_publishes_nothing(tmp_path, name):
    """Its record would stand in the manifest, whatever JSON it is."""
    given = tmp_path / "given"
    (given / "adapter").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "secret.json").write_text('{"token": "secret"}')
    if name == "adapter":
        (given / name).rmdir()
    target = tmp_path / ("elsewhere" if name == "adapter" else "secret.json")
    (given / name).symlink_to(target)
    with pytest.raises(AdapterError, match="a link that leads out of the folder"):
        _check_links(given, given / "adapter")


@pytest.mark.parametrize("content", ["[" * 10**5, "[]", '{"a": 1e999}', "9" * 5_000, "{"])
def test_a_record_that_cannot_be_signed_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "record.json").write_text(content)
    with pytest.raises(AdapterError) as caught:
        _read_record(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_link_to_a_name_that_no_disk_can_hold_is_a_missing_file(folder, name):
    (folder / name).unlink()
    (folder / name).symlink_to("x" * 300)
    with pytest.raises(BaseCheckpointError, match="Cannot"):
        load_base(folder)
