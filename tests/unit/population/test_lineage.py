import json

import pytest

from molora_fed.errors import PopulationError
from molora_fed.plugins import load_plugins
from molora_fed.population.lifecycle import open_operators, run_lifecycle
from molora_fed.population.lineage import (
    MAX_LINEAGE_BYTES,
    add_to_lineage,
    describe_change,
    describe_fitness,
    describe_start,
    read_lineage,
)
from molora_fed.testing import POPULATION_DOMAINS as DOMAINS
from molora_fed.testing import build_fitness, build_population

STEPS = open_operators(
    [
        ("death", {"patience": 1, "min_age": 1, "threshold": 0.15}),
        ("slot-reallocation", {}),
        ("inheritance", {}),
        ("svd-mutation", {}),
    ],
    load_plugins(),
)
VALUES = [(0.3, 0.2, 0.4, -0.1), (0.3, 0.1, 0.4, 0.25), (0.3, 0.2, 0.35, 0.28)]
KEPT = [True, False, True]


def build_lines(kept=KEPT):
    """A start, and generations of fitness and change."""
    population = build_population()
    lines = [describe_start(population)]
    for generation, (values, keep) in enumerate(zip(VALUES, kept, strict=True), 1):
        fitness = build_fitness(values)
        lines.append(describe_fitness(population, fitness, DOMAINS, generation))
        state = run_lifecycle(
            STEPS, population, fitness, DOMAINS, generation=generation, seed=generation
        )
        lines.append(describe_change(population, state, kept=keep))
        population = state.population if keep else population
    return lines


@pytest.fixture
def path(tmp_path):
    for line in build_lines():
        add_to_lineage(tmp_path / "lineage.jsonl", line)
    return tmp_path / "lineage.jsonl"


def test_a_lineage_comes_back_with_everything(path):
    lineage = read_lineage(path)
    assert list(lineage.lines) == build_lines()
    assert [line.generation for line in lineage.measurements] == [1, 2, 3]
    assert [line.generation for line in lineage.changes] == [0, 1, 2, 3]
    members = lineage.members
    assert list(members) == ["g0-s0", "g0-s1", "g0-s2", "g0-s3", "g1-s3", "g2-s1"]
    child = members["g1-s3"]
    assert child.birth.operator == "inheritance+svd-mutation"
    assert child.birth.parents == ("g0-s2",)
    assert child.birth.generation == 1 and child.slot == 3 and child.domain == "down"
    assert (child.birth.fitness_before, child.fitness_after) == (-0.1, 0.25)
    assert child.fitness == {2: (0.25, 1e-3), 3: (0.28, 1e-3)}
    assert members["g0-s3"].death == 1 and child.death is None and child.kept


def test_what_the_guard_refused_never_lived(path):
    refused = read_lineage(path).members["g2-s1"]
    assert not refused.kept and refused.death is None and refused.fitness_after is None
    assert read_lineage(path).members["g0-s1"].death is None


def test_lines_are_only_added_and_the_same_ones_change_nothing(tmp_path):
    path = tmp_path / "lineage.jsonl"
    before = b""
    for line in build_lines():
        add_to_lineage(path, line)
        assert path.read_bytes().startswith(before) and path.read_bytes() != before
        before = path.read_bytes()
    for line in build_lines():  # a run that was killed does it all again
        add_to_lineage(path, line)
    assert path.read_bytes() == before


def test_every_prefix_goes_on_to_the_same_bytes(path):
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for count in range(len(lines)):
        path.write_bytes(b"".join(lines[:count]))
        for line in build_lines():
            add_to_lineage(path, line)
        assert path.read_bytes() == whole


def test_another_line_in_the_same_place_is_refused(path):
    other = build_lines(kept=[True, True, True])[4]
    with pytest.raises(PopulationError, match=r"the change of generation 2 that is there"):
        add_to_lineage(path, other)


def test_a_line_that_cannot_follow_is_refused(tmp_path):
    path = tmp_path / "lineage.jsonl"
    lines = build_lines()
    with pytest.raises(PopulationError, match="the fitness of generation 1 here"):
        add_to_lineage(path, lines[1])
    assert not path.exists()
    add_to_lineage(path, lines[0])
    with pytest.raises(PopulationError, match="fitness of other adapters than live"):
        add_to_lineage(path, lines[3])


def edit(path, number, change):
    lines = path.read_text().splitlines()
    record = json.loads(lines[number])
    change(record)
    lines[number] = json.dumps(record)
    path.write_text("".join(f"{line}\n" for line in lines))


@pytest.mark.parametrize(
    ("number", "change", "named"),
    [
        (0, lambda r: r.update(births=[]), "births and deaths that do not match"),
        (0, lambda r: r["births"][1].update(id="g0-s0"), "'g0-s0' born again"),
        (2, lambda r: r["births"][0].update(id="g0-s3"), "'g0-s3' born again"),
        (1, lambda r: r.update(scope=3), "scope"),
        (1, lambda r: r.update(extra=3), "extra"),
        (1, lambda r: r.update(kind="other"), "kind|tag"),
        (1, lambda r: r["slots"][0].update(by_domain=[0.1]), "fitness of other domains"),
        (1, lambda r: r["slots"].reverse(), "fitness of other adapters"),
        (2, lambda r: r.update(deaths=["g0-s0"]), "births and deaths that do not match"),
        (2, lambda r: r["births"][0].update(generation=2), "a birth of generation 2"),
        (
            2,
            lambda r: r["births"][0].update(parents=["x"]),
            "the parent 'x', which is not in the population",
        ),
        (4, lambda r: r.update(generation=1), "the change of generation 1 here"),
    ],
)
def test_a_file_that_says_what_cannot_be_is_refused(path, number, change, named):
    edit(path, number, change)
    with pytest.raises(PopulationError, match=named) as caught:
        read_lineage(path)
    assert "\n" not in str(caught.value)


def test_a_file_with_a_line_twice_is_refused(path):
    first, fitness, *others = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([first, fitness, fitness, *others]))
    with pytest.raises(PopulationError, match="the fitness of generation 1 here"):
        read_lineage(path)


def test_files_that_are_no_lineage_are_refused(tmp_path):
    path = tmp_path / "lineage.jsonl"
    with pytest.raises(PopulationError, match="expected a file, got No such file"):
        read_lineage(path)
    for content in (b"{", b"\xff\xfe", b"[]\n", b"\n", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(PopulationError, match="lines of a lineage"):
            read_lineage(path)
    with path.open("wb") as file:
        file.truncate(MAX_LINEAGE_BYTES + 1)
    with pytest.raises(PopulationError, match="at most"):
        read_lineage(path)


def test_nan_is_refused_on_both_ways(path):
    fitness = build_fitness((0.1, 0.2, 0.3, float("nan")))
    with pytest.raises(ValueError):
        describe_fitness(build_population(), fitness, DOMAINS, 1)
    path.write_text(path.read_text().replace("-0.1", "NaN"))
    with pytest.raises(PopulationError):
        read_lineage(path)


def test_a_newborn_may_descend_from_another_of_its_generation(tmp_path):
    first, _, change = build_lines()[:3]
    birth = change.births[0]
    other = birth.model_copy(update={"slot": 2, "id": "g1-s2", "parents": (birth.id,)})
    both = change.model_copy(update={"births": (other, birth), "deaths": ("g0-s2", *change.deaths)})
    path = tmp_path / "lineage.jsonl"
    add_to_lineage(path, first)
    add_to_lineage(path, both)
    assert read_lineage(path).members["g1-s2"].birth.parents == ("g1-s3",)
