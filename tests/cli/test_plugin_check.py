"""`molora plugins check`: ticks, findings and figures; nothing is written into a cooperative."""

import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from molora_acar.calibration import Observation, fit_calibration
from molora_acar.calibration_table import save_calibration
from molora_cli.plugin_runs import Tried, draw_tasks_for

from molora_fed.cascade.contract import MODES
from molora_fed.charter import CorpusRules
from molora_fed.cooperative.cooperative import create_cooperative
from molora_fed.models.base import load_base
from molora_fed.plugins import load_plugins
from molora_fed.testing import build_evidence, build_task

KEPT = Path(__file__).parents[1] / "data" / "kept" / "cooperative"

FILE = """
from dataclasses import replace

from molora_fed import Document, Finding, Forecast, OutputRouter, hookimpl


def take_the_first(adapters, *, name, seed):
    return replace(adapters[0], name=name)


def predict_nothing(case, past):
    return Forecast("best_alone", 0.0, None, None, None, "A floor.")


def check_licence(candidate):
    return Finding("a licence", "none", "Name the licence.", is_note=True)


def read_haiku():
    yield Document("first.txt", "An old silent pond")


class Even(OutputRouter):
    readings = frozenset({"evidence"})

    def scores(self, view):
        return 0 * view.evidence


@hookimpl
def register_merges(register):
    register("mine", take_the_first, summary="First", source="own definition")


@hookimpl
def register_gain_predictors(register):
    register("mine", predict_nothing, summary="Nothing", source="own definition")


@hookimpl
def register_admission_checks(register):
    register("licence", check_licence, summary="Licence", source="own definition")


@hookimpl
def register_domains(register):
    register("haiku", read_haiku, summary="Poems", source="own definition")


@hookimpl
def register_routers(register):
    register("even", Even, summary="Even", source="own definition")
"""

BROKEN = """
from molora_fed import hookimpl


def merge_in_place(adapters, *, name, seed):
    for update in adapters[0].updates.values():
        for tensor in update.tensors().values():
            tensor.zero_()
    return adapters[0]


def fail(case, past):
    raise IndexError("oops")


@hookimpl
def register_merges(register):
    register("spoils", merge_in_place, summary="Broken", source="own definition")


@hookimpl
def register_gain_predictors(register):
    register("fails", fail, summary="Broken", source="own definition")
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """`write(name, source)`: a one-file plugin that this process forgets after the test."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)

    def make(name, source):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
        return path

    yield make
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def read(ran):
    return {(each["kind"], each["name"]): each for each in json.loads(ran.out)}


def test_an_installed_plugin_is_checked_by_its_registered_name(molora):
    ran = molora("plugins", "check", "own-loss")
    assert ran.code == 0, ran.err
    assert "Gain predictor 'own-loss' of kalavai (molora-fed" in ran.out
    assert "✓ leaves case and past unchanged" in ran.out
    assert "outcomes inside intervals of level 0.80" in ran.out
    assert "7 checks, nothing is broken." in ran.out


def test_a_broken_file_is_told_of_whole_and_ends_with_1(molora, write):
    ran = molora("plugins", "check", write("spoils_all.py", BROKEN))
    assert ran.code == 1
    assert "Merge 'spoils' of spoils_all.py (file)" in ran.out
    assert "✗ leaves its adapters unchanged" in ran.out
    assert "expected the adapters as they were, got them changed" in ran.out
    # The failure of one hides nothing of the other.
    assert "✗ forecasts a usual case" in ran.out and "IndexError: oops" in ran.out
    assert "2 broken." in ran.out


