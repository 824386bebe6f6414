"""Held-out text that lies in others' train text is in no figure."""

from dataclasses import replace

import jsonschema
import numpy as np
import pytest
from fusion_helpers import build_charter, build_contributed
from test_fuse import SCHEMA
from test_private_fusion import fuse_privately, keep_private

from molora_fed.corpus.blocks import pack_documents
from molora_fed.corpus.clusters import index_shingles
from molora_fed.corpus.overlap import find_base_index, save_index
from molora_fed.errors import ConfigError
from molora_fed.fusion.fuse import fuse
from molora_fed.models.base import load_base
from molora_fed.plugins import load_plugins
from molora_fed.reporting.report import write_report
from molora_fed.reporting.summary import build_summary
from molora_fed.types import Document, Split

BLOCK_SIZE = 32
FIGURES = ("losses", "equal_weight", "gain_percent", "gain_interval_percent", "oracle_gap_nats",
           "gates", "baseline_gain_percent", "best_alone", "best_specialist")  # fmt: skip


def write_words(seed, count):
    """Words of one letter: sixteen or so in a block."""
    return " ".join(np.random.default_rng(seed).choice(list("abcdefghijklmnop"), size=count))


def pack(base, domain, split, texts):
    documents = [Document(str(number), text) for number, text in enumerate(texts)]
    clusters = np.arange(len(documents), dtype=np.int32)
    return pack_documents(
        documents, clusters, base.tokenizer, domain=domain, split=split, block_size=BLOCK_SIZE
    )


@pytest.fixture(scope="module")
def plugins():
    return load_plugins()


@pytest.fixture
def base(tiny_checkpoint, tmp_path):
    return replace(load_base(tiny_checkpoint()), folder=tmp_path / "base")


@pytest.fixture
def members(base, tmp_path):
    """Two contributors with text; of art's six held-out documents two lie in law's train text."""
    return build_members(base, tmp_path, art=range(6), law=range(10, 16))


def build_members(base, tmp_path, **seeds):
    texts = {name: [write_words(seed, 60) for seed in own] for name, own in seeds.items()}
    train = {"art": [write_words(20, 300)], "law": [write_words(30, 100), *texts["art"][:2]]}
    found = []
    for seed, name in enumerate(("art", "law"), start=1):
        corpus = tmp_path / "corpora" / name
        pack(base, name, Split.TRAIN, train[name]).save(corpus / "train.safetensors")
        made = build_contributed(base, tmp_path / "adapters", name, name, seed=seed)
        held_out = pack(base, name, Split.HELD_OUT, texts[name])
        found.append(replace(made, held_out=held_out, train_text=corpus))
    return found


def find_known(members):
    """Blocks of art that are mostly of the two documents, and those with nothing of them."""
    share = (members[0].held_out.documents < 2).mean(axis=1)
    return share > 0.7, share == 0


def fuse_members(base, members, folder, plugins):
    return fuse(base, build_charter(base, compare=()), members, folder, plugins=plugins).result


def test_blocks_in_anothers_train_text_are_left_out_and_counted(base, members, plugins, tmp_path):
    result = fuse_members(base, members, tmp_path / "out", plugins)
    jsonschema.validate(result, SCHEMA)
    known, new = find_known(members)
    art, law = (result["overlap"]["domains"][name] for name in ("art", "law"))
    assert known.sum() <= art["left_out"] <= (~new).sum() and art["blocks"] == len(known)
    assert art["own"] == 0 and art["union"] > 0.2 and art["base"] is None
    assert art["after"] <= result["overlap"]["max_block_overlap"]
    assert law["left_out"] == 0 and law["union"] == law["own"] == 0
    compared = result["overlap"]["compared"]
    assert set(compared["train"]) == {"art", "law"} and not compared["base"]
    assert result["overlap"]["absent"] == []
    prints = result["fingerprints"]
    assert prints["held_out"]["art"] == members[0].held_out.fingerprint
    assert prints["held_out_kept"]["art"] != prints["held_out"]["art"]
    assert prints["held_out_kept"]["law"] == prints["held_out"]["law"]


def test_figures_are_those_of_a_fusion_without_these_blocks(base, members, plugins, tmp_path):
    result = fuse_members(base, members, tmp_path / "out", plugins)
    known = find_known(members)[0]
    everything = fuse_members(
        base, [replace(one, train_text=None) for one in members], tmp_path / "all", plugins
    )
    assert everything["overlap"]["domains"]["art"]["left_out"] == 0
    assert everything["losses"]["base"]["art"] != pytest.approx(result["losses"]["base"]["art"])
    assert everything["losses"]["base"]["law"] == result["losses"]["base"]["law"]
    kept_print = result["fingerprints"]["held_out_kept"]["art"]
    # Which blocks those are is found by their fingerprint, not by asking the code under test.
    share = (members[0].held_out.documents < 2).mean(axis=1)
    cuts = [members[0].held_out.select(share <= limit) for limit in np.unique(share)]
    (kept,) = [cut for cut in cuts if cut.fingerprint == kept_print]
    assert len(kept) <= (~known).sum()
    clean = [replace(members[0], held_out=kept), members[1]]
    expected = fuse_members(base, clean, tmp_path / "clean", plugins)
    assert expected["overlap"]["domains"]["art"]["left_out"] == 0
    for name in FIGURES:
        assert flatten(result[name]) == pytest.approx(flatten(expected[name]), abs=1e-4)
    for before, after in zip(
        result["forecasts"].values(), expected["forecasts"].values(), strict=True
    ):
        assert before["actual"] == pytest.approx(after["actual"], abs=1e-4)


