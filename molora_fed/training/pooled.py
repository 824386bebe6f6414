"""What contributors could have had by pooling their text instead of fusing.

Both rivals train on all domains' text together: `train_monolithic` one adapter, of the linear
layers of the blocks that are not frozen unless another kind is asked for, as specialists do;
`continue_base` all parameters of the base, embedding, output head and norms too.
"""

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molora_fed.charter import AdapterRules, TrainingRules
from molora_fed.corpus.batches import mix_domains
from molora_fed.corpus.blocks import Blocks
from molora_fed.errors import TrainingError, describe_mismatch
from molora_fed.models.base import Base, load_base
from molora_fed.models.base_files import copy_checkpoint, quiet_transformers
from molora_fed.models.forward import compute_block_losses
from molora_fed.models.runtime import Placement, limit_threads
from molora_fed.plugins import Plugins, get_plugins
from molora_fed.storage.files import (
    canonical_json,
    hash_bytes,
    replace_folder,
    storage_errors,
    write_json,
)
from molora_fed.training.adapter_job import AdapterJob, Specialist, run_job
from molora_fed.training.language_model import train
from molora_fed.training.loop import CHECKPOINT_NAME
from molora_fed.training.specialists import WATCHED_BLOCKS, build_config
from molora_fed.types import Progress

__all__ = [
    "CONTROL_KIND",
    "ContinuedBase",
    "choose_rate",
    "continue_base",
    "load_continued",
    "train_monolithic",
]

CONTROL_KIND = "delta"
_RECORD = "record.json"
_BASE_FOLDER = "base"


