"""A whole demo: two contributors on files of the user, through real Flower processes."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from process_helpers import find_processes, wait_until

from molora_fed.charter import CorpusRules, PrivacyRules, SampleRules
from molora_fed.cooperative.controls import CONTROLS
from molora_fed.demo.run import DemoOptions, run_demo

SCHEMA = Path(__file__).parents[2] / "docs" / "report.schema.json"


class Listener:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.phases, self.events = [], []

    def phase(self, name):
        self.phases.append(name)

    def progress(self, done, total, **fields):
        pass

    def event(self, event):
        self.events.append(event)


def write_texts(folder: Path, word: str) -> Path:
    folder.mkdir()
    chooser = random.Random(word)
    words = [f"{word}{number}" for number in range(60)]
    for number in range(60):
        text = " ".join(chooser.choice(words) for _ in range(120))
        (folder / f"{number}.txt").write_text(text)
    return folder


@pytest.mark.processes
def test_a_demo_on_own_text_ends_with_a_report(stage_root, tiny_checkpoint, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data = {name: [write_texts(stage_root / name, name)] for name in ("alpha", "beta")}
    options = DemoOptions(
        data=data,
        base=str(tiny_checkpoint()),
        out=stage_root / "out",
        steps=20,
        kind="lora",
        control=True,
        privacy=PrivacyRules(mode="pooled"),
        samples=SampleRules(calibration=8, admission=4, held_out=8),
        corpus=CorpusRules(block_size=64),
        command="molora demo",
        cores=1,
    )
    listener = Listener()
    done = run_demo(options, listener)

    assert listener.phases == ["base", *CONTROLS, "samples", "report"]
    assert {"server", "alpha", "beta"} == {
        event.contributor or "server" for event in listener.events
    }
    written = json.loads((stage_root / "out" / "report" / "report.json").read_text())
    jsonschema.validate(written, json.loads(SCHEMA.read_text()))
    assert written["domains"] == ["alpha", "beta"]
    assert set(written["losses"]["specialists"]) == {"alpha", "beta"}
    for name in CONTROLS:
        assert written["losses"][name].keys() == {"alpha", "beta"}
        assert written["compute"]["controls"][name]["steps"] == 40
        rates = json.loads(
            (stage_root / "out/cooperative/control" / name / "rates.json").read_text()
        )
        tried = rates["validation_loss"]
        assert len(tried) >= 3
        assert tried[f"{rates['chosen']:g}"] == min(tried.values())
    compared = written["overlap"]["compared"]
    assert set(compared["train"]) == {"alpha", "beta"} and written["overlap"]["absent"] == []
    assert written["overlap"]["domains"].keys() == {"alpha", "beta"}
    assert {"base", "training", "routers", "samples"} <= set(written["seconds"])
    assert {sample["domain"] for sample in written["samples"]} == {"alpha", "beta"}
    assert all(size > 0 for size in written["bytes"]["sent"].values())
    assert {"alpha", "beta", "fuse"} == set(written["threads"])
    assert done.report.is_file() and (done.report.parent / "training_curves.png").is_file()
    assert (done.fused / "fused.json").is_file()


@pytest.mark.processes
def test_ctrl_c_ends_a_demo_with_one_line_and_no_process(stage_root, tiny_checkpoint):
    data = [f"{name}={write_texts(stage_root / name, name)}" for name in ("alpha", "beta")]
    command = [
        sys.executable, "-m", "molora_cli.main", "demo", "--data", data[0], "--data", data[1],
        "--base", str(tiny_checkpoint()), "--out", str(stage_root / "out"), "--steps", "100000",
        "--privacy", "pooled",
    ]  # fmt: skip
    log = stage_root / "demo.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        wait_until(
            lambda: "beta: TRAINING" in log.read_text() or process.poll() is not None,
            seconds=300,  # a dozen processes on a busy machine
            what="training",
        )
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 130
    finally:
        process.kill()
    errors = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert errors == ["error: stopped. Run the same command again to resume."]
    assert "Traceback" not in log.read_text()
    assert find_processes(stage_root) == []
