"""What the federation's tests share: stand-in workers, cleaning up, looking for what is left."""

import contextlib
import os
import time
from pathlib import Path

import psutil
import pytest

HERE = Path(__file__).parent


def wait_until(look, *, seconds=60.0, what="it"):
    """Look until something true is found."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = look()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen within {seconds} s")


def find_processes(root):
    """Every process but this one that works in or below a folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = [*process.cmdline(), *process.environ().values()]
            if process.pid != os.getpid() and any(str(root) in word for word in words):
                found.append(process)
    return found


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
    from molora_fed.federation import joining, serving

    monkeypatch.setattr(serving, "COORDINATOR_MODULE", "fake_coordinator")
    monkeypatch.setattr(joining, "WORKER_MODULE", "fake_worker")
    monkeypatch.setenv("PYTHONPATH", str(HERE))
