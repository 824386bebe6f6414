"""The one training loop: every run is a job for `run_training`.

- A step's loss follows from its number and the parameters alone, so a run that is killed at any
  moment and started again ends with the same bytes as one that was not.
- Where a job validates, the parameters of the lowest validation loss are the result, and the start
  counts as step 0; elsewhere the last parameters are.
- `train` builds the job of a language model on blocks of tokens: the built-in base, specialists and
  the pooled baseline. Every forward pass sees whole blocks; there is no padding and no masking of
  documents; tokens that do not count in the loss are read like all others.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from molora_fed.corpus.batches import take_batch
from molora_fed.errors import DivergedError, TrainingError
from molora_fed.models.forward import compute_block_losses
from molora_fed.models.head import Head, find_head
from molora_fed.models.runtime import (
    Placement,
    describe_environment,
    deterministic,
    limit_threads,
    mixed_precision,
)
from molora_fed.storage.files import hash_bytes
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
    "TrainConfig",
    "TrainResult",
    "TrainingJob",
    "build_optimizer",
    "compute_learning_rate",
    "run_training",
    "seed_step",
    "train",
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


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run.

    Attributes:
        steps: Optimiser steps at most.
        batch: Blocks per step.
        accumulation: Parts in which a step's batch is computed; more take less memory, and give
            the same but for rounding.
        checkpointing: Whether activations are computed again for the gradient instead of kept:
            much less memory, a third more time, the same result.
        learning_rate: Peak of AdamW's rate.
        seed: Seed of data order and dropout.
        threads: Torch threads of a run that starts; one that is resumed keeps its own.
        validate_every: Steps between validations; each writes a checkpoint.
        patience: Validations without improvement before stopping; None never stops early.
        warmup_fraction: Share of the steps over which the rate rises linearly, in [0, 1].
        weight_decay: AdamW's decay of matrices; vectors are not decayed.
        beta2: AdamW's second-moment decay.
        clip_norm: Largest norm of the gradient of all parameters together.
        evaluation_batch: Blocks per forward pass of a validation.
    """

    steps: int
    batch: int
    learning_rate: float
    seed: int
    threads: int
    validate_every: int
    patience: int | None = None
    warmup_fraction: float = 0.1
    weight_decay: float = 0.01
    beta2: float = 0.99
    clip_norm: float = 1.0
    evaluation_batch: int = 16
    accumulation: int = 1
    checkpointing: bool = False

    def describe(self) -> dict[str, Any]:
        """What decides the result: without threads, and without what is as it always was."""
        values = asdict(self)
        for name in ("threads", "checkpointing"):
            del values[name]
        if self.accumulation == 1:
            del values["accumulation"]
        return values


@dataclass(frozen=True)
class TrainResult:
    """How a run ended; the model holds the best parameters.

    Attributes:
        steps: Optimiser steps done.
        tokens: Tokens these saw.
        best_step: Step of the lowest validation loss.
        initial_loss: Validation loss before the first step, nats per token.
        loss: Lowest validation loss, nats per token.
        stopped_early: True if patience ran out.
        threads: Torch threads it ran on.
        dtype: Dtype of matrix products and of weights that are not trained; what is trained is
            float32.
        environment: Versions and hardware.
        seconds: Wall time of training and validations, restarts included.
    """

    steps: int
    tokens: int
    best_step: int
    initial_loss: float
    loss: float
    stopped_early: bool
    threads: int
    dtype: str
    environment: Mapping[str, str]
    seconds: float

    def to_record(self) -> dict[str, Any]:
        """The part that is the same whenever the run is repeated: without wall time."""
        values = asdict(self)
        del values["seconds"]
        return values


def compute_learning_rate(step: int, config: TrainConfig) -> float:
    """Rate of a step (from 0): linear warm-up to the peak, then a cosine down to 0."""
    warmup = max(1, round(config.warmup_fraction * config.steps))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(1, config.steps - warmup)
    return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * share))


