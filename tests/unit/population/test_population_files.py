import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from molora_fed.adapters.updates import LinearUpdate
from molora_fed.charter import AdapterRules
from molora_fed.errors import AdapterError, MoloraError, PopulationError
from molora_fed.population.contract import Birth, Population, Slot
from molora_fed.population.files import (
    POPULATION_FILES,
    fingerprint_population,
    load_population,
    save_population,
)
from molora_fed.population.slots import make_population
from molora_fed.storage.files import hash_file
from molora_fed.testing.models import build_random_adapter

CARD, WEIGHTS = POPULATION_FILES
BASE = "ab" * 32


@pytest.fixture
def population(tiny_model):
    model = tiny_model()
    adapters = [
        (f"contribution-{seed}", domain, build_random_adapter(model, rank=rank, seed=seed))
        for seed, (rank, domain) in enumerate([(4, "légal"), (2, None)])
    ]
    base = SimpleNamespace(model=model, weights=BASE)
    return make_population(base, adapters, num_slots=4)


@pytest.fixture
def folder(population, tmp_path):
    save_population(population, tmp_path / "population")
    return tmp_path / "population"


def assert_equal(found, expected):
    assert found.base_weights == expected.base_weights
    assert found.frozen_depth == expected.frozen_depth
    for one, other in zip(found.slots, expected.slots, strict=True):
        assert (one.birth, one.domain, one.stale) == (other.birth, other.domain, other.stale)
        assert set(one.updates) == set(other.updates)
        for name, update in other.updates.items():
            assert one.updates[name].scale == update.scale
            for part, tensor in update.tensors().items():
                again = one.updates[name].tensors()[part]
                assert again.dtype == tensor.dtype
                assert torch.equal(again, tensor)


def test_round_trip_and_equal_bytes(population, tmp_path):
    fingerprint = save_population(population, tmp_path / "first")
    loaded = load_population(tmp_path / "first")
    assert_equal(loaded, population)
    assert save_population(loaded, tmp_path / "second") == fingerprint
    assert fingerprint == fingerprint_population(population) == fingerprint_population(loaded)
    assert {path.name for path in (tmp_path / "first").iterdir()} == set(POPULATION_FILES)
    for name in POPULATION_FILES:
        assert hash_file(tmp_path / "first" / name) == hash_file(tmp_path / "second" / name)


def test_saving_again_replaces_the_whole_folder(population, folder):
    (folder / "old").touch()
    one = replace(population, slots=population.slots[:1])
    save_population(one, folder)
    assert not (folder / "old").exists()
    assert_equal(load_population(folder), one)


def test_a_failed_save_leaves_the_old_one(population, folder):
    before = {name: hash_file(folder / name) for name in POPULATION_FILES}
    with pytest.raises(PopulationError, match="no slot"):
        save_population(replace(population, slots=()), folder)
    assert {name: hash_file(folder / name) for name in POPULATION_FILES} == before


def change_birth(slot, **changes):
    return replace(slot, birth=replace(slot.birth, **changes))


@pytest.mark.parametrize(
    "change",
    [
        lambda p: replace(p, base_weights="cd" * 32),
        lambda p: replace(p, frozen_depth=1),
        lambda p: replace(p, slots=p.slots[::-1]),
        lambda p: replace(p, slots=(replace(p.slots[0], stale=1), *p.slots[1:])),
        lambda p: replace(p, slots=(replace(p.slots[0], domain=None), *p.slots[1:])),
        lambda p: replace(p, slots=(change_birth(p.slots[0], seed=9), *p.slots[1:])),
        lambda p: replace(p, slots=(change_birth(p.slots[0], fitness_before=0.1), *p.slots[1:])),
    ],
)
def test_the_fingerprint_is_of_everything(change, population):
    assert fingerprint_population(change(population)) != fingerprint_population(population)


_texts = st.text(max_size=20)
_scales = st.floats(-1e6, 1e6, allow_nan=False)


@st.composite
def populations(draw):
    slots = []
    for index in range(draw(st.integers(1, 3))):
        updates = {}
        for module in draw(st.lists(st.sampled_from("uvwxyz"), min_size=1, unique=True)):
            rank, rows, columns = (draw(st.integers(1, 3)) for _ in range(3))
            dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
            generator = torch.Generator().manual_seed(rows)
            updates[f"block.{index}.{module}"] = LinearUpdate(
                a=torch.randn(columns, rank, generator=generator).T.to(dtype),
                b=torch.randn(rows, rank, generator=generator).to(dtype),
                scale=draw(_scales),
            )
        birth = Birth(
            id=f"s{index}" + draw(_texts),
            operator=draw(_texts),
            parents=tuple(draw(st.lists(_texts, max_size=2))),
            generation=draw(st.integers(0, 9)),
            seed=draw(st.integers(-(2**63), 2**64 - 1)),
            fitness_before=draw(st.none() | _scales),
        )
        domain, stale = draw(st.none() | _texts), draw(st.integers(0, 9))
        slots.append(Slot(birth, domain, updates, stale))
    return Population(BASE, draw(st.integers(0, 9)), tuple(slots))


