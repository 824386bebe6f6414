"""The one training loop: every run is a job for `run_training`.

- A step's loss follows from its number and the parameters alone, so a run that is killed at any
  moment and started again ends with the same bytes as one that was not.
- Where a job validates, the parameters of the lowest validation loss are the result, and the start
  counts as step 0; elsewhere the last parameters are.
- The job of a language model on blocks of tokens is in `molora_fed.training.language_model`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from molora_fed.errors import DivergedError
from molora_fed.models.runtime import deterministic, limit_threads
from molora_fed.storage.locks import lock_folder
from molora_fed.storage.seeds import derive_seed
from molora_fed.training.checkpoints import (
    CheckpointStore,
    Counters,
    Metrics,
    copy_values,
    read_tensors,
    set_values,
    write_tensors,
)
from molora_fed.training.team import ALONE, Team
from molora_fed.types import Progress

__all__ = [
    "CHECKPOINT_NAME",
    "METRICS_NAME",
    "TrainingJob",
    "build_optimizer",
    "run_training",
    "seed_step",
]

CHECKPOINT_NAME = "checkpoint.safetensors"
METRICS_NAME = "metrics.jsonl"
REPORT_EVERY = 5  # steps between two readings of the loss: a reading waits for the device


@dataclass(frozen=True, eq=False)
class TrainingJob:
    """A run of the one loop. Steps are counted from 0.

    Attributes:
        parameters: What is trained; each group's gradient is clipped by itself.
        optimizer: AdamW over all of them.
        rates: Learning rates of the optimiser's groups at a step.
        loss: Parts of a step's loss, whose sum, over all processes, is the mean over its batch,
            nats per token; a function of the step and the parameters alone. A part's gradient is
            taken before the next part is made.
        validate: Validation loss with the parameters as they are, nats per token; None if nothing
            is chosen by it.
        steps: Optimiser steps at most.
        save_every: Steps between validations; each writes a checkpoint, and so does the last step.
        identity: Everything that decides the bytes of the result, except threads.
        describe: What a line of the metrics says of a number of steps done, beside losses and
            seconds.
        threads: Torch threads of a run that starts; one that is resumed keeps its own.
        clip_norm: Largest norm of a group's gradient.
        patience: Validations without improvement before stopping; None never stops early.
        step_tokens: Tokens of a step, whose rate the progress tells; None tells none.
        first_step: Steps of a longer run before this one, which messages count.
        failure: What an error of this run begins with.
        advice: What to do if its loss is not finite.
        checkpoint_name: File of the checkpoint.
        metrics_name: File of the metrics.
        team: The processes that take each step together; the first of them writes.
    """

    parameters: Sequence[Sequence[nn.Parameter]]
    optimizer: Optimizer
    rates: Callable[[int], Sequence[float]]
    loss: Callable[[int], Iterable[Tensor]]
    validate: Callable[[], float] | None
    steps: int
    save_every: int
    identity: Mapping[str, Any]
    describe: Callable[[int], Mapping[str, float | int]]
    threads: int
    clip_norm: float = 1.0
    patience: int | None = None
    step_tokens: int | None = None
    first_step: int = 0
    failure: str = "Cannot train"
    advice: str = "Lower the learning rate, or check the base and the text."
    checkpoint_name: str = CHECKPOINT_NAME
    metrics_name: str = METRICS_NAME
    team: Team = ALONE

    @property
    def flat(self) -> list[nn.Parameter]:
        """All parameters, in the order in which a checkpoint keeps them."""
        return [parameter for group in self.parameters for parameter in group]


def seed_step(seed: int, number: int, *more: int) -> None:
    """Seed torch for one step, or a place in it, whatever ran before it."""
    torch.manual_seed(derive_seed(seed, number, *more))


def build_optimizer(
    parameters: Sequence[nn.Parameter],
    *,
    learning_rate: float,
    weight_decay: float = 0.01,
    beta2: float = 0.99,
) -> AdamW:
    """AdamW that decays matrices and leaves vectors alone.

    Args:
        parameters: What is trained.
        learning_rate: Rate until another is set.
        weight_decay: Decay of matrices.
        beta2: Second-moment decay.
    """
    decays = {weight_decay: [p for p in parameters if p.ndim >= 2]}
    decays[0.0] = [*decays.get(0.0, []), *(p for p in parameters if p.ndim < 2)]
    return AdamW(
        [{"params": group, "weight_decay": decay} for decay, group in decays.items()],
        lr=learning_rate,
        betas=(0.9, beta2),
        fused=True,
    )


def run_training(
    job: TrainingJob, folder: Path, progress: Progress | None = None
) -> tuple[Counters, float]:
    """Run a job, or resume a run that was stopped in the same folder.

    Args:
        job: What to train.
        folder: Gets checkpoint and metrics.
        progress: Told the step with loss and eta_seconds; with validation_loss and
            tokens_per_second where the job has them.

    Returns:
        How far it came, and its wall time in seconds, restarts included. The parameters hold the
        result.

    Raises:
        TrainingError: If the loss is not finite, another process trains in the folder, or its
            checkpoint was made from other inputs, versions, hardware or dtype.
        StorageError: On I/O errors.
    """
    parameters = job.flat
    device = parameters[0].device
    with lock_folder(folder) if job.team.is_first else nullcontext():
        store = CheckpointStore(folder / job.checkpoint_name, job.identity)
        found = store.load(parameters)
        job.team.check_same(found[0].step if found else 0, f"the checkpoint in '{folder}'")
        job.team.share_first([parameter.data for parameter in parameters])
        threads = job.threads if found is None else found[0].threads
        devices = [device] if device.type == "cuda" else []
        with (
            limit_threads(threads),
            deterministic(device),
            torch.random.fork_rng(devices=devices),
        ):
            if found is None:
                loss = _validate(job) if job.validate else math.nan
                counters = Counters(0, loss, 0, loss, 0, False, threads)
                best = copy_values(parameters) if job.validate else []
            else:
                counters, best = found[0], list(found[1].best)
                write_tensors(parameters, job.optimizer, counters.step, found[1])
            metrics = Metrics(
                folder / job.metrics_name,
                steps=job.steps,
                first_step=counters.step,
                initial_loss=counters.initial_loss if job.validate else None,
                describe=job.describe,
                step_tokens=job.step_tokens,
                progress=progress,
            )
            counters, best = _take_steps(job, counters, best, metrics, store)
            if best:
                set_values(parameters, best)
    return counters, metrics.seconds


def _take_steps(
    job: TrainingJob,
    counters: Counters,
    best: list[Tensor],
    metrics: Metrics,
    store: CheckpointStore,
) -> tuple[Counters, list[Tensor]]:
    """Train from where the counters stand to the end; returns the last counters and the best."""
    parameters = job.flat
    pending: list[Tensor] = []  # losses not read yet
    for step in range(counters.step, job.steps):
        if counters.stopped:
            break
        pending.append(_take_step(job, step))
        done = step + 1
        is_due = done % job.save_every == 0 or done == job.steps
        if not is_due and done % REPORT_EVERY:
            continue
        loss = float(torch.stack(pending).mean())
        pending.clear()
        validation_loss = None
        if job.validate is None:
            _check_finite(job, loss, f"loss up to step {job.first_step + done}")
        elif is_due:
            validation_loss = _validate(job)
        metrics.add(done, loss, validation_loss)
        if is_due:
            if validation_loss is None:
                counters = Counters(done, loss, done, loss, 0, False, counters.threads)
            else:
                counters = _judge(counters, done, validation_loss, job.patience)
                best = copy_values(parameters) if counters.best_step == done else best
            if job.team.is_first:
                metrics.save()
                store.save(counters, read_tensors(parameters, job.optimizer, best))
    return counters, best


def _take_step(job: TrainingJob, step: int) -> Tensor:
    """One optimiser step of all processes; returns the loss before it."""
    for settings, rate in zip(job.optimizer.param_groups, job.rates(step), strict=True):
        settings["lr"] = rate
    losses = []
    for part in job.loss(step):
        part.backward()
        losses.append(part.detach())
    loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
    for parameter in job.flat:
        if parameter.grad is None:  # took no part in this batch
            parameter.grad = torch.zeros_like(parameter)
    job.team.add_up([*(parameter.grad for parameter in job.flat), loss])
    for group in job.parameters:
        nn.utils.clip_grad_norm_(group, job.clip_norm)
    job.optimizer.step()
    job.optimizer.zero_grad()
    return loss


def _validate(job: TrainingJob) -> float:
    loss = math.nan if job.validate is None else job.validate()
    _check_finite(job, loss, "validation loss")
    return loss


def _check_finite(job: TrainingJob, loss: float, what: str) -> None:
    if not math.isfinite(loss):
        raise DivergedError(f"{job.failure}: expected a finite {what}, got {loss}. {job.advice}")


def _judge(counters: Counters, step: int, loss: float, patience: int | None) -> Counters:
    """The counters after a validation."""
    if loss < counters.best_loss:
        return replace(counters, step=step, best_step=step, best_loss=loss, stale=0)
    stale = counters.stale + 1
    return replace(
        counters, step=step, stale=stale, stopped=patience is not None and stale >= patience
    )
