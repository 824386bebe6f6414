"""What the federation's tests share: stand-in workers, cleaning up, looking for what is left."""

import contextlib
from pathlib import Path

import psutil
import pytest
from process_helpers import find_processes

HERE = Path(__file__).parent


@pytest.fixture
def stage_root(tmp_path):
    """A folder; whatever still works in it when the test ends is killed, and fails the test."""
    yield tmp_path
    left = find_processes(tmp_path)
    names = [str(process) for process in left]
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    assert not left, f"left behind: {names}"


@pytest.fixture
def stand_ins(monkeypatch):
    """Workers that neither train nor fuse."""
    from molora_fed.federation import contributor as joining
    from molora_fed.federation import server as serving

    monkeypatch.setattr(serving, "COORDINATOR_MODULE", "fake_coordinator")
    monkeypatch.setattr(joining, "WORKER_MODULE", "fake_worker")
    monkeypatch.setenv("PYTHONPATH", str(HERE))
