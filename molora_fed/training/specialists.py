"""Specialists: the base trained on one domain under a charter's rules and shipped as an adapter."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from molora_fed.charter import AdapterRules, TrainingRules
from molora_fed.corpus.blocks import Blocks
from molora_fed.errors import TrainingError, describe_mismatch
from molora_fed.models.base import Base
from molora_fed.plugins import Plugins, get_plugins
from molora_fed.training.adapter_job import (
    AdapterJob,
    Specialist,
    find_finished,
    load_specialist,
    run_job,
)
from molora_fed.training.choices import TrainingChoices
from molora_fed.training.language_model import TrainConfig
from molora_fed.training.launching import launch
from molora_fed.types import OnMemory, Progress

__all__ = ["build_config", "train_specialist"]

WATCHED_BLOCKS = 64  # validation blocks looked at during training; the record's losses are on all


def build_config(
    kind: str,
    training: TrainingRules,
    plugins: Plugins,
    *,
    hidden_size: int,
    steps: int,
    patience: int | None,
    seed: int,
    threads: int,
    evaluation_batch: int,
) -> TrainConfig:
    """The loop's settings under a charter's rules; the kind decides the rate they leave open."""
    rate = training.learning_rate
    if rate is None:
        rate = plugins.adapter_kinds.resolve(kind)().suggest_learning_rate(hidden_size)
    return TrainConfig(
        steps=steps,
        batch=training.batch,
        learning_rate=rate,
        seed=seed,
        threads=threads,
        validate_every=training.validate_every,
        patience=patience,
        evaluation_batch=evaluation_batch,
    )


def train_specialist(
    base: Base,
    train_blocks: Blocks,
    validation_blocks: Blocks,
    *,
    kind: str,
    rules: AdapterRules,
    training: TrainingRules,
    seed: int,
    threads: int,
    folder: Path,
    choices: TrainingChoices | None = None,
    plugins: Plugins | None = None,
    domain_options: Mapping[str, Any] | None = None,
    evaluation_batch: int = 16,
    on_memory: OnMemory | None = None,
    progress: Progress | None = None,
) -> Specialist:
    """Train a specialist, or resume a run that was stopped; a finished one is loaded.

    Args:
        base: The cooperative's base; it stays as it is.
        train_blocks: Blocks of the contributor's train split.
        validation_blocks: Blocks of its validation split: best weights, early stop, losses.
        kind: Adapter kind, one the rules accept.
        rules: The charter's rules for adapters.
        training: The charter's rules for training.
        seed: Seed of initial factors and data order.
        threads: Torch threads; a resumed run keeps those it began with.
        folder: Gets `adapter/`, `record.json` and `metrics.jsonl`.
        choices: What this contributor chooses otherwise than the charter; with a launcher it
            trains in the processes that this one starts.
        plugins: Where the kind is looked up; the installed plugins by default, and always in
            launched processes.
        domain_options: Options of the registered domain that the text is of, for the record.
        evaluation_batch: Blocks per forward pass when a loss is measured, from the charter.
        on_memory: Told the bytes that the training needs beside the base, about, and those that
            are free, before its first step; in launched processes nobody is told.
        progress: Told the step with loss, validation_loss, tokens_per_second and eta_seconds.

    Raises:
        ComputeError: If the training needs more memory than is free.
        TrainingError: If the rules refuse the kind, the folder holds another training, or see
            `molora_fed.training.language_model.train`.
        AdapterError: If the adapter breaks the charter's limits.
        UnknownNameError: If no plugin registers the kind.
        StorageError: On I/O errors.
    """
    registered, chosen = plugins or get_plugins(), choices or TrainingChoices()
    training = chosen.over(training)
    if kind not in rules.kinds:
        raise TrainingError(
            describe_mismatch(
                f"Cannot train a specialist of kind '{kind}'",
                expected=f"one of {', '.join(rules.kinds)}",
                got=f"'{kind}'",
                fix="Choose a kind that the charter accepts.",
            )
        )
    config = build_config(
        kind,
        training,
        registered,
        hidden_size=base.hidden_size,
        seed=seed,
        threads=threads,
        evaluation_batch=evaluation_batch,
        steps=training.steps,
        patience=training.patience,
    )
    config = replace(config, accumulation=chosen.accumulation, checkpointing=chosen.checkpointing)
    watched = validation_blocks.take(WATCHED_BLOCKS)
    job = AdapterJob(
        base=base,
        domain=train_blocks.domain,
        train_tokens=train_blocks.tokens,
        validation_tokens=validation_blocks.tokens,
        watched_tokens=watched.tokens,
        kind=kind,
        rank=training.rank,
        rules=rules,
        config=config,
        # Another kind than the one the rules speak of has options of its own: its defaults.
        options=training.options if kind == training.kind else {},
        domain_options=domain_options or {},
        train_targets=train_blocks.targets,
        watched_targets=watched.targets,
        train_starts=train_blocks.document_starts if chosen.reset_documents else None,
    )
    if not chosen.launcher:
        return run_job(job, folder, registered, progress, on_memory)
    finished = find_finished(job, folder, registered)
    if finished is None:
        launch(job, folder, chosen.split_launcher(), progress)
        finished = find_finished(job, folder, registered)
    return finished or load_specialist(folder)