def flatten(value, path=""):
    if not isinstance(value, dict):
        return {} if isinstance(value, str) else {path: value}
    return {
        k: v for name, inner in value.items() for k, v in flatten(inner, f"{path}/{name}").items()
    }


def test_columns_are_of_all_blocks_so_that_another_choice_runs_no_model(
    base, members, plugins, tmp_path
):
    fuse_members(base, members, tmp_path, plugins)
    columns = {path: path.stat().st_mtime_ns for path in (tmp_path / "bank").glob("*.bin")}
    without = [replace(one, train_text=None) for one in members]
    fuse_members(base, without, tmp_path, plugins)
    assert {path: path.stat().st_mtime_ns for path in columns} == columns
    made = {path.name for path in (tmp_path / "bank").glob("logprob-*.bin")}
    assert made == {path.name for path in columns if path.name.startswith("logprob-")}


def test_the_bases_text_counts_where_its_index_lies_beside_it(base, members, plugins, tmp_path):
    recipe = {"recipe": "abc", "steps": 1, "tokens": 1}
    known = replace(base, training=recipe)
    texts = [write_words(10, 60)]  # law's first held-out document
    save_index(find_base_index(base.folder), index_shingles(texts), "abc")
    result = fuse_members(known, members, tmp_path / "out", plugins)
    law = result["overlap"]["domains"]["law"]
    assert result["overlap"]["compared"]["base"] and law["base"] > 0.1 and law["left_out"] > 0
    save_index(find_base_index(base.folder), index_shingles(texts), "another base")
    again = fuse_members(known, members, tmp_path / "out", plugins)
    assert not again["overlap"]["compared"]["base"]
    assert again["overlap"]["domains"]["law"]["left_out"] == 0


def test_samples_of_others_count_where_train_text_is_elsewhere(base, members, plugins, tmp_path):
    art, law = (replace(one, train_text=None) for one in members)
    calibration = pack(base, "law", Split.CALIBRATION, [write_words(0, 60), write_words(99, 60)])
    result = fuse_members(
        base, [art, replace(law, calibration=calibration)], tmp_path / "out", plugins
    )
    assert sorted(result["overlap"]["absent"]) == ["art", "law"]
    found = result["overlap"]["domains"]["art"]
    assert found["own"] is None and found["union"] > 0.05 and found["left_out"] > 0


def test_a_domain_without_a_block_left_is_in_no_figure_and_ends_no_run(
    base, members, plugins, tmp_path
):
    art, law = members
    train = pack(base, "law", Split.TRAIN, [write_words(n, 60) for n in range(6)])
    train.save(law.train_text / "train.safetensors")
    result = fuse_members(base, members, tmp_path / "out", plugins)
    jsonschema.validate(result, SCHEMA)
    found = result["overlap"]["domains"]["art"]
    assert found["left_out"] == found["blocks"]
    assert result["domains"] == ["law"] and result["losses"]["base"].keys() == {"law"}
    page = write_report(result, {}, tmp_path / "report").read_text()
    assert "No block is left of art" in page
    assert build_summary(result)
    assert art.domain in {expert["domain"] for expert in result["experts"]}


def test_a_fusion_of_which_nothing_can_be_measured_is_refused(base, members, plugins, tmp_path):
    for one, first in zip(members, (0, 10), strict=True):
        texts = [write_words(first + n, 60) for n in range(6)]
        train = pack(base, one.domain, Split.TRAIN, texts)
        train.save(one.train_text / "train.safetensors")
    with pytest.raises(ConfigError, match="got none among") as caught:
        fuse_members(base, members, tmp_path / "out", plugins)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("summing", ["masked", "robust"])
def test_the_same_blocks_are_left_out_where_texts_stay_with_their_owners(
    base, plugins, tmp_path, summing
):
    members = build_members(base, tmp_path, art=range(16), law=range(100, 116))
    third = build_contributed(base, tmp_path / "adapters", "art-2", "art", seed=3)
    third = replace(third, held_out=members[0].held_out, train_text=members[0].train_text)
    everybody = [replace(one, admission=None) for one in (*members, third)]
    pooled = fuse_members(base, everybody, tmp_path / "pooled", plugins)["overlap"]
    charter = keep_private(build_charter(base, compare=()), summing)
    private, _ = fuse_privately(base, charter, everybody, tmp_path / "private", plugins)
    jsonschema.validate(private.result, SCHEMA)
    pooled["compared"]["train"].sort()
    assert private.result["overlap"] == pooled
    assert pooled["domains"]["art"]["left_out"] > 0