def test_a_file_is_tried_on_a_cooperative_that_stays_as_it_was(molora, write, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(KEPT, home)
    path = write("useful_things.py", FILE)
    ran = molora("plugins", "check", path, "--on", home, "--json", "--beside", "uniform")
    assert ran.code == 0, ran.out + ran.err
    found = read(ran)
    said = {key: [c["remark"] for c in each["checks"]] for key, each in found.items()}
    assert all(each["is_sound"] for each in found.values())
    assert any("'even': " in line and " nats a token" in line for line in said["router", "even"])
    assert any("'evidence', published now: 4.070" in line for line in said["router", "even"])
    assert any(line.startswith("to fit x ") for line in said["router", "even"])
    assert (
        "5.483 nats a token on held-out text; 4.070 of the router 'evidence'"
        in (said["merge", "mine"][-1])
    )
    assert "forecast +0.00 %, no interval; measured +17.64 %" in said["gain predictor", "mine"][-1]
    assert (
        "abc-lora: only said: expected a licence, got none. Name the licence."
        in (said["admission check", "licence"])
    )
    assert said["domain", "haiku"][-1].startswith("1 documents of 18 characters")
    files = {p.relative_to(home): p.read_bytes() for p in home.rglob("*") if p.is_file()}
    kept = {p.relative_to(KEPT): p.read_bytes() for p in KEPT.rglob("*") if p.is_file()}
    # SQLite keeps these two beside what is read.
    assert {p: b for p, b in files.items() if p.name not in ("ledger.db-shm", "ledger.db-wal")} == (
        kept
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "softmax-embedding-mean",
            "nats a token on held-out text after 20 steps, 5.945 of the base",
        ),
        (
            "crossover",
            r"generation 3: slot .* is freed .* is born by crossover of .*; harm at most",
        ),
    ],
)
def test_what_populations_and_cascades_use_is_tried_in_a_short_run(molora, tmp_path, name, said):
    home = tmp_path / "home"
    shutil.copytree(KEPT, home)
    ran = molora("plugins", "check", name, "--on", home, "--json")
    assert ran.code == 0, ran.out + ran.err
    (found,) = read(ran).values()
    assert any(re.search(said, check["remark"]) for check in found["checks"]), ran.out
    assert not (home / "evolution").exists()


@pytest.mark.parametrize(
    ("suffix", "name", "family", "extractor"),
    [
        ("extractors", "choice-letter", "choices", "choice-letter"),
        ("extractors", "json-field", "arithmetic", "json-field"),  # no family asks for it
        ("task_families", "logic", "logic", "normalised-text"),
        ("judges", "majority", "arithmetic", "number"),
    ],
)
def test_what_is_tried_in_a_cascade_gets_tasks_that_use_it(suffix, name, family, extractor):
    tasks = draw_tasks_for(Tried(suffix, name, {}, load_plugins(), None))
    assert len(tasks) == 4
    assert {(task.family, task.extractor) for task in tasks} == {(family, extractor)}


def test_files_among_options_are_named_from_where_the_command_runs(molora, tmp_path, monkeypatch):
    right, price = dict.fromkeys(MODES, True), dict.fromkeys(MODES, 1.0)
    said = (["4", "4", "4"], ["4", "5", "6"], ["4", "4", "5"])
    observed = [
        Observation(build_evidence(said[number % 3], task=build_task(number)), right, price)
        for number in range(60)
    ]
    save_calibration(tmp_path / "table.json", fit_calibration(observed))
    shutil.copytree(KEPT, tmp_path / "home")
    monkeypatch.chdir(tmp_path)
    ran = molora("plugins", "check", "calibrated", "--option", "table=table.json", "--on", "home")
    assert ran.code == 0, ran.out + ran.err
    assert "replayed 4 decisions from the record, 0 differences" in ran.out


def test_what_cannot_be_tried_on_a_cooperative_is_a_finding(molora, tiny_checkpoint, tmp_path):
    create_cooperative(
        tmp_path / "home", "closed", load_base(tiny_checkpoint()), corpus=CorpusRules(block_size=32)
    )
    ran = molora("plugins", "check", "average", "--on", tmp_path / "home")
    assert ran.code == 1
    assert "✗ on cooperative 'closed'" in ran.out
    assert "got a charter under which they stay with contributors" in " ".join(ran.out.split())


def test_a_kind_chooses_what_is_checked(molora, write):
    path = write("both_kinds.py", FILE)
    assert molora("plugins", "check", path, "--kind", "predictor").out.count("' of ") == 1
    ran = molora("plugins", "check", path, "--kind", "cook")
    assert ran.code != 0 and "expected one of adapter-kind, adapter-router" in ran.err


def test_a_package_folder_is_checked_without_installing_it(molora, write):
    folder = write("molora-poems/pyproject.toml", (
        '[project]\nname = "molora-poems"\nversion = "1"\n'
        '[project.entry-points.molora_fed]\npoems = "molora_poems"\n'
    )).parent  # fmt: skip
    write("molora-poems/src/molora_poems/__init__.py", FILE)
    ran = molora("plugins", "check", folder, "--kind", "domains")
    assert ran.code == 0, ran.err
    assert "Domain 'haiku' of poems (molora-poems 0+folder)" in ran.out


