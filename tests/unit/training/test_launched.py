"""Specialists trained by two processes under the real `accelerate launch`: gloo, loopback."""

import contextlib
import os
import signal

import pytest
import torch
from forking_helpers import run_forked
from process_helpers import find_processes, wait_until
from training_helpers import TRAINING, train_counting

from molora_fed.adapters.files import load_adapter
from molora_fed.errors import DivergedError, TrainingError
from molora_fed.models.base import load_base
from molora_fed.training.choices import TrainingChoices
from molora_fed.types import ADAPTER_FILES

pytestmark = pytest.mark.processes

TWO = TrainingChoices(
    launcher="accelerate launch --multi_gpu --num_processes 2 --main_process_port 0"
)
LONG = TRAINING.model_copy(update={"steps": 300, "validate_every": 20, "learning_rate": 1e-3})
TOLERANCE = 1e-4  # nats


@pytest.fixture
def base(tiny_checkpoint):
    return load_base(tiny_checkpoint("gpt_neox"))


def bytes_of(folder):
    return {name: (folder / "adapter" / name).read_bytes() for name in ADAPTER_FILES}


def train_in_two(base, folder, **more):
    return train_counting(base, folder, **{"kind": "lora", "choices": TWO, **more})


def train_until_killed(checkpoint, folder):
    """In a process of its own, which ends at the first news of those that it launched."""

    def end(done, total, **fields):
        os.kill(os.getpid(), signal.SIGKILL)

    train_in_two(load_base(checkpoint), folder, training=LONG, progress=end)


def signal_rank_1(folder, number):
    for process in find_processes(folder):
        with contextlib.suppress(Exception):
            if process.environ().get("RANK") == "1":
                process.send_signal(number)


@pytest.mark.parametrize("kind", ["lora", "delta"])
def test_two_processes_train_to_the_loss_of_one(base, tmp_path, kind):
    training = TRAINING.model_copy(update={"batch": 3})  # shares of two blocks and of one
    one = train_counting(base, tmp_path / "one", kind=kind, training=training)
    told = []
    two = train_in_two(
        base, tmp_path / "two", kind=kind, training=training, threads=2,
        progress=lambda *counts, **fields: told.append((*counts, fields)),
    )  # fmt: skip
    assert two.record["processes"] == 2 and "processes" not in one.record
    assert two.record["threads"] == 1
    for name in ("loss", "watched_loss", "initial_loss", "base_loss"):
        assert two.record[name] == pytest.approx(one.record[name], abs=TOLERANCE)
    updates = [load_adapter(s.adapter_folder).updates for s in (one, two)]
    assert updates[0].keys() == updates[1].keys()
    for name, update in updates[0].items():
        torch.testing.assert_close(
            updates[1][name].product(), update.product(), atol=1e-5, rtol=1e-3
        )
    assert told[-1][:2] == (16, 16) and told[-1][2]["validation_loss"] < one.base_loss
    assert not (tmp_path / "two" / "launch").exists()


def test_killed_in_any_process_and_resumed_it_ends_with_the_same_bytes(base, tmp_path):
    whole = train_in_two(base, tmp_path / "whole", training=LONG)
    broken = tmp_path / "broken"

    def kill_a_rank(done, total, **fields):
        if done >= 40:
            signal_rank_1(broken, signal.SIGKILL)

    with pytest.raises(TrainingError, match="expected all its processes to end well") as error:
        train_in_two(base, broken, training=LONG, progress=kill_a_rank)
    assert "\n" not in str(error.value)
    assert not find_processes(broken)
    assert (broken / "checkpoint.safetensors").exists() and not (broken / "record.json").exists()

    def interrupt(done, total, **fields):
        first.append(done)
        raise KeyboardInterrupt

    first = []
    with pytest.raises(KeyboardInterrupt):
        train_in_two(base, broken, training=LONG, progress=interrupt)
    wait_until(lambda: not find_processes(broken), seconds=10, what="the end of all processes")
    assert first[0] > 20  # it went on from a checkpoint

    with pytest.raises(TrainingError, match="processes 2 instead of None"):
        train_counting(base, broken, kind="lora", training=LONG)
    resumed = train_in_two(base, broken, training=LONG)
    assert bytes_of(broken) == bytes_of(tmp_path / "whole")
    assert resumed.record == whole.record


def test_they_end_with_the_process_that_asked_for_them(tiny_checkpoint, tmp_path):
    ended = run_forked(
        tmp_path / "asks", train_until_killed, tiny_checkpoint("gpt_neox"), tmp_path / "out"
    )
    assert ended.code == -signal.SIGKILL
    wait_until(
        lambda: not find_processes(tmp_path / "out"), seconds=30, what="the end of all processes"
    )


def test_what_ends_an_interpreter_badly_fails_no_training(base, tmp_path, monkeypatch):
    hook = 'import atexit, os\nif "RANK" in os.environ:\n    atexit.register(os.abort)\n'
    (tmp_path / "sitecustomize.py").write_text(hook)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    short = TRAINING.model_copy(update={"steps": 4})
    assert train_in_two(base, tmp_path / "out", training=short).record["processes"] == 2


def test_the_last_words_of_a_process_that_aborts_are_in_the_error(base, tmp_path):
    def abort_a_rank(done, total, **fields):
        signal_rank_1(tmp_path, signal.SIGABRT)

    with pytest.raises(
        TrainingError, match=r"process 1: .*Fatal Python error: Aborted\. See"
    ) as error:
        train_in_two(base, tmp_path, training=LONG, progress=abort_a_rank)
    assert "\n" not in str(error.value)


def test_what_the_processes_refuse_is_one_line(base, tmp_path):
    small = TRAINING.model_copy(update={"batch": 1})
    with pytest.raises(TrainingError, match="got a batch of 1 for 2 processes"):
        train_in_two(base, tmp_path / "small", training=small)
    wild = TRAINING.model_copy(update={"learning_rate": 1e30})
    with pytest.raises(DivergedError, match="expected a finite validation loss, got nan"):
        train_in_two(base, tmp_path / "wild", training=wild)


def test_a_launcher_that_starts_one_process_instead_of_two_is_refused(base, tmp_path):
    alone = TrainingChoices(launcher="accelerate launch --cpu --num_processes 2")
    with pytest.raises(TrainingError, match="got one process; `accelerate launch --cpu`"):
        train_in_two(base, tmp_path, choices=alone)
