"""`molora evolve`: a cooperative's contributions as a population, its lineage, text and figures."""

import json
import shutil

import pytest

from molora_fed.contributions.states import CooperativeState
from molora_fed.cooperative.cooperative import open_cooperative
from molora_fed.population.bundle import load_evolved

SETTINGS = {
    "fusion.mode": "population",
    "population.generations": 1,
    "population.start_steps": 3,
    "population.steps": 2,
    "population.slots": 3,
    "population.rank": 2,
    "population.filling": "fresh",
    "population.lifecycle": '[{name = "death", options = {threshold = 9.0, patience = 1, '
    'min_age = 1}}, {name = "slot-reallocation"}, {name = "inheritance"}]',
}


@pytest.fixture(scope="module")
def evolved(setup, tmp_path_factory):
    """A copy of the tiny cooperative, evolved, and what was printed."""
    from molora_cli.main import run

    root = tmp_path_factory.mktemp("evolved") / "tiny"
    shutil.copytree(setup.cooperative, root)
    settings = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]
    trained = [str(folder) for folder in setup.trained.values()]
    assert run(["coop", "admit", str(root), *trained]) == 0
    assert run(["coop", "amend", str(root), *settings]) == 0
    assert run(["evolve", str(root)]) == 0
    return root


def test_evolving_leaves_a_model_figures_and_a_report(evolved):
    folder = evolved / "evolution"
    result = json.loads((folder / "evolution.json").read_text())
    assert set(result["losses"]["specialists"]) == {"abc-1", "xyz-1"}
    assert result["domains"] == ["abc", "xyz"]
    assert [one["number"] for one in result["generations"]] == [0, 1]
    assert result["guard"]["compared"] == 1
    page = (folder / "report" / "population.html").read_text()
    assert "Fitness by slot and generation" in page and page.count("data:image/png") == 4
    assert "Contamination" in page and "are left out of every figure" in page
    for name in ("fitness", "slot_gates", "lineage", "losses"):
        assert (folder / "report" / f"{name}.png").is_file()
    model = load_evolved(folder / "evolved")
    assert model.population.num_slots == 3
    with open_cooperative(evolved).read_ledger() as ledger:
        assert ledger.cooperative_state == CooperativeState.PUBLISHED
        decided = [(e.what, e.subject) for e in ledger.events() if e.what.endswith("-decided")]
    population = result["fingerprints"]["population"]
    generations = [("generation-decided", str(number)) for number in range(2)]
    assert decided == [*generations, ("evolution-decided", population)]


def test_evolving_again_reads_everything_back(molora, evolved):
    path = evolved / "evolution" / "evolution.json"
    before = json.loads(path.read_text())
    ran = molora("evolve", "run", evolved)
    assert (ran.code, ran.err) == (0, "")
    assert "harm at most" in ran.out and "adaptation" not in ran.out
    after = json.loads(path.read_text())
    assert {**before, "created": ""} == {**after, "created": ""}


def test_the_page_is_drawn_again(molora, evolved):
    page = evolved / "evolution" / "report" / "population.html"
    before = page.read_bytes()
    page.unlink()
    for folder in (evolved, evolved / "evolution"):
        ran = molora("report", folder)
        assert (ran.code, ran.err) == (0, "") and "population.html" in ran.out
    assert page.read_bytes() == before


def test_the_tree_is_printed(molora, evolved, tmp_path):
    ran = molora("evolve", "lineage", evolved, "--figure", tmp_path / "tree.png")
    assert (ran.code, ran.err) == (0, "")
    assert "g0-s0" in ran.out and "admitted abc-1" in ran.out.replace("admitted xyz-1", "")
    assert "g1-s" in ran.out and "inheritance" in ran.out
    assert (tmp_path / "tree.png").read_bytes().startswith(b"\x89PNG")
    ran = molora("evolve", "lineage", tmp_path)
    assert ran.code == 40 and len(ran.err.splitlines()) == 1


def test_text_and_figures_of_an_evolved_model(molora, setup, evolved):
    ran = molora("generate", evolved / "evolution", "--prompt", "ab", "--max-new-tokens", 3)
    assert ran.code == 0 and ran.out.startswith("ab")
    assert "g0-s" in ran.err
    ran = molora(
        "evaluate", evolved, "--data", f"mine={setup.texts['abc'] / '000.txt'}",
        "--block-size", 32,
    )  # fmt: skip
    assert (ran.code, ran.err) == (0, "")
    assert "fused, parallel-sigmoid" in ran.out and "specialist g0-s0" in ran.out


def test_a_population_is_not_fused_by_a_router(molora, evolved):
    ran = molora("fuse", "--cooperative", evolved, "--out", evolved / "o")
    assert ran.code == 11 and "Use `molora evolve`" in ran.err


def test_evolving_nothing_or_with_wrong_options_is_one_line(molora, setup, tmp_path):
    shutil.copytree(setup.cooperative, tmp_path / "tiny")
    ran = molora("evolve", tmp_path / "tiny")
    assert ran.code == 10 and "got no contribution" in ran.err
    assert len(ran.err.splitlines()) == 1
    for setting, named in (
        ("population.options.colour=red", "colour"),
        ("population.router=paralel", "Did you mean 'parallel-sigmoid'"),
        ('population.lifecycle=[{name = "death", options = {often = 1}}]', "often"),
        ("population.level=2", "population.level"),
    ):
        settings = ("--set", "fusion.mode=population", "--set", setting)
        ran = molora("coop", "amend", tmp_path / "tiny", *settings)
        assert ran.code != 0 and named in ran.err and len(ran.err.splitlines()) == 1


def test_withdrawing_a_contributor_deletes_what_was_bred_from_it(molora, evolved, tmp_path):
    shutil.copytree(evolved, tmp_path / "tiny")
    ran = molora("coop", "withdraw", tmp_path / "tiny", "xyz-1")
    assert (ran.code, ran.err) == (0, "") and "retracted" in ran.out
    assert not (tmp_path / "tiny" / "evolution").exists()
