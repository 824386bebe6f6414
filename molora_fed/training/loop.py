"""The one training loop: the built-in base, every specialist and the control go through it.

- Data order and random numbers follow from (seed, step) alone, so a run that is killed at any
  moment and started again ends with the same bytes as one that was not.
- The parameters of the lowest validation loss are the result; the start counts as step 0.
- Every forward pass sees whole blocks; there is no padding and no masking of documents.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn

from molora_fed.corpus.batches import take_batch
from molora_fed.errors import TrainingError
from molora_fed.models.forward import compute_block_losses
from molora_fed.models.runtime import describe_environment, deterministic, limit_threads
from molora_fed.storage.files import hash_bytes
from molora_fed.storage.locks import lock_folder
from molora_fed.training.checkpoints import CheckpointStore, Counters, Metrics
from molora_fed.training.optimizer import copy_values, read_tensors, set_values, write_tensors
from molora_fed.types import Progress

__all__ = [
    "CHECKPOINT_NAME",
    "METRICS_NAME",
    "TrainConfig",
    "TrainResult",
    "compute_learning_rate",
    "train",
]

CHECKPOINT_NAME = "checkpoint.safetensors"
METRICS_NAME = "metrics.jsonl"
REPORT_EVERY = 5  # steps between two readings of the loss: a reading waits for the device


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run.

    Attributes:
        steps: Optimiser steps at most.
        batch: Blocks per step.
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
        dtype: Dtype of the trained parameters, e.g. "float32".
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


def _compute_loss(model: Any, tokens: Tensor) -> Tensor:
    """Mean loss of a batch (B, T) over its B * (T - 1) predicted tokens, nats."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits  # (B, T - 1, V)
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


class _Run:
    """Model, parameters and optimiser of one run, and what moves between them and the disk."""

    def __init__(self, model: Any, parameters: Sequence[nn.Parameter], config: TrainConfig) -> None:
        self.model = model
        self.parameters = parameters
        self.config = config
        decays = {config.weight_decay: [p for p in parameters if p.ndim >= 2]}
        decays[0.0] = [*decays.get(0.0, []), *(p for p in parameters if p.ndim < 2)]
        self.optimizer = torch.optim.AdamW(
            [{"params": group, "weight_decay": decay} for decay, group in decays.items()],
            lr=config.learning_rate,
            betas=(0.9, config.beta2),
            fused=True,
        )

    def validate(self, blocks: NDArray[np.int32]) -> float:
        """Mean loss over blocks (N, T), nats per token."""
        losses = compute_block_losses(self.model, blocks, batch=self.config.evaluation_batch)
        mean = float(losses.double().mean())
        if not math.isfinite(mean):
            raise TrainingError(
                f"Cannot train: expected a finite validation loss, got {mean}. "
                "Lower the learning rate, or check the base and the text."
            )
        return mean

    def save(self, store: CheckpointStore, counters: Counters, best: Sequence[Tensor]) -> None:
        """Write a checkpoint."""
        store.save(counters, read_tensors(self.parameters, self.optimizer, best))


def _judge(counters: Counters, step: int, loss: float, patience: int | None) -> Counters:
    """The counters after a validation."""
    if loss < counters.best_loss:
        return replace(counters, step=step, best_step=step, best_loss=loss, stale=0)
    stale = counters.stale + 1
    return replace(
        counters, step=step, stale=stale, stopped=patience is not None and stale >= patience
    )


