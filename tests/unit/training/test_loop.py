"""Any job of the one loop, of one number here."""

import json
import math
from dataclasses import replace

import pytest
import torch

from molora_fed.errors import TrainingError
from molora_fed.models.runtime import limit_threads
from molora_fed.training.loop import (
    CHECKPOINT_NAME,
    METRICS_NAME,
    TrainingJob,
    build_optimizer,
    run_training,
)


class Stopped(Exception):
    pass


def stop_at(step):
    def progress(done, total, **fields):
        if done >= step:
            raise Stopped

    return progress


def test_threads_return_to_what_they_were():
    before = torch.get_num_threads()
    with pytest.raises(Stopped), limit_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise Stopped
    assert torch.get_num_threads() == before


def build_job(value, **changes):
    """A job of one number that is pulled to the step's target; nothing is validated."""
    parameter = torch.nn.Parameter(torch.tensor([value]))
    settings = {
        "parameters": [[parameter]],
        "optimizer": build_optimizer([parameter], learning_rate=0.1),
        "rates": lambda step: [0.1 / (step + 1)] * 2,  # of matrices and of vectors
        "loss": lambda step: [((parameter - step) ** 2).sum()],
        "validate": None,
        "steps": 11,
        "save_every": 4,
        "identity": {"job": "pull"},
        "describe": lambda step: {"target": step - 1},
        "threads": 1,
    }
    return TrainingJob(**{**settings, **changes})


def test_a_job_without_validation_ends_with_its_last_parameters_wherever_it_was_stopped(tmp_path):
    whole, resumed = build_job(3.0), build_job(3.0)
    counters, _ = run_training(whole, tmp_path / "whole")
    assert counters.step == 11 and whole.flat[0].item() != 3.0
    with pytest.raises(Stopped):
        run_training(build_job(3.0), tmp_path / "broken", stop_at(10))
    run_training(resumed, tmp_path / "broken")
    assert torch.equal(whole.flat[0], resumed.flat[0])
    rows = [json.loads(line) for line in (tmp_path / "broken" / METRICS_NAME).open()]
    assert [(row["step"], row["target"]) for row in rows] == [
        (4, 3),
        (5, 4),
        (8, 7),
        (10, 9),
        (11, 10),
    ]
    assert all(set(row) == {"step", "loss", "target", "seconds"} for row in rows)


def test_a_job_without_validation_stops_before_a_checkpoint_of_nan(tmp_path):
    job = build_job(math.nan, first_step=20, failure="Cannot pull", advice="Start elsewhere.")
    with pytest.raises(TrainingError, match="Cannot pull: expected a finite loss up to step 24"):
        run_training(job, tmp_path)
    assert not (tmp_path / CHECKPOINT_NAME).exists()


def test_a_parameter_without_a_gradient_is_trained_on(tmp_path):
    job = build_job(1.0)
    spare = torch.nn.Parameter(torch.ones(2))
    both = [job.flat[0], spare]
    optimizer = build_optimizer(both, learning_rate=0.1, weight_decay=0.0)
    rates = lambda step: [0.1] * len(optimizer.param_groups)  # noqa: E731
    run_training(replace(job, parameters=[both], optimizer=optimizer, rates=rates), tmp_path)
    assert torch.equal(spare, torch.ones(2))