@dataclass(frozen=True, eq=False)
class _BlockLoss:
    """The loss of a language model on a step's batch, in parts.

    Attributes:
        model: The model; `head` is None where it is more than a decoder and an output head.
        head: Its two parts.
        blocks: Tokens to train on, (N, T).
        targets: Which of them count in the loss, (N, T); None counts all.
        config: Settings.
        placement: Where, and in which dtype.
        team: The processes that each take a share of the batch.
    """

    model: Any
    head: Head | None
    blocks: NDArray[np.int32]
    targets: NDArray[np.bool_] | None
    config: TrainConfig
    placement: Placement
    team: Team = ALONE

    def __call__(self, step: int) -> Iterator[Tensor]:
        """Sums of losses over parts of the batch, divided by its predictions that count, nats."""
        # What is drawn at random, e.g. dropout, is another in each share.
        place = () if self.team.is_first else (self.team.rank,)
        seed_step(self.config.seed, step + 1, *place)
        rows, counts = self._take(self.blocks, step), None
        predictions = rows.shape[0] * (rows.shape[1] - 1)
        if self.targets is not None:
            counts = self._take(self.targets, step)[:, 1:]
            predictions = max(int(counts.sum()), 1)  # 0 where no token of the batch counts
        share = self.team.take_share(np.arange(len(rows)))
        for part in np.array_split(share, min(self.config.accumulation, len(share))):
            tokens = torch.from_numpy(rows[part]).long().to(self.placement.device)
            with mixed_precision(self.placement):
                losses = self._compute_losses(tokens)
            if counts is not None:
                losses = losses * torch.from_numpy(counts[part]).to(losses.device)
            yield losses.sum() / predictions

    def _take(self, blocks: NDArray[Any], step: int) -> NDArray[Any]:
        return take_batch(blocks, step, batch=self.config.batch, seed=self.config.seed)

    def _compute_losses(self, tokens: Tensor) -> Tensor:
        """Of every predicted token, (B, T-1)."""
        if self.head is not None:
            return self.head.compute_losses(tokens)
        logits = self.model(input_ids=tokens[:, :-1], use_cache=False).logits  # (B, T - 1, V)
        losses = nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none"
        )
        return losses.view(len(tokens), -1)


_POSITIVE = ("steps", "batch", "accumulation", "threads", "validate_every", "learning_rate")


def _check_inputs(
    parameters: Sequence[nn.Parameter],
    train_blocks: NDArray[np.int32],
    validation_blocks: NDArray[np.int32],
    train_targets: NDArray[np.bool_] | None,
    validation_targets: NDArray[np.bool_] | None,
    config: TrainConfig,
    team: Team,
) -> None:
    problems = [
        f"{name} {value}"
        for name, value in asdict(config).items()
        if name in _POSITIVE and value <= 0
    ]
    if not parameters:
        problems.append("no parameters to train")
    if config.batch < team.size:
        problems.append(f"a batch of {config.batch} for {team.size} processes")
    for name, blocks, targets in (
        ("training", train_blocks, train_targets),
        ("validation", validation_blocks, validation_targets),
    ):
        if blocks.ndim != 2 or len(blocks) == 0 or blocks.shape[1] < 2:
            problems.append(f"{name} blocks of shape {blocks.shape}")
        elif targets is not None and (targets.shape != blocks.shape or not targets[:, 1:].any()):
            problems.append(f"{name} blocks in which no token counts")
    if problems:
        raise TrainingError(
            "Cannot train: expected positive settings, parameters, and (N, T) blocks, "
            f"got {'; '.join(problems)}. Correct these."
        )


