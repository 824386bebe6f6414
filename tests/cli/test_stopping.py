"""Ctrl-C: one line, exit code 130, no process left; the same command goes on."""

import os
import signal
import subprocess
import sys

import psutil
import pytest
from process_helpers import find_processes, wait_until

from molora_fed.serving.addresses import find_free_port

SECONDS = 60

pytestmark = pytest.mark.processes


def start(*arguments, **more):
    return subprocess.Popen(
        [sys.executable, "-m", "molora_cli.main", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, **more,
    )  # fmt: skip


def read_until(process, word):
    for line in process.stdout:
        if word in line:
            return
    pytest.fail(f"ended before it said {word!r}: {process.stderr.read()}")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_training_stops_with_one_line(setup, tmp_path, number, code):
    process = start(
        "train", "--cooperative", setup.cooperative, "--domain", "abc", "--data",
        setup.texts["abc"], "--out", tmp_path / "t", "--steps", 100_000, "--threads", 1,
    )  # fmt: skip
    read_until(process, "training")
    process.send_signal(number)
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == code
    assert err.splitlines() == ["error: stopped. Run the same command again to resume."]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_launched_training_stops_with_one_line_and_leaves_no_process(setup, tmp_path, number, code):
    process = start(
        "train", "--cooperative", setup.cooperative, "--domain", "abc", "--data",
        setup.texts["abc"], "--out", tmp_path / "t", "--steps", 100_000, "--threads", 2,
        "--launcher", "accelerate launch --multi_gpu --num_processes 2 --main_process_port 0",
    )  # fmt: skip
    kept = tmp_path / "t" / "checkpoint.safetensors"
    wait_until(lambda: kept.exists() or process.poll() is not None, what="a checkpoint")
    process.send_signal(number)
    _, err = process.communicate(timeout=SECONDS)
    assert err.splitlines() == ["error: stopped. Run the same command again to resume."]
    assert process.returncode == code and kept.exists()
    wait_until(lambda: not find_processes(tmp_path / "t"), seconds=10, what="the end of all")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_server_stops_with_one_line_and_leaves_no_process(setup, number, code):
    process = start("serve", setup.cooperative, "--port", find_free_port(), "--threads", 1)
    read_until(process, "RECRUITING")
    family = psutil.Process(process.pid).children(recursive=True)
    assert family
    process.send_signal(number)
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == code
    assert err.splitlines() == ["error: stopped. Run the same command again to resume."]
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