def _loop(
    run: _Run,
    accelerator: Accelerator,
    train_blocks: NDArray[np.int32],
    validation_blocks: NDArray[np.int32],
    counters: Counters,
    best: Sequence[Tensor],
    metrics: Metrics,
    store: CheckpointStore,
) -> tuple[Counters, Sequence[Tensor]]:
    """Train from where the counters stand to the end; returns the last counters and the best."""
    config = run.config
    model, optimizer = accelerator.prepare(run.model, run.optimizer)
    pending: list[Tensor] = []  # losses not read yet
    model.train()
    for step in range(counters.step + 1, config.steps + 1):
        if counters.stopped:
            break
        rate = compute_learning_rate(step - 1, config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(int(np.random.SeedSequence([config.seed, step]).generate_state(1)[0]))
        rows = take_batch(train_blocks, step - 1, batch=config.batch, seed=config.seed)
        loss = _compute_loss(model, torch.from_numpy(rows).long().to(accelerator.device))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(run.parameters, config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        pending.append(loss.detach())
        is_due = step % config.validate_every == 0 or step == config.steps
        if is_due or step % REPORT_EVERY == 0:
            mean_loss = float(torch.stack(pending).mean())
            pending.clear()
            validation_loss = run.validate(validation_blocks) if is_due else None
            metrics.add(step, mean_loss, validation_loss, rate)
            if validation_loss is not None:
                counters = _judge(counters, step, validation_loss, config.patience)
                best = copy_values(run.parameters) if counters.best_step == step else best
                metrics.save()
                run.save(store, counters, best)
    return counters, best


def _check_inputs(
    parameters: Sequence[nn.Parameter],
    train_blocks: NDArray[np.int32],
    validation_blocks: NDArray[np.int32],
    config: TrainConfig,
) -> None:
    problems = [
        f"{name} {value}"
        for name, value in asdict(config).items()
        if name in ("steps", "batch", "threads", "validate_every", "learning_rate") and value <= 0
    ]
    if not parameters:
        problems.append("no parameters to train")
    for name, blocks in (("training", train_blocks), ("validation", validation_blocks)):
        if blocks.ndim != 2 or len(blocks) == 0 or blocks.shape[1] < 2:
            problems.append(f"{name} blocks of shape {blocks.shape}")
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
    context: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> TrainResult:
    """Train, or go on where a killed run in the same folder stopped.

    Args:
        model: A Hugging Face causal LM; left in eval mode with the best parameters.
        parameters: The ones to train; all others stay as they are.
        train_blocks: Tokens (N, T).
        validation_blocks: Tokens (N', T), never trained on.
        config: Settings.
        folder: Gets `checkpoint.safetensors` and `metrics.jsonl`.
        context: What else decides the result, e.g. the base's fingerprint; a checkpoint made
            under another context is refused.
        progress: Told the step with loss, validation_loss, tokens_per_second and eta_seconds.

    Returns:
        How it ended.

    Raises:
        TrainingError: If settings or blocks cannot be trained on, the loss is not finite, another
            process trains in the folder, or its checkpoint was made from other inputs, versions,
            hardware or dtype.
        StorageError: If the disk refuses.
    """
    _check_inputs(parameters, train_blocks, validation_blocks, config)
    accelerator = Accelerator(mixed_precision="no")
    environment = describe_environment(accelerator.device.type)
    dtype = str(parameters[0].dtype).removeprefix("torch.")
    settings = {k: v for k, v in asdict(config).items() if k != "threads"}
    data = b"".join(np.ascontiguousarray(b).tobytes() for b in (train_blocks, validation_blocks))
    identity = {
        **environment,
        **settings,
        **(context or {}),
        "dtype": dtype,
        "blocks": hash_bytes(data),
    }
    with lock_folder(folder):
        store = CheckpointStore(folder / CHECKPOINT_NAME, identity)
        found = store.load(parameters)
        threads = config.threads if found is None else found[0].threads
        devices = [accelerator.device] if accelerator.device.type == "cuda" else []
        with (
            limit_threads(threads),
            deterministic(accelerator.device),
            torch.random.fork_rng(devices=devices),
        ):
            run = _Run(model.to(accelerator.device), parameters, config)
            if found is None:
                loss = run.validate(validation_blocks)
                counters = Counters(0, loss, 0, loss, 0, False, threads)
                best: Sequence[Tensor] = copy_values(run.parameters)
            else:
                counters, best = found[0], found[1].best
                write_tensors(parameters, run.optimizer, counters.step, found[1])
            metrics = Metrics(
                folder / METRICS_NAME,
                counters=counters,
                steps=config.steps,
                step_tokens=config.batch * int(train_blocks.shape[1]),
                progress=progress,
            )
            counters, best = _loop(
                run,
                accelerator,
                train_blocks,
                validation_blocks,
                counters,
                best,
                metrics,
                store,
            )
            set_values(run.parameters, best)
            model.to("cpu").eval()
    return TrainResult(
        steps=counters.step,
        tokens=counters.step * config.batch * int(train_blocks.shape[1]),
        best_step=counters.best_step,
        initial_loss=counters.initial_loss,
        loss=counters.best_loss,
        stopped_early=counters.stopped,
        threads=counters.threads,
        dtype=dtype,
        environment=environment,
        seconds=metrics.seconds,
    )
