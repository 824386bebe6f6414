import json
import os

import pytest

from molora_fed.contributions.manifest import QueryEntry, load_contribution, parse_manifest
from molora_fed.errors import AdapterError, SignatureError
from molora_fed.types import ADAPTER_FILES, Split

QUERY = QueryEntry(sha256="a" * 64, bytes=131_097, blocks=160)


def edit_manifest(folder, change):
    path = folder / "manifest.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_id_does_not_depend_on_layout_of_the_file(contribute):
    contribution = contribute()
    value = json.loads((contribution.folder / "manifest.json").read_text())
    compact = parse_manifest(json.dumps(dict(reversed(value.items()))).encode())
    assert compact.contribution_id == contribution.id
    assert compact == contribution.manifest


def test_a_query_that_is_not_stated_leaves_the_bytes_as_they_were(contribute):
    plain, stating = contribute(), contribute("stating", held_out_query=QUERY)
    assert b"held_out_query" not in plain.manifest.canonical
    assert stating.manifest.held_out_query == QUERY and stating.id != plain.id
    without = stating.manifest.model_copy(update={"held_out_query": None})
    assert without.canonical == plain.manifest.canonical


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(domain="medical"),
        lambda m: m.update(held_out_query=QUERY.model_dump()),
        lambda m: m.update(specialist_loss=1.0),
        lambda m: m["training"].update(threads=8),
        lambda m: m["sample_files"]["held-out"].update(blocks=1),
        lambda m: m["adapter_files"]["adapter_config.json"].update(sha256="0" * 64),
    ],
)
def test_changed_manifest_is_refused(contribute, change):
    folder = contribute().folder
    edit_manifest(folder, change)
    with pytest.raises(SignatureError, match=r"contribution of 'legal-07'.*does not verify"):
        load_contribution(folder)


def test_changed_signature_or_other_key_is_refused(contribute, coordinator_key):
    folder = contribute().folder
    signature = (folder / "signature").read_text()
    changed = "0" if signature[20] == "e" else "e"
    (folder / "signature").write_text(signature.replace(signature[20], changed, 3))
    with pytest.raises(SignatureError, match="does not verify"):
        load_contribution(folder)
    other = contribute("other", key=coordinator_key).folder
    (folder / "signature").write_text((other / "signature").read_text())
    with pytest.raises(SignatureError, match="does not verify"):
        load_contribution(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(surprise=1), "surprise: Extra inputs are not permitted"),
        (lambda m: m.pop("domain"), "domain: Field required"),
        (lambda m: m.update(format_version=2), "format_version: Input should be 1"),
        (lambda m: m.update(amendment=-1), "amendment: Input should be greater"),
        (lambda m: m.update(amendment="0"), "amendment: Input should be a valid integer"),
        (lambda m: m.update(contributor="../legal"), "contributor: String should match"),
        (lambda m: m.update(contributor="base"), "'base' names something else"),
        (lambda m: m.update(base_loss=float("nan")), "NaN, which is not JSON"),
        (lambda m: m.update(contamination=1.5), "contamination: Input should be less than"),
        (lambda m: m["adapter_files"].pop("adapter_model.safetensors"), "got none called"),
        (
            lambda m: m["adapter_files"].update({"../../etc/passwd": {}}),
            r"adapter_files.*Input should be 'adapter_config.json'",
        ),
        (
            lambda m: m["sample_files"].update({"../evil": m["sample_files"]["held-out"]}),
            "sample_files.*Input should be",
        ),
        (
            lambda m: m["sample_files"].update({"train": m["sample_files"]["held-out"]}),
            "blocks of split 'train' must not leave",
        ),
        (
            lambda m: m["sample_files"].update({"validation": m["sample_files"]["held-out"]}),
            "blocks of split 'validation' must not leave",
        ),
    ],
)
def test_malformed_manifest_names_the_key(contribute, change, message):
    folder = contribute().folder
    edit_manifest(folder, change)
    with pytest.raises(AdapterError, match=message) as caught:
        load_contribution(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"training": {"x": NaN}}', b" " * 2_000_000],
)
def test_manifest_that_is_none_is_refused(data):
    with pytest.raises(AdapterError, match="Cannot read manifest"):
        parse_manifest(data)


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999", '"\\ud800"', "9" * 5_000])
def test_what_json_cannot_carry_is_refused_in_the_training_record(contribute, value):
    folder = contribute().folder
    text = (folder / "manifest.json").read_text().replace('"threads": 1', f'"threads": {value}')
    with pytest.raises(AdapterError, match="Cannot read manifest") as caught:
        parse_manifest(text.encode())
    assert "\n" not in str(caught.value)


def test_large_manifest_is_refused_before_it_is_read(contribute):
    folder = contribute().folder
    with (folder / "manifest.json").open("wb") as file:
        file.truncate(2**40)  # Sparse: reading it would take a terabyte of memory.
    with pytest.raises(AdapterError, match="at most 1000000 bytes, got 1099511627776 bytes"):
        load_contribution(folder)


def test_files_are_exactly_those_of_the_manifest(contribute):
    folder = contribute().folder
    (folder / "adapter" / "optimizer.bin").write_bytes(b"x")
    with (folder / "adapter" / "adapter_model.safetensors").open("ab") as file:
        file.write(b"x")
    (folder / "samples" / "held-out.safetensors").unlink()
    config = folder / "adapter" / "adapter_config.json"
    config.unlink()
    os.symlink("/etc/hostname", config)
    with pytest.raises(AdapterError, match="expected exactly the plain files") as caught:
        load_contribution(folder)
    message = str(caught.value)
    assert "adapter/optimizer.bin: not signed" in message
    assert "samples/held-out.safetensors: missing" in message
    assert "adapter/adapter_config.json: not a plain file" in message
    assert "adapter/adapter_model.safetensors: " in message


def test_linked_folder_is_refused(contribute, tmp_path):
    folder = contribute().folder
    (folder / "samples").rename(tmp_path / "elsewhere")
    (folder / "samples").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterError, match="samples: a link"):
        load_contribution(folder)


def test_folder_without_contribution(tmp_path):
    with pytest.raises(AdapterError, match=r"manifest.json': expected a plain file.*got missing"):
        load_contribution(tmp_path)


def test_samples_must_be_what_the_manifest_states(contribute, blocks):
    contribution = contribute()
    assert len(contribution.load_samples(Split.CALIBRATION)) == 4
    with pytest.raises(AdapterError, match="expected one in the manifest"):
        contribution.load_samples(Split.TRAIN)
    path = contribution.folder / "samples" / "admission.safetensors"
    blocks(Split.ADMISSION, 2).save(path)
    with pytest.raises(AdapterError, match=r"\(legal, admission, 3, 48\).*admission, 2, 32\)"):
        contribution.load_samples(Split.ADMISSION)


def test_only_known_names_become_paths(contribute):
    manifest = contribute().manifest
    assert set(manifest.adapter_files) <= set(ADAPTER_FILES)
    assert set(manifest.files) == {
        *(f"adapter/{name}" for name in manifest.adapter_files),
        *(f"samples/{split}.safetensors" for split in ("calibration", "admission", "held-out")),
    }
