"""`molora study`: what it prints, what it writes, and its errors of one line."""

import io
import json

import pytest
from molora_cli.main import run
from molora_studies.board import watching_study
from molora_studies.framework.render import collect_claims
from molora_studies.framework.results import plan_study
from molora_studies.framework.runner import Failure, Running, State
from molora_studies.framework.schedule import collect_tasks
from molora_studies.framework.worker import run_task
from rich.console import Console
from trivial_study import plan_number


@pytest.fixture
def molora(studies, capsys):
    """`molora("sums", ...)`: exit code, standard output, standard error."""

    def call(*arguments):
        capsys.readouterr()
        code = run(["study", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def finished(studies, cache):
    """The trivial study with all its tasks done, without a process."""
    planned = plan_study("sums", studies.registry, cache)
    for task in planned.survey(1).tasks.values():
        assert run_task(task, cache)
    return planned


def test_a_study_runs_and_leaves_json_page_and_figure(molora, tmp_path):
    code, out, err = molora("sums", "--out", tmp_path / "out", "--seeds", "5,7", "--workers", 2)
    assert code == 0, err
    assert "3 cells, 4 tasks: 0 done, 4 to do" in out
    assert "about 6 s on 2 quiet cores (8 s of one core)" in out
    assert "holds: Sums grow. Ours: yes, 3 seeds." in out
    document = json.loads((tmp_path / "out" / "sums.json").read_text())
    assert {"study", "title", "options", "seeds", "versions", "code", "cells", "summary",
            "seconds"} < document.keys()  # fmt: skip
    assert document["seeds"] == [5, 7] == document["options"]["seeds"]
    assert document["versions"]["torch"] and document["code"]["origin"] == "sums 1.0"
    assert len(document["code"]["molora_fed"]) == 64
    cell = document["cells"][0]
    assert cell["name"] == "1+2" and cell["labels"] == {"number": 2} and cell["result"]["sum"] == 3
    assert document["summary"]["findings"] == {"sums": {"1+2": 3, "1+3": 4, "1+4": 5}}
    assert len(document["seconds"]["tasks"]) == 4 and document["seconds"]["run"] > 0
    page = (tmp_path / "out" / "sums.md").read_text()
    assert "| Sums grow. | yes \\| no | yes, 3 seeds | holds | sum (3) | All were larger. |" in page
    assert "![Sums by cell.](sums-growth.svg)" in page and "`molora study sums" in page
    assert (tmp_path / "out" / "sums-growth.svg").read_bytes().startswith(b"<?xml")


def test_writing_again_gives_the_same_bytes_but_for_seconds(finished, tmp_path):
    first = finished.write(tmp_path / "first", seconds=3.5)
    second = finished.write(tmp_path / "second")
    for one, two in zip(first.files[1:], second.files[1:], strict=True):
        assert one.name == two.name and one.read_bytes() == two.read_bytes()
    documents = [json.loads(written.files[0].read_text()) for written in (first, second)]
    assert [document.pop("seconds")["run"] for document in documents] == [3.5, None]
    assert documents[0] == documents[1]


def test_a_summary_needs_every_cell_and_runs_nothing(molora, tmp_path, finished):
    more = tmp_path / "more.toml"
    more.write_text("count = 5\n")
    code, _, err = molora("sums", "--summary", "--config", more, "--out", tmp_path / "out")
    assert code == 1 and not (tmp_path / "out").exists()
    assert err == (
        "error: Cannot summarise study 'sums': expected all 5 cells, got 3; missing 1+5, 1+6. "
        "Run `molora study sums`.\n"
    )
    assert molora("sums", "--summary", "--out", tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / "sums.json").exists()


def test_the_plan_lists_tasks_and_runs_none(molora, cache):
    code, out, _ = molora("sums", "--plan")
    assert code == 0 and not cache.exists()
    rows = [line.split() for line in out.splitlines() if " add " in line]
    assert [row[-1] for row in rows] == ["1", "2", "3", "4"] and rows[0][:2] == ["2", "s"]


def test_studies_are_listed_with_their_summaries(molora):
    code, out, _ = molora("--list")
    assert code == 0 and "sums" in out and "Sums of small numbers" in out


def test_a_failed_task_is_named_in_one_line(molora, tmp_path):
    config = tmp_path / "fails.toml"
    config.write_text(f"[last]\nfail = '{tmp_path / 'mend'}'\n")
    code, out, err = molora("sums", "--config", config, "--out", tmp_path / "out")
    assert code == 1 and "failed   add 4: unexpected ValueError: as asked" in out
    assert err.startswith(
        "error: Cannot finish study 'sums': expected every task to be done, got 1 failed: "
        "'add 4'; first: unexpected ValueError: as asked. See '"
    )
    assert err.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 10, "expected its name, got none"),
        (("summs",), 61, "Did you mean 'sums'?"),
        (("empty",), 1, "got no cell"),
        (("sums", "--seeds", "one"), 10, "expected whole numbers separated by commas"),
        (("sums", "--seeds", "1,,2"), 10, "got an empty one"),
        (("sums", "--config", "missing.toml"), 10, "expected TOML, got No such file"),
        (("--collect", "."), 1, "expected results of studies, got none"),
    ],
)
def test_wrong_input_is_one_line(molora, tmp_path, monkeypatch, arguments, code, words):
    monkeypatch.chdir(tmp_path)
    got, _, err = molora(*arguments)
    assert got == code and words in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seeds = 'x'\nspeed = 2", "speed: Extra inputs are not permitted (got 2)"),
        ("count = 'many'", "it knows count, last, seeds"),
        ("count = ", "expected TOML, got Invalid value"),
        ("\udcff", "expected TOML, got 'utf-8' codec can't decode"),
    ],
)
def test_wrong_options_are_named(molora, tmp_path, text, words):
    config = tmp_path / "bad.toml"
    config.write_bytes(text.encode(errors="surrogateescape"))
    code, _, err = molora("sums", "--config", config)
    assert code == 10 and words in err and err.count("\n") == 1


