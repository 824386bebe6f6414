import json
import random
import shutil

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from molora_fed.corpus.clusters import index_shingles
from molora_fed.corpus.overlap import find_base_index, load_index
from molora_fed.errors import BaseCheckpointError, CorpusError
from molora_fed.models.base import (
    check_base,
    fetch_base,
    fingerprint_tokenizer,
    fingerprint_weights,
    load_base,
)
from molora_fed.models.forward import compute_block_losses
from molora_fed.models.runtime import Placement
from molora_fed.training.builtin_base import (
    BuiltinBaseConfig,
    compute_recipe_key,
    create_builtin_base,
    split_domains,
)
from molora_fed.types import Document, Split

CONFIG = BuiltinBaseConfig(
    vocab_size=300, hidden=32, layers=2, heads=2, steps=12, batch=4, block_size=32, threads=1
)
WEIGHTS = "model.safetensors"


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path):
    """A checkpoint of its own, free to be broken."""
    return shutil.copytree(tiny_checkpoint("gpt_neox"), tmp_path / "checkpoint")


def change_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def build_documents(seed, count=40):
    source = random.Random(seed)
    words = ["".join(source.choices("abcdefghij", k=source.randint(2, 7))) for _ in range(200)]
    return [
        Document(f"{index}.txt", " ".join(source.choices(words, k=120))) for index in range(count)
    ]


DOMAINS = {"north": build_documents(1), "south": build_documents(2)}


# Fingerprints


def test_fingerprint_does_not_depend_on_how_tensors_are_spread(checkpoint, tmp_path):
    whole = fingerprint_weights(checkpoint)
    load_base(checkpoint).model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert fingerprint_weights(tmp_path / "sharded") == whole


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors["embed_out.weight"].view(-1)[0].add_(1e-3),
        lambda tensors: tensors.update(extra=tensors["embed_out.weight"].clone()),
        lambda tensors: tensors.update(
            {"embed_out.weight": tensors["embed_out.weight"].T.contiguous()}
        ),
        lambda tensors: tensors.update({"embed_out.weight": tensors["embed_out.weight"].half()}),
    ],
    ids=["byte", "name", "shape", "dtype"],
)
def test_fingerprint_notices_any_change(checkpoint, change):
    before = fingerprint_weights(checkpoint)
    change_weights(checkpoint, change)
    assert fingerprint_weights(checkpoint) != before


def test_tokenizer_fingerprint_covers_its_files(checkpoint):
    before = fingerprint_tokenizer(checkpoint)
    path = checkpoint / "tokenizer_config.json"
    path.write_text(path.read_text() + " ")
    assert fingerprint_tokenizer(checkpoint) != before


# Loading


def test_loaded_base_is_frozen_and_names_itself(checkpoint):
    base = load_base(checkpoint)
    assert not base.model.training and not any(p.requires_grad for p in base.model.parameters())
    assert base.identity().id == "checkpoint" and base.training is None
    assert base.identity().weights == fingerprint_weights(checkpoint)
    assert load_base(checkpoint, Placement(dtype=torch.bfloat16)).weights == base.weights


def test_every_architecture_loads(tiny_checkpoint, architecture, tokens):
    base = load_base(tiny_checkpoint(architecture))
    assert torch.isfinite(compute_block_losses(base.model, tokens)).all()


def test_wrong_base_is_refused_with_expected_and_got(tiny_checkpoint):
    one, other = (load_base(tiny_checkpoint("gpt_neox", seed)) for seed in (0, 1))
    check_base(one, one.identity())
    with pytest.raises(BaseCheckpointError) as caught:
        check_base(other, one.identity())
    assert one.weights in str(caught.value) and other.weights in str(caught.value)
    assert "\n" not in str(caught.value)


def break_truncated(folder):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1000])


