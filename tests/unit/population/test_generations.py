import json
import signal
from dataclasses import replace

import evolution_helpers
import pytest
from adaptation_helpers import build_population, build_router
from evolution_helpers import (
    ADAPTATION,
    CONFIG,
    LIFECYCLE,
    build_data,
    evolve_until_killed,
    read_results,
    run_evolution,
)
from forking_helpers import run_forked

from molora_fed.errors import PopulationError
from molora_fed.models.base import load_base
from molora_fed.population.evolution import Branch, read_generations
from molora_fed.population.files import fingerprint_population
from molora_fed.population.lineage import read_lineage
from molora_fed.population.router_files import pack_router


@pytest.fixture(scope="module")
def base(tiny_checkpoint):
    return load_base(tiny_checkpoint())


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory):
    """Adaptation alone: no lifecycle."""
    return run_evolution(base, tmp_path_factory.mktemp("plain"))


def bytes_of(branch):
    return fingerprint_population(branch.population), pack_router(branch.router, "parallel-sigmoid")


def test_without_operators_it_is_one_long_adaptation(plain):
    assert [one.number for one in plain.generations] == [0, 1, 2]
    assert not plain.compared and all(one.kept for one in plain.generations)
    assert not any(one.newborns for one in plain.generations)
    assert not list((plain.folder / "generations").rglob("adaptation.safetensors"))
    assert len(list((plain.folder / "generations").rglob("adaptation.jsonl"))) == 3


def test_a_harmful_lifecycle_is_refused_and_the_twin_kept_bit_for_bit(base, plain, tmp_path):
    harmed = run_evolution(base, tmp_path, "harm")
    assert [one.kept for one in harmed.generations] == [True, False, False]
    assert bytes_of(harmed.branch) == bytes_of(plain.branch)
    for one in harmed.compared:
        assert one.comparison["bound"] > CONFIG.delta and one.comparison["difference"] > 0
    members = read_lineage(harmed.folder / "lineage.jsonl").members
    assert not members["g1-s0"].kept and not members["g2-s0"].kept
    assert members["g0-s0"].death is None


def test_a_helpful_lifecycle_is_kept(base, tmp_path, monkeypatch):
    longer = replace(CONFIG, generations=0, start_steps=80, guard="off")
    donor = run_evolution(base, tmp_path / "donor", config=longer).branch.population
    monkeypatch.setattr(evolution_helpers.Help, "donor", donor)
    helped = run_evolution(base, tmp_path, "help", config=replace(CONFIG, generations=1))
    assert helped.generations[1].kept
    assert helped.generations[1].comparison["bound"] < 0
    assert [s.birth.id for s in helped.branch.population.slots] == ["g1-s0", "g1-s1", "g1-s2"]


def test_without_the_guard_everything_is_kept_and_no_twin_is_run(base, plain, tmp_path):
    bare = run_evolution(base, tmp_path, "harm", config=replace(CONFIG, guard="off"))
    assert all(one.kept and one.comparison is None for one in bare.generations)
    assert bare.branch.population.slots[0].birth.id == "g2-s0"
    assert not list(bare.folder.rglob("twin"))
    assert bytes_of(bare.branch) != bytes_of(plain.branch)


def test_a_lifecycle_that_changes_nothing_is_kept(base, plain, tmp_path):
    copied = run_evolution(base, tmp_path, "copy")
    assert [one.comparison["difference"] for one in copied.compared] == [0.0, 0.0]
    assert all(one.kept for one in copied.generations)
    for one, other in zip(
        copied.branch.population.slots, plain.branch.population.slots, strict=True
    ):
        assert all(
            bool((update.a == other.updates[name].a).all()) for name, update in one.updates.items()
        )


def test_fresh_guards_use_other_documents_each_time_and_spending_raises_the_level(base, tmp_path):
    data = build_data(base, tmp_path / "states", draws=3)
    seen = [set(part.clusters[0].tolist()) for part in data._carved.guard]
    assert not seen[0] & seen[1] and not seen[1] & seen[2] and not seen[0] & seen[2]
    spent = run_evolution(base, tmp_path, "copy", config=replace(CONFIG, guard="spending"))
    levels = [one.comparison["level"] for one in spent.compared]
    assert levels == pytest.approx([1 - 0.05 / 2, 1 - 0.05 / 4])