def train(
    model: Any,
    parameters: Sequence[nn.Parameter],
    train_blocks: NDArray[np.int32],
    validation_blocks: NDArray[np.int32],
    config: TrainConfig,
    folder: Path,
    *,
    train_targets: NDArray[np.bool_] | None = None,
    validation_targets: NDArray[np.bool_] | None = None,
    context: Mapping[str, str] | None = None,
    team: Team = ALONE,
    progress: Progress | None = None,
) -> TrainResult:
    """Train, or resume a run that was stopped in the same folder.

    Args:
        model: A Hugging Face causal LM; left in eval mode with the best parameters.
        parameters: The ones to train; all others stay as they are.
        train_blocks: Tokens (N, T).
        validation_blocks: Tokens (N', T), never trained on.
        config: Settings.
        folder: Gets `checkpoint.safetensors` and `metrics.jsonl`.
        train_targets: Which training tokens count in the loss, (N, T); None counts all.
        validation_targets: Which validation tokens count, (N', T); None counts all.
        context: What else decides the result, e.g. the base's fingerprint; a checkpoint made
            under another context is refused.
        team: The processes that train together: each calls this with the same arguments, and all
            end with the same parameters.
        progress: Told the step with loss, validation_loss, tokens_per_second and eta_seconds.

    Returns:
        How it ended.

    Raises:
        TrainingError: If settings or blocks cannot be trained on, the loss is not finite, another
            process trains in the folder, or its checkpoint was made from other inputs, versions,
            hardware or dtype.
        StorageError: On I/O errors.
    """
    _check_inputs(
        parameters, train_blocks, validation_blocks, train_targets, validation_targets, config, team
    )
    weight = model.get_input_embeddings().weight
    placement = Placement(weight.device, weight.dtype)
    for parameter in parameters:  # small steps would be lost in a shorter dtype
        parameter.data = parameter.data.float()
    environment = describe_environment(placement.device.type)
    dtype = str(placement.dtype).removeprefix("torch.")
    arrays = (train_blocks, validation_blocks, train_targets, validation_targets)
    data = b"".join(np.ascontiguousarray(b).tobytes() for b in arrays if b is not None)
    with mixed_precision(placement):
        head = find_head(model)
    if config.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimizer = build_optimizer(
        parameters,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        beta2=config.beta2,
    )
    step_tokens = config.batch * int(train_blocks.shape[1])

    def validate() -> float:
        share = team.take_share(np.arange(len(validation_blocks)))
        with mixed_precision(placement):
            losses = compute_block_losses(
                model, validation_blocks[share], batch=config.evaluation_batch
            )
        if validation_targets is not None:
            losses = losses[torch.from_numpy(validation_targets[share, 1:])]
        both = torch.tensor([float(losses.double().sum()), losses.numel()], dtype=torch.float64)
        team.add_up([both := both.to(placement.device)])
        return float(both[0] / both[1])

    def describe(step: int) -> dict[str, float | int]:
        rate = compute_learning_rate(step - 1, config) if step else 0.0
        return {"learning_rate": rate, "tokens": step * step_tokens}

    job = TrainingJob(
        parameters=[parameters],
        optimizer=optimizer,
        rates=lambda step: [compute_learning_rate(step, config)] * len(optimizer.param_groups),
        loss=_BlockLoss(model, head, train_blocks, train_targets, config, placement, team),
        validate=validate,
        steps=config.steps,
        save_every=config.validate_every,
        identity={
            **environment,
            **config.describe(),
            **(context or {}),
            **team.describe(),
            "dtype": dtype,
            "blocks": hash_bytes(data),
        },
        describe=describe,
        threads=config.threads,
        clip_norm=config.clip_norm,
        patience=config.patience,
        step_tokens=step_tokens,
        team=team,
    )
    counters, seconds = run_training(job, folder, progress)
    if config.checkpointing:
        model.activation_checkpointing_disable()
    model.eval()
    return TrainResult(
        steps=counters.step,
        tokens=counters.step * step_tokens,
        best_step=counters.best_step,
        initial_loss=counters.initial_loss,
        loss=counters.best_loss,
        stopped_early=counters.stopped,
        threads=counters.threads,
        dtype=dtype,
        environment=environment,
        seconds=seconds,
    )