def break_pickled(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def break_missing(folder):
    change_weights(folder, lambda tensors: tensors.pop("embed_out.weight"))


def break_shape(folder):
    change_weights(folder, lambda t: t.update({"embed_out.weight": t["embed_out.weight"][:9]}))


def break_config(folder):
    (folder / "config.json").write_text('{"model_type": "no-such-thing"}')


def break_code(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoModelForCausalLM": "theirs.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "theirs.py").write_text("raise SystemExit('ran')")


def break_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def break_index(folder):
    index = {"weight_map": {"embed_out.weight": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (break_truncated, "whole safetensors files"),
        (break_pickled, r"got pytorch_model.bin\. Convert"),
        (break_missing, "got none or another shape for lm_head.weight"),
        (break_shape, "got none or another shape for lm_head.weight"),
        (break_config, "causal language model"),
        (break_code, "causal language model"),
        (break_tokenizer, "expected a tokenizer"),
        (break_index, "file names"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_broken_checkpoint_is_a_one_line_error(checkpoint, damage, named, capfd):
    damage(checkpoint)
    with pytest.raises(BaseCheckpointError, match=named) as caught:
        load_base(checkpoint)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_tokenizer_larger_than_the_vocabulary_is_refused(checkpoint):
    path = checkpoint / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"] |= {f"more{i}": 300 + i for i in range(20)}
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(BaseCheckpointError, match="at most 257 tokens, got"):
        load_base(checkpoint)


# Fetching


def test_fetched_folder_has_the_same_fingerprints_and_only_the_needed_files(checkpoint, tmp_path):
    (checkpoint / "pytorch_model.bin").write_bytes(b"pickle")
    (checkpoint / "theirs.py").write_text("")
    base = fetch_base(str(checkpoint), tmp_path / "base")
    assert (base.folder, base.id) == (tmp_path / "base", "checkpoint")
    assert base.identity() == load_base(tmp_path / "base").identity()
    assert base.weights == fingerprint_weights(checkpoint)
    names = {path.name for path in base.folder.iterdir()}
    assert {"base.json", "config.json", WEIGHTS, "tokenizer.json"} <= names
    assert not names & {"pytorch_model.bin", "theirs.py"}


def test_fetching_again_keeps_what_is_there(checkpoint, tmp_path):
    first = fetch_base(str(checkpoint), tmp_path / "base")
    inode = (tmp_path / "base" / WEIGHTS).stat().st_ino
    assert fetch_base(str(checkpoint), tmp_path / "base").identity() == first.identity()
    assert (tmp_path / "base" / WEIGHTS).stat().st_ino == inode


def test_fetching_replaces_nothing_else(checkpoint, tiny_checkpoint, tmp_path):
    fetch_base(str(checkpoint), tmp_path / "base")
    before = fingerprint_weights(tmp_path / "base")
    with pytest.raises(BaseCheckpointError, match="Choose another folder"):
        fetch_base(str(tiny_checkpoint("gpt_neox", 1)), tmp_path / "base")
    assert fingerprint_weights(tmp_path / "base") == before


def test_broken_source_leaves_nothing_behind(checkpoint, tmp_path):
    break_truncated(checkpoint)
    with pytest.raises(BaseCheckpointError):
        fetch_base(str(checkpoint), tmp_path / "base")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_base_that_changed_on_disk_is_noticed(checkpoint, tmp_path):
    base = fetch_base(str(checkpoint), tmp_path / "base")
    change_weights(base.folder, lambda tensors: tensors["embed_out.weight"].view(-1)[0].add_(1e-3))
    with pytest.raises(
        BaseCheckpointError, match=f"expected checkpoint with weights {base.weights}"
    ):
        load_base(base.folder)


@pytest.mark.parametrize("source", ["no/such/folder", "gpt2", "a b@main"])
def test_source_that_is_neither_folder_nor_pinned_is_refused(tmp_path, source):
    with pytest.raises(BaseCheckpointError, match="ID@REVISION"):
        fetch_base(source, tmp_path / "base")


def test_hub_without_a_network_is_a_one_line_error(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BaseCheckpointError, match=r"no/such@main.*the network") as caught:
        fetch_base("no/such@main", tmp_path / "base")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "base").exists()


def test_hub_base_is_copied_from_its_snapshot(checkpoint, tmp_path, monkeypatch):
    asked = []

    def snapshot_download(repository, *, revision, allow_patterns):
        asked.append((repository, revision, [p for p in allow_patterns if "*" in p]))
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    base = fetch_base("some/model@1234", tmp_path / "base")
    assert (base.id, base.revision) == ("some/model", "1234")
    assert asked == [("some/model", "1234", ["*.safetensors"])]
    assert fetch_base("some/model@1234", tmp_path / "base").weights == base.weights
    assert len(asked) == 1


# The built-in base


@pytest.fixture(scope="module")
def builtin(tmp_path_factory):
    return create_builtin_base(tmp_path_factory.mktemp("builtin"), DOMAINS, config=CONFIG)


def test_builtin_base_learns_and_reports_what_it_took(builtin):
    training = builtin.training
    assert (training["steps"], training["tokens"]) == (12, 12 * 4 * 32)
    assert training["loss"] < training["initial_loss"]
    assert set(training["validation_losses"]) == {"north", "south"}
    assert training["parameters"] == sum(p.numel() for p in builtin.model.parameters())
    assert builtin.model.config.model_type == "gpt_neox"
    assert len(builtin.tokenizer) == 300
    text = DOMAINS["north"][0].text
    assert builtin.tokenizer.decode(builtin.tokenizer(text)["input_ids"]) == text
    names = {path.name for path in builtin.folder.iterdir()}
    assert "metrics.jsonl" in names and "training" not in names
    assert not any("second" in name for name in training)


def test_same_inputs_give_the_same_fingerprints(builtin, tmp_path):
    again = create_builtin_base(tmp_path, DOMAINS, config=CONFIG)
    assert again.identity() == builtin.identity()
    assert (tmp_path / "base.json").read_bytes() == (builtin.folder / "base.json").read_bytes()


def test_made_base_is_found_again_without_training(builtin):
    calls = []
    again = create_builtin_base(
        builtin.folder, DOMAINS, config=CONFIG, progress=lambda *a, **f: calls.append(a)
    )
    assert again.identity() == builtin.identity() and calls == []


def test_cache_serves_several_folders_with_the_index_of_the_train_text(tmp_path):
    calls = []
    first, second = (
        create_builtin_base(
            tmp_path / name,
            DOMAINS,
            config=CONFIG,
            cache=tmp_path / "cache",
            progress=lambda done, total, **fields: calls.append(done),
        )
        for name in ("one", "two")
    )
    assert first.identity() == second.identity() and first.training == second.training
    assert (first.folder, second.folder) == (tmp_path / "one", tmp_path / "two")
    assert calls.count(12) == 1
    splits = split_domains(DOMAINS, CONFIG)
    index = index_shingles(d.text for documents in splits.values() for d in documents[Split.TRAIN])
    for base in (first, second):
        kept = load_index(find_base_index(base.folder), base.training["recipe"])
        assert kept is not None and kept.tolist() == index.tolist() and len(index) > 0


def test_interrupted_base_goes_on_and_ends_the_same(builtin, tmp_path):
    def stop(done, total, **fields):
        if done >= 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        create_builtin_base(tmp_path, DOMAINS, config=CONFIG, progress=stop)
    assert not (tmp_path / "base.json").exists()
    seen = []
    base = create_builtin_base(
        tmp_path, DOMAINS, config=CONFIG, progress=lambda done, *a, **f: seen.append(done)
    )
    assert base.identity() == builtin.identity() and seen[0] > 2


def test_builtin_base_replaces_nothing_else(builtin, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(BaseCheckpointError, match=r"got thesis.txt\. Choose another folder"):
        create_builtin_base(tmp_path, DOMAINS, config=CONFIG)
    with pytest.raises(BaseCheckpointError, match="Choose another folder"):
        create_builtin_base(builtin.folder, {"north": DOMAINS["north"]}, config=CONFIG)


def test_base_reads_no_text_of_other_splits():
    splits = split_domains(DOMAINS, CONFIG)
    before = compute_recipe_key(splits, CONFIG)
    for split in (Split.HELD_OUT, Split.ADMISSION, Split.CALIBRATION):
        splits["north"].documents[split].clear()
    assert compute_recipe_key(splits, CONFIG) == before
    splits["north"].documents[Split.TRAIN].pop()
    assert compute_recipe_key(splits, CONFIG) != before


def test_too_little_text_names_the_domain(tmp_path):
    with pytest.raises(CorpusError, match="domain 'tiny'"):
        create_builtin_base(tmp_path, {"tiny": [Document("a", "b")]}, config=CONFIG)
    with pytest.raises(CorpusError, match="at least one domain"):
        create_builtin_base(tmp_path, {}, config=CONFIG)
