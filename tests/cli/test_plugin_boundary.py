"""What a broken plugin does to the commands of a kept cooperative: lines, rows, never an end."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from molora_fed.contributions.ledger import Ledger

KEPT = Path(__file__).parents[1] / "data" / "kept" / "cooperative"

PLUGIN = """
from molora_fed import hookimpl


def predict_a_number(case, past):
    return 3.0


def predict_by_failing(case, past):
    raise IndexError("oops")


def abstain(case, past):
    return None


@hookimpl
def register_gain_predictors(register):
    for name, target in (("a-number", predict_a_number), ("fails", predict_by_failing),
                         ("silent", abstain)):
        register(name, target, summary="Broken", source="own definition")
"""
CLASH = PLUGIN.replace('"a-number"', '"own-loss"')


@pytest.fixture
def cooperative(tmp_path):
    shutil.copytree(KEPT, tmp_path / "cooperative")
    return tmp_path / "cooperative"


@pytest.fixture
def installed(tmp_path):
    """`molora(...)` in a process where a plugin of this source is installed."""

    def install(source: str, name: str = "broken"):
        (tmp_path / f"{name}.py").write_text(source)
        metadata = tmp_path / f"{name}-0.1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
        (metadata / "entry_points.txt").write_text(f"[molora_fed]\n{name} = {name}\n")

        def call(*arguments: object) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [sys.executable, "-m", "molora_cli.main", *map(str, arguments)],
                env={**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "200"},
                capture_output=True,
                text=True,
            )

        return call

    return install


def read_forecasts(folder):
    with Ledger(folder / "ledger.db") as ledger:
        return ledger.records("forecast")


def test_a_failed_predictor_is_a_row_and_the_others_are_recorded(cooperative, installed):
    molora = installed(PLUGIN)
    before = len(read_forecasts(cooperative))
    done = molora("forecast", "--cooperative", cooperative, "--json")
    assert done.returncode == 0, done.stderr
    [run] = json.loads(done.stdout)["runs"]
    said = {name: (f["point"], f["note"]) for name, f in run["forecasts"].items()}
    assert said["own-loss"][0] is not None
    assert said["silent"] == (None, "The losses it needs are not given.")
    assert said["fails"] == (
        None,
        "failed: Gain predictor 'fails' of broken (broken 0.1.0) failed in forecasting: "
        "IndexError: oops, at "
        f"{cooperative.parent.name}/broken.py:10. Correct or uninstall it, or leave it out with "
        "MOLORA_LOAD_PLUGINS.",
    )
    assert "expected a Forecast or None, got float" in said["a-number"][1]
    recorded = [record.data["predictor"] for record in read_forecasts(cooperative)[before:]]
    assert "own-loss" in recorded and not {"fails", "a-number", "silent"} & set(recorded)
    shown = molora("forecast", "--cooperative", cooperative).stdout
    rows = {line.split()[1]: line for line in shown.splitlines() if line.startswith("│")}
    assert "failed" in rows["fails"] and "failed" not in rows["silent"]
    assert "fails failed: Gain predictor 'fails' of broken (broken 0.1.0)" in shown


def test_a_plugin_that_clashes_with_a_first_party_one_is_left_out_and_told(cooperative, installed):
    molora = installed(CLASH, "aaa")
    done = molora("forecast", "--cooperative", cooperative, "--json")
    assert done.returncode == 0
    [told] = done.stderr.splitlines()
    assert told.startswith("Cannot load plugin aaa (aaa 0.1.0): Cannot register gain predictor ")
    assert "'own-loss' of aaa (aaa 0.1.0): the name is taken by kalavai (molora-fed" in told
    assert "own-loss" in done.stdout and "fails" not in done.stdout
    helped = molora("forecast", "--help")
    assert (helped.returncode, helped.stderr) == (0, "")
    unknown = molora("coop", "amend", cooperative, "--set", "fusion.router=wanted")
    assert unknown.returncode == 61
    assert "Plugins that failed to load: Cannot load plugin aaa (aaa 0.1.0)" in unknown.stderr


def test_a_ledger_with_a_forecast_that_is_a_number_fuses_and_is_repaired(
    cooperative, molora, caplog, monkeypatch
):
    """87873ee wrote what a predictor returned before it looked at it."""
    with Ledger(cooperative / "ledger.db") as ledger:
        good = ledger.records("forecast")[0].data
        for forecast in (3.0, {**good["forecast"], "reference": "best_ever"}):
            data = {**good, "predictor": "b-number", "forecast": forecast}
            ledger.add_record("forecast", data, actor="molora forecast")
        malformed = [record.number for record in ledger.records("forecast")[-2:]]
    caplog.set_level(logging.WARNING)
    fused = molora("fuse", "--cooperative", cooperative)
    assert fused.code == 0, fused.err
    told = [message for message in caplog.messages if "Left out forecast record" in message]
    assert [int(message.split()[4]) for message in told] == malformed
    assert "Retract it with `molora coop repair`" in told[0]
    assert molora("forecast", "history", cooperative).code == 0

    repaired = molora("coop", "repair", cooperative)
    assert repaired.code == 0
    assert [line.split()[3] for line in repaired.out.splitlines()] == [f"{n}:" for n in malformed]
    caplog.clear()
    assert molora("fuse", "--cooperative", cooperative).code == 0
    assert molora("forecast", "history", cooperative).code == 0
    assert not [message for message in caplog.messages if "Left out" in message]
    assert "Nothing to repair" in molora("coop", "repair", cooperative).out
    kept = {record.number: record.data["forecast"] for record in read_forecasts(cooperative)}
    assert kept[malformed[0]] == 3.0
    assert molora("coop", "audit", cooperative).code in (0, 2)