def test_claims_of_a_folder_make_one_page(molora, finished, tmp_path):
    finished.write(tmp_path / "results" / "kalavai")
    (tmp_path / "results" / "kalavai" / "other.json").write_text("[1]")
    out = tmp_path / "results" / "kalavai.md"
    assert molora("--collect", tmp_path / "results" / "kalavai", "--out", out)[0] == 0
    page = out.read_text()
    assert page == collect_claims(tmp_path / "results" / "kalavai", out.parent)
    assert "## sums" in page and "[Sums of small numbers](kalavai/sums.md)" in page
    assert "1 holds." in page and "| Sums grow. |" in page and "| 1+2 | 3 |" in page
    assert molora("--collect", tmp_path / "results" / "kalavai")[1].startswith("# Published")


def test_collecting_refuses_a_broken_result(molora, tmp_path):
    (tmp_path / "sums.json").write_text("{")
    code, _, err = molora("--collect", tmp_path)
    assert code == 1 and "sums.json': expected JSON" in err


def test_a_terminal_shows_running_tasks_with_their_figures(monkeypatch):
    screen = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr("rich.live.get_console", lambda: screen)
    tasks = collect_tasks([plan_number(2, plan_number(1))])
    first, second = tasks.values()
    job = Running(second, done=3, total=9, fields={"loss": 2.5, "validation_loss": None})
    failure = Failure(plan_number(7), "as asked")
    state = State(tasks, {first.key}, [job], [failure], elsewhere={"x"}, seconds_left=600)
    with watching_study("Study") as board:
        board.ended(failure.task, failure)
        board.update(state)
    shown = screen.file.getvalue()
    assert "failed  add 7: as asked" in shown
    assert "1/2 tasks · 1 failed, 0 left out · 1 done by another study · ETA 10 min" in shown
    assert "add 2" in shown and "3/9" in shown and "loss 2.500" in shown