@dataclass(frozen=True, eq=False)
class _Pool:
    """All domains' text together.

    Attributes:
        domain: Names of all domains, joined by "+".
        train: Blocks to train on, (N, T).
        validation: Blocks the record's losses are measured on, (N', T).
        watched: Blocks the best weights are chosen by, (N'', T).
    """

    domain: str
    train: NDArray[np.int32]
    validation: NDArray[np.int32]
    watched: NDArray[np.int32]

    @classmethod
    def build(
        cls,
        train_blocks: Sequence[Blocks],
        validation_blocks: Sequence[Blocks],
        *,
        rows: int,
        seed: int,
    ) -> "_Pool":
        """Mix domains in equal shares.

        Raises:
            TrainingError: If there are no blocks of a domain.
        """
        filled = [blocks for blocks in train_blocks if len(blocks)]
        if not filled or len(filled) < len(train_blocks) or not any(map(len, validation_blocks)):
            raise TrainingError(
                "Cannot train on pooled text: expected train and validation blocks of every "
                f"domain, got train blocks of {len(filled)} of {len(train_blocks)}. Prepare the "
                "corpora again."
            )
        share = max(1, min(WATCHED_BLOCKS // len(filled), *(len(b) for b in validation_blocks)))
        return cls(
            domain="+".join(sorted({blocks.domain for blocks in filled})),
            train=mix_domains([blocks.tokens for blocks in filled], rows, seed=seed),
            validation=np.concatenate([blocks.tokens for blocks in validation_blocks]),
            watched=np.concatenate([blocks.take(share).tokens for blocks in validation_blocks]),
        )


def train_monolithic(
    base: Base,
    train_blocks: Sequence[Blocks],
    validation_blocks: Sequence[Blocks],
    *,
    steps: int,
    rules: AdapterRules,
    training: TrainingRules,
    seed: int,
    threads: int,
    folder: Path,
    kind: str = CONTROL_KIND,
    plugins: Plugins | None = None,
    evaluation_batch: int = 16,
    progress: Progress | None = None,
) -> Specialist:
    """Train one adapter on all domains' text together.

    It is no contribution: the charter's limits on kind and bytes do not bind it, and it takes
    part in the bank only as a column that is not an expert.

    Args:
        base: The cooperative's base; it stays as it is.
        train_blocks: Train blocks of each domain; every domain gets the same number of tokens.
        validation_blocks: Validation blocks of each domain, watched in equal numbers.
        steps: Optimiser steps: the sum of the specialists', for as many steps in all.
        rules: The charter's rules for adapters; the frozen depth counts.
        training: The charter's rules for training; batch, rate and validations count.
        seed: Seed of the data order.
        threads: Torch threads; a resumed run keeps those it began with.
        folder: Gets `adapter/`, `record.json` and `metrics.jsonl`.
        kind: Of the adapter; all linear layers are trained by default.
        plugins: Where the kind is looked up; the installed plugins by default.
        evaluation_batch: Blocks per forward pass when a loss is measured, from the charter.
        progress: Told the step with loss, validation_loss, tokens_per_second and eta_seconds.

    Raises:
        TrainingError: If there are no blocks, the folder holds another training, or see
            `molora_fed.training.language_model.train`.
        StorageError: On I/O errors.
    """
    registered = plugins or get_plugins()
    pool = _Pool.build(train_blocks, validation_blocks, rows=steps * training.batch, seed=seed)
    config = build_config(
        kind,
        training,
        registered,
        hidden_size=base.hidden_size,
        seed=seed,
        threads=threads,
        evaluation_batch=evaluation_batch,
        steps=steps,
        patience=None,
    )
    job = AdapterJob(
        base=base,
        domain=pool.domain,
        train_tokens=pool.train,
        validation_tokens=pool.validation,
        watched_tokens=pool.watched,
        kind=kind,
        rank=training.rank,
        rules=AdapterRules(
            kinds=(kind,),
            max_rank=rules.max_rank,
            max_bytes=2**62,
            frozen_depth=rules.frozen_depth,
        ),
        config=config,
    )
    return run_job(job, folder, registered, progress)


@dataclass(frozen=True, eq=False)
class ContinuedBase:
    """A base trained on with all its parameters, on disk.

    Attributes:
        folder: Holds `base/`, `record.json` and `metrics.jsonl`.
        base_loss: The base's loss on all validation blocks before, nats per token.
        loss: Its loss on the same blocks, measured on the checkpoint read back from disk.
        record: Settings, seeds, steps, tokens, threads, dtype, versions, fingerprints; JSON values
            without wall times.
    """

    folder: Path
    base_loss: float
    loss: float
    record: Mapping[str, Any]

    def load(self, placement: Placement | None = None) -> Base:
        """The trained checkpoint.

        Args:
            placement: Where, and in which dtype; the CPU and float32 if None.

        Raises:
            BaseCheckpointError: If a file is missing or malformed.
        """
        return load_base(self.folder / _BASE_FOLDER, placement)


def load_continued(folder: Path) -> ContinuedBase:
    """Read the record of what `continue_base` made.

    Raises:
        TrainingError: If there is none, or it is malformed.
    """
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        return ContinuedBase(folder, float(record["base_loss"]), float(record["loss"]), record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"Cannot read the base continued in '{folder}': expected a finished training with "
            f"'{_RECORD}', got {type(error).__name__}: {error}. Train it again."
        ) from error


def continue_base(
    base: Base,
    train_blocks: Sequence[Blocks],
    validation_blocks: Sequence[Blocks],
    *,
    steps: int,
    training: TrainingRules,
    seed: int,
    threads: int,
    folder: Path,
    plugins: Plugins | None = None,
    evaluation_batch: int = 16,
    progress: Progress | None = None,
) -> ContinuedBase:
    """Train all parameters of the base on all domains' text together; a finished one is loaded.

    Args:
        base: The cooperative's base; it stays as it is.
        train_blocks: Train blocks of each domain; every domain gets the same number of tokens.
        validation_blocks: Validation blocks of each domain, watched in equal numbers.
        steps: Optimiser steps: the sum of the specialists', for as many steps in all.
        training: The charter's rules for training; batch, rate and validations count.
        seed: Seed of the data order.
        threads: Torch threads; a resumed run keeps those it began with.
        folder: Gets `base/`, `record.json` and `metrics.jsonl`.
        plugins: Where the rate of full training is looked up, if the rules leave it open.
        evaluation_batch: Blocks per forward pass when a loss is measured, from the charter.
        progress: Told the step with loss, validation_loss, tokens_per_second and eta_seconds.

    Raises:
        TrainingError: If there are no blocks, the folder holds another training, or see
            `molora_fed.training.language_model.train`.
        StorageError: On I/O errors.
    """
    pool = _Pool.build(train_blocks, validation_blocks, rows=steps * training.batch, seed=seed)
    config = build_config(
        CONTROL_KIND,  # all of a linear layer is free there, too
        training,
        plugins or get_plugins(),
        hidden_size=base.hidden_size,
        seed=seed,
        threads=threads,
        evaluation_batch=evaluation_batch,
        steps=steps,
        patience=None,
    )
    settings = config.describe()
    tokens = (pool.train, pool.validation, pool.watched)
    inputs = {
        "domain": pool.domain,
        "base_weights": base.weights,
        "blocks": hash_bytes(b"".join(np.ascontiguousarray(part).tobytes() for part in tokens)),
        "settings": settings,
    }
    if (folder / _RECORD).exists():
        finished = load_continued(folder)
        differing = [name for name in inputs if finished.record.get(name) != inputs[name]]
        if differing:
            raise TrainingError(
                describe_mismatch(
                    f"Cannot continue the base in '{folder}'",
                    expected="an empty folder or the same training",
                    got=f"a finished one that differs in {', '.join(differing)}",
                    fix="Choose another folder.",
                )
            )
        return finished
    model = copy.deepcopy(base.model).requires_grad_(True)
    result = train(
        model,
        list(model.parameters()),
        pool.train,
        pool.watched,
        config,
        folder,
        context={"continued": hash_bytes(canonical_json(inputs))},
        progress=progress,
    )
    target = folder / _BASE_FOLDER
    with replace_folder(target) as temporary, storage_errors(target), quiet_transformers():
        copy_checkpoint(base.folder, temporary)  # the tokenizer's files stay byte for byte
        model.save_pretrained(temporary)
    with limit_threads(result.threads):
        before, after = (
            float(
                compute_block_losses(each, pool.validation, batch=evaluation_batch).double().mean()
            )
            for each in (base.model, load_base(target, Placement.of(base.model)).model)
        )
    record = {
        **inputs,
        **result.to_record(),
        "watched_loss": result.loss,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "base_loss": float(before),
        "loss": float(after),
    }
    write_json(folder / _RECORD, record)
    (folder / CHECKPOINT_NAME).unlink(missing_ok=True)
    return load_continued(folder)


RATE_FACTOR = 2.0
_FURTHER_TRIES = 2  # beyond the first three, while the best lies at an end


def choose_rate(
    start: float, attempt: Callable[[float], float]
) -> tuple[float, dict[float, float]]:
    """Choose a learning rate by validation loss: half, once and twice the start, then on downhill.

    Args:
        start: The rate to begin at.
        attempt: Trains with a rate and returns its validation loss, nats per token; infinite where
            the training failed.

    Returns:
        The best rate, and the loss of every rate tried.

    Raises:
        TrainingError: If no rate gave a finite loss.
    """
    found = {rate: attempt(rate) for rate in (start / RATE_FACTOR, start, start * RATE_FACTOR)}
    for _ in range(_FURTHER_TRIES):
        best = min(found, key=lambda rate: (found[rate], rate))
        if best == min(found):
            following = best / RATE_FACTOR
        elif best == max(found):
            following = best * RATE_FACTOR
        else:
            break
        found[following] = attempt(following)
    best = min(found, key=lambda rate: (found[rate], rate))
    if not math.isfinite(found[best]):
        raise TrainingError(
            f"Cannot choose a learning rate: expected a finite loss at one of "
            f"{', '.join(f'{rate:g}' for rate in sorted(found))}, got none. Check the base and "
            "the text."
        )
    return best, found