@pytest.mark.parametrize(
    ("name", "source", "said"),
    [
        ("broken_file.py", "import no_such_module", "ModuleNotFoundError: No module named"),
        ("nothing_in_it.py", "", "expected a function with @hookimpl"),
        ("colorsys.py", FILE, "Rename the file"),
        ("two words.py", FILE, "named like a module"),
    ],
)
def test_what_cannot_be_checked_is_one_line(molora, write, name, source, said):
    ran = molora("plugins", "check", write(name, source))
    assert ran.code != 0
    assert said in ran.err and len(ran.err.strip().splitlines()) == 1


def test_options_are_those_of_the_one_thing_that_is_checked(molora):
    ran = molora("plugins", "check", "lora", "--option", "precision=int8")
    assert ran.code == 0, ran.out
    assert "its folder is not PEFT's format" in ran.out  # but it is with the defaults
    ran = molora("plugins", "check", "lora", "--option", "presicion=int8")
    assert ran.code == 1 and "valid values among the keys targets, precision, group" in ran.out
    ran = molora("plugins", "check", "ties", "--option", "density=0.1")
    assert ran.code == 0, ran.out
    ran = molora("plugins", "check", "average", "--option", "density=0.1")
    assert ran.code == 1 and "expected a class with Options, got none" in ran.out
    ran = molora("plugins", "check", "kalavai", "--option", "density=0.1")
    assert "expected one registered thing, got 24" in ran.err


def test_an_unknown_name_lists_near_ones(molora):
    ran = molora("plugins", "check", "own-los")
    assert ran.code != 0
    assert "Did you mean 'own-loss'" in ran.err


def test_a_name_that_two_kinds_share_is_checked_as_both(molora, monkeypatch, write):
    path = write("useful_twice.py", FILE)
    sys.path.insert(0, str(path.parent))
    useful_twice = importlib.import_module("useful_twice")
    plugins = load_plugins([("twice (molora-twice 1)", useful_twice)])
    monkeypatch.setattr("molora_cli.plugin_check.get_plugins", lambda: plugins)
    ran = molora("plugins", "check", "mine")
    assert ran.code == 0, ran.err
    assert "'mine' is registered as gain predictor and as merge; all are checked." in ran.out
    ran = molora("plugins", "check", "mine", "--kind", "merges")
    assert "registered as" not in ran.out and "Merge 'mine'" in ran.out
    assert molora("plugins", "check", "molora-twice").out.count(" of twice (") == 5


SET = """
from molora_fed import Configurable, Finding, OutputRouter, PluginOptions, RouterOptions, hookimpl


class LimitOptions(PluginOptions):
    limit: float = 1.0


class Limit(Configurable[LimitOptions]):
    def __call__(self, candidate):
        return Finding(f"at most {self.options.limit:g}", "more", "Shrink it.", is_note=True)


class SharpOptions(RouterOptions):
    sharpness: float = 0.0


class Sharp(OutputRouter[SharpOptions]):
    readings = frozenset({"evidence"})

    def scores(self, view):
        return self.options.sharpness * view.evidence


@hookimpl
def register_admission_checks(register):
    register("limit", Limit, summary="A limit", source="own definition")


@hookimpl
def register_routers(register):
    register("sharp", Sharp, summary="The last token, sharply", source="own definition")
"""


def test_what_is_tried_on_a_cooperative_has_the_options_that_are_given(molora, write, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(KEPT, home)
    path = write("set_things.py", SET)

    def try_it(kind, *options):
        ran = molora("plugins", "check", path, "--kind", kind, "--on", home, "--json", *options)
        assert ran.code == 0, ran.out + ran.err
        (found,) = read(ran).values()
        return [check["remark"] for check in found["checks"]]

    assert any("expected at most 1," in line for line in try_it("admission-check"))
    given = try_it("admission-check", "--option", "limit=7")
    assert any("expected at most 7," in line for line in given)
    plain, sharp = (
        next(line for line in try_it("router", *options) if line.startswith("'sharp'"))
        for options in ((), ("--option", "sharpness=1.0"))
    )
    assert plain != sharp