@settings(max_examples=25, deadline=None)
@given(population=populations())
def test_any_population_comes_back_exactly(population, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any") / "population"
    fingerprint = save_population(population, folder)
    loaded = load_population(folder)
    assert_equal(loaded, population)
    assert fingerprint_population(loaded) == fingerprint


def test_limits_of_the_charter(population, folder):
    size = (folder / WEIGHTS).stat().st_size
    limits = {"frozen_depth": 0, "max_rank": 4, "max_bytes": size}
    assert_equal(load_population(folder, rules=AdapterRules(**limits)), population)
    for change, message in [
        ({"max_rank": 3}, "of rank 4 above the charter's 3"),
        ({"max_bytes": size // 4 - 1}, "expected at most"),
        ({"frozen_depth": 1}, "frozen depth of at least 1, got 0"),
    ]:
        with pytest.raises(MoloraError, match=message):
            load_population(folder, rules=AdapterRules(**{**limits, **change}))


def edit_card(folder, edit):
    card = json.loads((folder / CARD).read_text())
    edit(card)
    (folder / CARD).write_text(json.dumps(card))


def rewrite_weights(folder, edit):
    """Other tensors, and a card that says so."""
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)
    edit_card(folder, lambda card: card.update(weights=hash_file(folder / WEIGHTS)))


FIRST = "0.gpt_neox.layers.0.attention.dense"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{FIRST}.a"), "no matching factors"),
        (lambda t: t.update({f"{FIRST}.a": torch.zeros(3, 32)}), "no matching factors"),
        (lambda t: t.update({f"{FIRST}.a": torch.zeros(0, 32)}), "of shape"),
        (lambda t: t.update({f"{FIRST}.a": torch.zeros(4, 32, 1)}), "of shape"),
        (lambda t: t.update({"4.layer.a": torch.zeros(4, 32)}), "'4.layer.a' of shape"),
        (lambda t: t.update({"layer.a": torch.zeros(4, 32)}), "'layer.a' of shape"),
        (lambda t: t.update({"00.layer.a": torch.zeros(4, 32)}), "'00.layer.a' of shape"),
        (lambda t: t.update({f"{FIRST}.a": torch.full((4, 32), torch.nan)}), "NaN or infinity"),
        (lambda t: t.update({f"{FIRST}.a": torch.zeros(4, 32).int()}), "tensors of F32"),
        (lambda t: [t.pop(k) for k in list(t) if k.startswith("3.")], "no factors of slot 3"),
    ],
)
def test_refuses_tensors_that_are_no_population(edit, message, folder):
    rewrite_weights(folder, edit)
    with pytest.raises(MoloraError, match=message) as caught:
        load_population(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "edit",
    [
        lambda card: card.update(format_version=2),
        lambda card: card.update(slots=[]),
        lambda card: card.update(more=1),
        lambda card: card["slots"][0].update(stale=-1),
        lambda card: card["slots"][0].update(scale=float("nan")),
        lambda card: card["slots"][0]["birth"].update(id=card["slots"][1]["birth"]["id"]),
        lambda card: card["slots"][0]["birth"].update(id="x" * 1000),
        lambda card: card["slots"][0]["scales"].update(other=2.0),
        lambda card: card.update(weights="0" * 64),
        lambda card: card.update(base_weights="../other"),
    ],
)
def test_refuses_a_card_that_is_no_population(edit, folder):
    edit_card(folder, edit)
    with pytest.raises(AdapterError, match="Cannot read population"):
        load_population(folder)


def test_refuses_missing_cut_and_pickled_files(folder):
    data = (folder / WEIGHTS).read_bytes()
    for wrong in (data[:-10], b"\x80\x04" + data, b"", data[:4]):
        (folder / WEIGHTS).write_bytes(wrong)
        with pytest.raises(AdapterError, match="Cannot read"):
            load_population(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(AdapterError, match="Cannot read"):
        load_population(folder)
    (folder / CARD).write_text("[]")
    with pytest.raises(AdapterError, match="Cannot read"):
        load_population(folder)