def test_the_paper_lifecycle_runs_and_leaves_a_lineage(base, tmp_path):
    evolved = run_evolution(base, tmp_path, *LIFECYCLE, config=replace(CONFIG, guard="off"))
    assert all(one.newborns for one in evolved.generations[1:])
    lineage = read_lineage(evolved.folder / "lineage.jsonl")
    assert [line.generation for line in lineage.measurements] == [1, 2]
    newborn = next(m for m in lineage.members.values() if m.birth.generation == 1)
    assert newborn.birth.operator == "inheritance+svd-mutation"
    assert read_generations(evolved.folder) == evolved.generations
    gates = evolved.generations[-1].gates
    assert gates.keys() == {"up", "down"} and all(len(row) == 3 for row in gates.values())


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    phases = []
    run_evolution(base, folder, *LIFECYCLE, on_phase=phases.append)
    return read_results(folder), phases


def test_phases_are_told(whole):
    assert whole[1][:6] == [
        "generation 0: adaptation",
        "generation 1: fitness",
        "generation 1: adaptation",
        "generation 1: adaptation of the twin",
        "generation 1: guard",
        "generation 2: fitness",
    ]


@pytest.mark.parametrize("at", [2, 5, 8])
def test_a_stopped_evolution_goes_on_to_the_same_bytes(base, whole, tmp_path, at):
    left = [at]

    def stop(name):
        left[0] -= 1
        if left[0] == 0:
            raise Stopped

    with pytest.raises(Stopped):
        run_evolution(base, tmp_path, *LIFECYCLE, on_phase=stop)
    run_evolution(base, tmp_path, *LIFECYCLE)
    assert read_results(tmp_path) == whole[0]


def test_a_killed_evolution_goes_on_to_the_same_bytes(base, tiny_checkpoint, whole, tmp_path):
    ended = run_forked(
        tmp_path / "said", evolve_until_killed, str(tiny_checkpoint()), str(tmp_path), 110
    )
    assert ended.code == -signal.SIGKILL, ended.err
    run_evolution(base, tmp_path, *LIFECYCLE)
    assert read_results(tmp_path) == whole[0]


def test_a_finished_evolution_is_read_back(base, whole, tmp_path):
    run_evolution(base, tmp_path, *LIFECYCLE)
    phases = []
    run_evolution(base, tmp_path, *LIFECYCLE, on_phase=phases.append)
    assert phases == []


def test_other_inputs_in_the_same_folder_are_refused(base, tmp_path):
    run_evolution(base, tmp_path, "copy")
    with pytest.raises(PopulationError, match=r"got others: operators\. Restore"):
        run_evolution(base, tmp_path, "harm")
    with pytest.raises(PopulationError, match="got others: adaptation, delta"):
        config = replace(CONFIG, delta=0.5, adaptation=replace(ADAPTATION, batch=2))
        run_evolution(base, tmp_path, "copy", config=config)


def test_a_damaged_generation_is_named(base, tmp_path):
    evolved = run_evolution(base, tmp_path, "copy")
    path = evolved.folder / "generations" / "0001" / "generation.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "population": "0" * 64}))
    with pytest.raises(PopulationError, match=r"generations/0001'.*Remove that folder"):
        run_evolution(base, tmp_path, "copy")
    path.write_text("{")
    with pytest.raises(PopulationError, match=r"Cannot read generation .*0001"):
        run_evolution(base, tmp_path, "copy")


@pytest.mark.parametrize(
    ("change", "named"),
    [({"generations": -1}, "generations -1"), ({"start_steps": -2}, "start_steps -2")],
)
def test_settings_that_cannot_be_used_are_named(base, tmp_path, change, named):
    with pytest.raises(PopulationError, match=named):
        run_evolution(base, tmp_path, config=replace(CONFIG, **{"guard": "off", **change}))
    with pytest.raises(PopulationError, match="a router of 2 slots for 3"):
        run_evolution(base, tmp_path, branch=Branch(build_population(base), build_router(2)))


def test_no_folder_no_evolution(tmp_path):
    with pytest.raises(PopulationError, match=r"got none\. Make one with"):
        read_generations(tmp_path)
