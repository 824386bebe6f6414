import pytest

from molora_fed.charter import Amendment, SampleRules
from molora_fed.contributions.build import describe_contribution
from molora_fed.contributions.manifest import load_contribution
from molora_fed.errors import AdapterError, CorpusError
from molora_fed.storage.files import hash_file
from molora_fed.types import Split


def read_all(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_same_inputs_give_the_same_bytes(contribute):
    first, second = contribute("one"), contribute("two")
    assert first.id == second.id
    assert read_all(first.folder) == read_all(second.folder)
    assert contribute("one").id == first.id
    assert load_contribution(first.folder) == first


def test_no_more_than_the_charter_asks_for_leaves(contribute, charter):
    contribution = contribute()
    counts = {s: len(contribution.load_samples(s)) for s in contribution.manifest.sample_files}
    assert counts == {Split.CALIBRATION: 4, Split.ADMISSION: 3, Split.HELD_OUT: 2}
    assert not list(contribution.folder.rglob("*train*"))
    none = charter.model_copy(
        update={"amendment": Amendment(samples=SampleRules(calibration=0, admission=1, held_out=1))}
    )
    assert set(contribute("few", charter=none).manifest.sample_files) == {
        Split.ADMISSION,
        Split.HELD_OUT,
    }


def test_fewer_blocks_than_asked_are_counted(contribute, blocks):
    samples = {split: blocks(split, 1) for split in Split}
    contribution = contribute(samples=samples)
    assert [e.blocks for e in contribution.manifest.sample_files.values()] == [1, 1, 1]


def test_other_files_beside_the_adapter_stay_here(contribute, write_adapter):
    def clutter(folder):
        (folder / "trainer_state.json").write_text("private")
        (folder / "tokenizer.json").write_text("private")

    contribution = contribute(adapter=write_adapter(change=clutter))
    assert {p.name for p in contribution.adapter_folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "molora_adapter.json",
    }


def test_outgoing_is_counted_exactly_and_bounded_before(contribute, charter):
    contribution = contribute()
    rows = {row.what: row for row in describe_contribution(contribution.manifest)}
    assert [*rows] == [
        "calibration sample", "admission sample", "held-out sample", "adapter", "manifest",
    ]  # fmt: skip
    for split in (Split.CALIBRATION, Split.ADMISSION, Split.HELD_OUT):
        row, blocks = rows[f"{split} sample"], contribution.load_samples(split)
        path = contribution.folder / "samples" / f"{split}.safetensors"
        assert (row.blocks, row.tokens) == (len(blocks), blocks.tokens.size)
        assert row.bytes == path.stat().st_size
        assert row.exact
    assert sum(row.bytes for row in rows.values() if row.what != "manifest") == (
        contribution.manifest.num_bytes
    )
    before = {row.what: row for row in describe_contribution(charter)}
    assert all(not row.exact for row in before.values())
    limit = "adapter, by the charter's limit"
    assert [*before] == [limit if what == "adapter" else what for what in rows]
    for what, row in rows.items():
        bound = before[limit if what == "adapter" else what]
        assert row.blocks <= bound.blocks
        assert row.bytes <= bound.bytes
    assert rows["adapter"].blocks == before[limit].tokens == 0


def test_too_little_text_is_named(contribute, blocks):
    samples = {
        Split.CALIBRATION: blocks(Split.CALIBRATION, 3, size=8),
        Split.ADMISSION: blocks(Split.ADMISSION, 0),
    }
    with pytest.raises(CorpusError, match=r"calibration: blocks of 8.*no admission.*no held-out"):
        contribute(samples=samples)


def test_missing_adapter_and_bad_values_leave_nothing(contribute, tmp_path):
    with pytest.raises(AdapterError, match=r"got no adapter_config.json"):
        contribute(adapter=tmp_path)
    with pytest.raises(AdapterError, match="base_loss: Input should be a finite number"):
        contribute(base_loss=float("inf"))
    with pytest.raises(AdapterError, match=r"training\.loss.*finite number"):
        contribute(training={"loss": [float("nan")]})
    with pytest.raises(AdapterError, match="contributor: String should match"):
        contribute(contributor="Legal 07")
    assert list(tmp_path.iterdir()) == []


def test_manifest_names_every_byte(contribute):
    contribution = contribute()
    for name, entry in contribution.manifest.files.items():
        path = contribution.folder / name
        assert (hash_file(path), path.stat().st_size) == (entry.sha256, entry.bytes)
