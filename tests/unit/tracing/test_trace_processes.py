"""Traces in real processes: killed while they write, and several at once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.processes
def test_killed_writers_lose_no_acknowledged_record(tmp_path):
    """The bench with few kills; docs/results/acar/trace-kill.md has the figures of fifty."""
    command = [sys.executable, ROOT / "bench" / "trace_kill.py", "--kills", "3", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "trace-kill.json").read_text())
    assert result["kills"] == 5 and result["lost_records"] == 0
    assert result["acknowledged_records"] > 0 and result["sealed_run_verifies"]


WRITER = """
import sys
from pathlib import Path
from molora_fed.storage.keys import load_key
from molora_fed.tracing.writing import TraceWriter

folder, key, name = sys.argv[1:]
with TraceWriter(Path(folder), key=load_key(Path(key)), run_id="run", writer=name) as trace:
    for number in range(200):
        trace.append("decision", {"task": f"{name}-{number}"})
"""


def test_writers_in_processes_share_a_run(tmp_path):
    from molora_fed.storage.keys import build_public_pem, load_or_make_key
    from molora_fed.tracing.reading import read_records
    from molora_fed.tracing.verifying import seal_run, verify

    key_path, folder = tmp_path / "key.pem", tmp_path / "run"
    key = load_or_make_key(key_path)
    command = [sys.executable, "-c", WRITER, folder, key_path]
    processes = [subprocess.Popen([*command, name]) for name in ("a", "b", "c")]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    root = seal_run(folder, key=key)
    report = verify(folder, build_public_pem(key), root)
    assert report.ok and report.records == 3 * 200 + 3 * 4
    tasks = [r.body["task"] for r in read_records(folder) if r.kind == "decision"]
    assert tasks == [f"{name}-{number}" for name in "abc" for number in range(200)]


def test_tracing_loads_nothing_heavy():
    code = """
import sys
import molora_cli.trace, molora_fed.tracing.verifying
heavy = {"torch", "transformers", "flwr", "molora_fed.cascade", "molora_fed.population"}
sys.exit(", ".join(sorted(heavy & set(sys.modules))) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
