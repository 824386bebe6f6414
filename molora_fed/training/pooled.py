"""The pooled baseline: one adapter trained on all domains' data together, for as many steps in all.

It trains the linear layers of the blocks that are not frozen, as specialists do, not all weights of
the base. It takes as many steps as all specialists did: what the contributors could have had by
pooling their data instead of fusing.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from molora_fed.charter import AdapterRules, TrainingRules
from molora_fed.corpus.batches import mix_domains
from molora_fed.corpus.blocks import Blocks
from molora_fed.errors import TrainingError
from molora_fed.models.base import Base
from molora_fed.plugins import Plugins, get_plugins
from molora_fed.training.specialists import (
    WATCHED_BLOCKS,
    AdapterJob,
    Specialist,
    build_config,
    run_job,
)
from molora_fed.types import Progress

__all__ = ["train_monolithic"]

CONTROL_KIND = "delta"


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
    plugins: Plugins | None = None,
    evaluation_batch: int = 16,
    progress: Progress | None = None,
) -> Specialist:
    """Train the pooled baseline: the same loop and linear layers on the data of all domains.

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
        plugins: Where the kind is looked up; the installed plugins by default.
        evaluation_batch: Blocks per forward pass when a loss is measured, from the charter.
        progress: Told the step with loss, validation_loss, tokens_per_second and eta_seconds.

    Raises:
        TrainingError: If there are no blocks, the folder holds another training, or see
            `molora_fed.training.loop.train`.
        StorageError: On I/O errors.
    """
    registered = plugins or get_plugins()
    filled = [blocks for blocks in train_blocks if len(blocks)]
    if not filled or len(filled) < len(train_blocks) or not any(map(len, validation_blocks)):
        raise TrainingError(
            "Cannot train the control: expected train and validation blocks of every domain, "
            f"got train blocks of {len(filled)} of {len(train_blocks)}. Prepare the corpora again."
        )
    share = max(1, min(WATCHED_BLOCKS // len(filled), *(len(b) for b in validation_blocks)))
    config = build_config(
        CONTROL_KIND,
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
        domain="+".join(sorted({blocks.domain for blocks in filled})),
        train_tokens=mix_domains(
            [blocks.tokens for blocks in filled], steps * training.batch, seed=seed
        ),
        validation_tokens=np.concatenate([blocks.tokens for blocks in validation_blocks]),
        watched_tokens=np.concatenate([b.take(share).tokens for b in validation_blocks]),
        kind=CONTROL_KIND,
        rank=training.rank,
        rules=AdapterRules(
            kinds=(CONTROL_KIND,),
            max_rank=rules.max_rank,
            max_bytes=2**62,
            frozen_depth=rules.frozen_depth,
        ),
        config=config,
    )
    return run_job(job, folder, registered, progress)
