"""`molora study --rejudge`: summaries and pages from kept cells alone, and nothing else changed."""

import json
import shutil
from pathlib import Path

import pytest
from molora_cli.main import run
from molora_studies.framework.registry import get_studies
from molora_studies.framework.rejudge import rejudge_document
from molora_studies.framework.results import plan_study
from molora_studies.framework.worker import run_task

RESULTS = Path(__file__).parents[3] / "docs" / "results"
SUMMARY = ("format_version", "judged", "summary")
KEPT = {
    path.stem: path
    for path in sorted(RESULTS.rglob("*.json"))
    if {"study", "cells"} <= set(json.loads(path.read_bytes()))
}


@pytest.fixture
def molora(studies, capsys):
    """`molora("--rejudge", ...)`: exit code, standard output, standard error."""

    def call(*arguments):
        capsys.readouterr()
        code = run(["study", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def folder(studies, cache, tmp_path):
    """A folder with the trivial study's result, as of before claims named their unit."""
    planned = plan_study("sums", studies.registry, cache)
    for task in planned.survey(1).tasks.values():
        assert run_task(task, cache)
    folder = tmp_path / "kept"
    planned.write(folder)
    change(folder, lambda document: document.update(format_version=1))
    change(folder, lambda document: document["summary"]["claims"][0].pop("unit"))
    change(folder, lambda document: document["summary"]["claims"][0].update(verdict="differs"))
    shutil.rmtree(cache)
    return folder


def change(folder, edit):
    path = folder / "sums.json"
    document = json.loads(path.read_bytes())
    edit(document)
    path.write_text(json.dumps(document))


def test_a_result_of_the_earlier_form_is_still_collected(molora, folder):
    code, out, _ = molora("--collect", folder)
    assert code == 0 and "| differs | not named | All were larger. |" in out


def test_verdicts_are_made_anew_from_the_cells_and_the_rest_stays(molora, folder, cache):
    before = json.loads((folder / "sums.json").read_bytes())
    code, out, err = molora("--rejudge", folder)
    assert code == 0, err
    assert "sums.json: 1 verdicts changed" in out and "  differs -> holds: Sums grow." in out
    after = json.loads((folder / "sums.json").read_bytes())
    assert after["summary"]["claims"][0]["unit"] == "sum (3)"
    assert after["format_version"] == 2 and len(after["judged"]["molora_fed"]) == 64
    assert {k: v for k, v in before.items() if k not in SUMMARY} == {
        k: v for k, v in after.items() if k not in SUMMARY
    }
    page = (folder / "sums.md").read_text()
    assert "| holds | sum (3) | All were larger. |" in page and "--rejudge" in page
    assert not cache.exists()  # nothing ran


def test_judging_twice_gives_the_same_bytes_and_another_folder_leaves_this_one(molora, folder):
    untouched = (folder / "sums.json").read_bytes()
    out = folder.parent / "out"
    assert molora("--rejudge", folder, "--out", out)[0] == 0
    assert (folder / "sums.json").read_bytes() == untouched
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "0 verdicts changed" in molora("--rejudge", out)[1]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda d: d.update(study="summs"), "expected a study that is installed, got 'summs'"),
        (lambda d: d["options"].update(speed=2), "speed: Extra inputs are not permitted (got 2)"),
        (lambda d: d["cells"].pop(), "got none named 1+4"),
        (lambda d: d["cells"][0]["result"].pop("sum"), "got one without 'sum'"),
        (lambda d: d.pop("cells"), "got none of cells"),
    ],
)
def test_a_result_that_cannot_be_judged_is_named_in_one_line_and_nothing_is_written(
    molora, folder, edit, words
):
    other = folder / "a.json"
    shutil.copy(folder / "sums.json", other)  # comes first, and is sound
    change(folder, edit)
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    code, _, err = molora("--rejudge", folder)
    assert code == 1 and err.count("\n") == 1
    assert "sums.json' anew: " in err and words in err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept


def test_a_folder_without_results_is_refused(molora, tmp_path):
    code, _, err = molora("--rejudge", tmp_path)
    assert code == 10 and "expected results of studies, got none" in err


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.long) if n == "acar" else n for n in KEPT]
)
def test_kept_verdicts_are_those_of_the_kept_cells(name):
    document = json.loads(KEPT[name].read_bytes())
    new, _ = rejudge_document(document, get_studies().registry, name)

    def read(source):
        return [(c["claim"], c["verdict"], c["unit"]) for c in source["summary"]["claims"]]

    assert read(document) == read(new)
    assert all(unit for _, _, unit in read(new))
