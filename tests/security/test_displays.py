"""Names, keys and messages of others on every display: shown as text, obeyed by nothing."""

import json
import re
from pathlib import Path

import pytest
from molora_cli import live, main, output, progress

from molora_fed.federation.status import FederationEvent
from molora_fed.population.lineage import Change, Lineage, Newborn
from molora_fed.reporting.lineage import build_lineage_tree, draw_lineage
from molora_fed.reporting.report import write_report
from molora_fed.reporting.summary import (
    build_history_table,
    build_run_forecast,
    build_sample_text,
    build_summary,
    build_time_table,
)

HOSTILE = (
    "[/x]",
    "[/]",
    "[bold red]b[/bold red]",
    "[link=http://x.example]y[/link]",
    "$\\frac{$",
    "$x_{$",
    "a$b$c",
    ":smile:",
    "\x1b[2J\x1b]8;;http://x.example\x07y",
    "\x9b2J",
    "\u202etxt.exe",
    "a\nb\rc\td",
    "_hidden",
    "\ud800",
    "x" * 5_000,
    "",
)
NAMES = ("cpp", "python", "readme", "science", "evidence", "evidence-zero", "linear", "own-loss")
# What rich writes itself: colours, cursor, erasing. None of it comes from a name.
_OWN = re.compile("\x1b\\[[0-9;?]*[A-Za-z]")
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]")


def check_shown(text):
    """Nothing is left that a terminal obeys; markup is shown as it was written."""
    assert "\x1b]8" not in text  # a link
    assert not _HIDDEN.search(_OWN.sub("", text).replace("\r", ""))


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)


def build_events(name):
    yield FederationEvent("TRAINING", message=name, problem=True)
    yield FederationEvent(name, name, state=name, step=1, total=2, loss=1.0, message=name)
    yield FederationEvent("TRAINING", name, message=name, problem=True, eta_seconds=1e9)


@pytest.mark.parametrize("name", HOSTILE)
def test_the_live_table(terminal, capsys, name):
    with live.watching(f"Contributor for {name}") as board:
        for event in build_events(name):
            board(event)
        with board.paused():
            pass
    shown = capsys.readouterr().out
    check_shown(shown)
    if name.isascii() and name.isprintable() and 0 < len(name) < 30:
        assert name in _OWN.sub("", shown)


@pytest.mark.parametrize("name", HOSTILE)
def test_plain_lines(capsys, name):
    with live.watching("title") as board:
        for event in build_events(name):
            board(event)
    with progress.reporting(name) as report:
        report.phase(name)
        report(1, 2, expert=name)
    output.note(name)
    output.print_columns(("a", "b"), [(name, name)])
    main._say(f"Cannot use '{name}'")
    printed = capsys.readouterr()
    check_shown(printed.out + printed.err)


def test_two_who_say_they_are_the_server_have_rows_of_their_own(terminal, capsys):
    with live.watching("title") as board:
        board(FederationEvent("FUSING", message="at work"))
        board(FederationEvent("TRAINING", "server", message="a contributor"))
    last = capsys.readouterr().out
    assert "at work" in last and "a contributor" in last


@pytest.mark.parametrize("name", HOSTILE)
def test_bars(terminal, capsys, name):
    with progress.reporting(name) as report:
        report(1, 2, expert=name, router=name)
        report.phase(name)
    check_shown(capsys.readouterr().out)


def rename(value, names):
    """The same with other names, as keys and as values."""
    if isinstance(value, dict):
        return {rename(key, names): rename(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [rename(item, names) for item in value]
    return names.get(value, value) if isinstance(value, str) else value


def build_result(name):
    """A result whose domains, experts, routers and predictors go by hostile names."""
    result = json.loads((Path(__file__).parents[1] / "data" / "report.json").read_text())
    own = {one: f"{name}{number}" for number, one in enumerate((*NAMES, *result["own_domain"]))}
    return rename(result, own)


@pytest.mark.parametrize("name", HOSTILE)
def test_summaries_of_a_result(terminal, capsys, name):
    result = build_result(name)
    result["samples"][0]["text"] = name
    output.show(build_summary(result), name)
    output.show(*(build_sample_text(sample) for sample in result["samples"]))
    output.show(build_time_table({name: 1.0}, {name: 2.0}))
    forecasts = {"condition": name, "forecasts": result["forecasts"]}
    for row in forecasts["forecasts"].values():
        row |= {"floor": None, "verdict": name, "note": name}
    output.show(build_run_forecast({**forecasts, "headline": {"predictors": [], "reason": name}}))
    row = {"predictor": name, "stage": name, "count": 1, "groups": 1, "runs": None}
    row |= dict.fromkeys(("level", "mae", "bias", "interval_score"))
    output.show(build_history_table({"predictors": [row]}))
    check_shown(capsys.readouterr().out)


@pytest.mark.parametrize("name", [*HOSTILE[:8], "\u202etxt.exe", "_hidden", "x" * 300])
@pytest.mark.filterwarnings("ignore:Glyph:UserWarning", "ignore:constrained_layout:UserWarning")
def test_figures_and_pages_of_a_result(tmp_path, name):
    result = build_result(name)
    rows = [{"step": step, "validation_loss": 3.0} for step in range(3)]
    page = write_report(result, {name.replace("/", "-")[:40]: rows}, tmp_path)
    assert page.read_text(encoding="utf-8", errors="strict")


# A lineage is a typed file: half a character and more than 256 do not get here.
@pytest.mark.parametrize("name", [name for name in HOSTILE if name != "\ud800" and len(name) < 99])
@pytest.mark.filterwarnings("ignore:Glyph:UserWarning", "ignore:constrained_layout:UserWarning")
def test_lineages(terminal, capsys, name):
    newborn = Newborn(
        slot=0, domain=name, id=name or "x", operator="admitted", parents=(name,), generation=0,
        seed=7, fitness_before=None,
    )  # fmt: skip
    lineage = Lineage((Change(generation=0, kept=True, births=(newborn,), deaths=()),))
    output.show(build_lineage_tree(lineage))
    check_shown(capsys.readouterr().out)
    assert draw_lineage(lineage).startswith(b"\x89PNG")
