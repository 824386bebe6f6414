"""The job of a language model on blocks of tokens, for the one training loop.

Built-in base, specialists and the pooled baseline are trained by it. Every forward pass sees whole
blocks; there is no padding; tokens that do not count in the loss are read like all others. Tokens
see the documents before theirs in a block, unless a training is told where each starts.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from molora_fed.corpus.batches import take_batch
from molora_fed.errors import TrainingError
from molora_fed.models.forward import compute_block_losses
from molora_fed.models.head import Head, find_head
from molora_fed.models.runtime import Placement, describe_environment, mixed_precision
from molora_fed.models.states import can_reset, compute_positions
from molora_fed.storage.files import hash_bytes
from molora_fed.training.loop import TrainingJob, build_optimizer, run_training, seed_step
from molora_fed.training.memory import TrainingSize, check_training
from molora_fed.training.team import ALONE, Team
from molora_fed.types import OnMemory, Progress

__all__ = ["TrainConfig", "TrainResult", "compute_learning_rate", "train"]


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
        starts: Where documents start that are read alone, (N, T); None reads blocks whole.
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
    starts: NDArray[np.bool_] | None = None

    def __call__(self, step: int) -> Iterator[Tensor]:
        """Sums of losses over parts of the batch, divided by its predictions that count, nats."""
        # What is drawn at random, e.g. dropout, is another in each share.
        place = () if self.team.is_first else (self.team.rank,)
        seed_step(self.config.seed, step + 1, *place)
        rows, counts, positions = self._take(self.blocks, step), None, None
        predictions = rows.shape[0] * (rows.shape[1] - 1)
        if self.targets is not None:
            counts = self._take(self.targets, step)[:, 1:]
        if self.starts is not None:
            starts = self._take(self.starts, step)
            # Of a document's first token there is nothing to predict it from.
            counts = ~starts[:, 1:] if counts is None else counts & ~starts[:, 1:]
            positions = compute_positions(torch.from_numpy(starts[:, :-1]))
        if counts is not None:
            predictions = max(int(counts.sum()), 1)  # 0 where no token of the batch counts
        share = self.team.take_share(np.arange(len(rows)))
        for part in np.array_split(share, min(self.config.accumulation, len(share))):
            tokens = torch.from_numpy(rows[part]).long().to(self.placement.device)
            with mixed_precision(self.placement):
                losses = self._compute_losses(
                    tokens, None if positions is None else positions[part].to(tokens.device)
                )
            if counts is not None:
                losses = losses * torch.from_numpy(counts[part]).to(losses.device)
            yield losses.sum() / predictions

    def _take(self, blocks: NDArray[Any], step: int) -> NDArray[Any]:
        return take_batch(blocks, step, batch=self.config.batch, seed=self.config.seed)

    def _compute_losses(self, tokens: Tensor, positions: Tensor | None) -> Tensor:
        """Of every predicted token, (B, T-1)."""
        inputs = {} if positions is None else {"position_ids": positions}
        if self.head is not None:
            return self.head.compute_losses(tokens, **inputs)
        found = self.model(input_ids=tokens[:, :-1], use_cache=False, **inputs)
        logits = found.logits  # (B, T - 1, V)
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
    train_starts: NDArray[np.bool_] | None,
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
    if train_starts is not None and (
        train_starts.shape != train_blocks.shape or train_starts[:, 1:].all()
    ):
        problems.append("training blocks in which no document has two tokens")
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
    train_starts: NDArray[np.bool_] | None = None,
    context: Mapping[str, str] | None = None,
    team: Team = ALONE,
    on_memory: OnMemory | None = None,
    progress: Progress | None = None,
) -> TrainResult:
    """Train, or resume a run that was stopped in the same folder.

    Args:
        model: A Hugging Face causal LM, or a module that is called as one and has its embeddings;
            left in eval mode with the best parameters.
        parameters: The ones to train; all others stay as they are.
        train_blocks: Tokens (N, T).
        validation_blocks: Tokens (N', T), never trained on.
        config: Settings.
        folder: Gets `checkpoint.safetensors` and `metrics.jsonl`.
        train_targets: Which training tokens count in the loss, (N, T); None counts all.
        validation_targets: Which validation tokens count, (N', T); None counts all.
        train_starts: Where documents of training blocks start that are read alone, (N, T): their
            tokens see no other, positions start at 0, and first tokens do not count. None reads
            blocks whole, as validation does.
        context: What else decides the result, e.g. the base's fingerprint; a checkpoint made
            under another context is refused.
        team: The processes that train together: each calls this with the same arguments, and all
            end with the same parameters.
        on_memory: Told, before the first step, the bytes that the training needs beside what is
            loaded, about, and the bytes that are free.
        progress: Told the step with loss, validation_loss, tokens_per_second and eta_seconds.

    Returns:
        How it ended.

    Raises:
        ComputeError: If it needs more memory than is free.
        TrainingError: If settings or blocks cannot be trained on, documents cannot be read alone
            by this model, the loss is not finite, another process trains in the folder, or its
            checkpoint was made from other inputs, versions, hardware or dtype.
        StorageError: On I/O errors.
    """
    _check_inputs(
        parameters,
        train_blocks,
        validation_blocks,
        train_targets,
        validation_targets,
        train_starts,
        config,
        team,
    )
    weight = model.get_input_embeddings().weight
    placement = Placement(weight.device, weight.dtype)
    for parameter in parameters:  # small steps would be lost in a shorter dtype
        parameter.data = parameter.data.float()
    environment = describe_environment(placement.device.type)
    dtype = str(placement.dtype).removeprefix("torch.")
    arrays = (train_blocks, validation_blocks, train_targets, validation_targets, train_starts)
    data = b"".join(np.ascontiguousarray(b).tobytes() for b in arrays if b is not None)
    with mixed_precision(placement):
        head = find_head(model)
        if train_starts is not None and not can_reset(model):
            raise TrainingError(
                f"Cannot train on each document of a block alone with '{type(model).__name__}': "
                "expected attention that restarts where positions do, got one document in the "
                "states of the next. Leave --reset-documents out, or use another base."
            )
        if hasattr(model, "config"):  # what several models need together is not foreseen
            size = TrainingSize(
                rows=len(team.take_share(np.arange(config.batch))),
                parts=config.accumulation,
                length=int(train_blocks.shape[1]),
                validation_rows=min(config.evaluation_batch, len(validation_blocks)),
                checkpointing=config.checkpointing,
            )
            needed, free = check_training(model, head, parameters, size, placement)
            if on_memory is not None:
                on_memory(needed, free)
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
        loss=_BlockLoss(
            model, head, train_blocks, train_targets, config, placement, team, train_starts
        ),
        validate=validate,
        steps=config.steps,
        save_every=config.validate_every,
        identity={
            **environment,
            **config.describe(),
            **(context or {}),
            **team.describe(),
            **({} if train_starts is None else {"reset_documents": True}),
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
