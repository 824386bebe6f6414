"""What a contributor publishes of its text where routers are made from statistics."""

import shutil
from pathlib import Path

import numpy as np

from molora_fed.bank import Expert, build_calibration_bank
from molora_fed.charter import Charter
from molora_fed.corpus.blocks import Blocks
from molora_fed.errors import CorpusError
from molora_fed.models.base import Base
from molora_fed.models.hidden_statistics import (
    MIN_CLUSTERS,
    TOKENS_PER_WIDTH,
    HiddenStatistics,
    collect_statistics,
)
from molora_fed.types import BASE_EXPERT, Progress

__all__ = ["check_described", "measure_statistics"]


def measure_statistics(
    base: Base,
    charter: Charter,
    calibration: Blocks,
    folder: Path,
    *,
    progress: Progress | None = None,
) -> HiddenStatistics:
    """Statistics of the base's last hidden states over a contributor's calibration text.

    Args:
        base: The charter's base.
        charter: Says how many blocks count.
        calibration: The contributor's calibration blocks.
        folder: Gets the base's outputs while this runs; run again after a kill, it goes on there.
        progress: Receives blocks done.

    Raises:
        CorpusError: If there is too little text for them.
        StorageError: On I/O errors.
    """
    blocks = check_described(base, charter, calibration)
    bank = build_calibration_bank(
        folder,
        base,
        [Expert(BASE_EXPERT, None)],
        [blocks],
        readings=frozenset({"base_hidden"}),
        batch=charter.identity.corpus.evaluation_batch,
        progress=progress,
    )
    views = (bank.view(rows) for rows in bank.chunks())
    states = (view.base_hidden for view in views if view.base_hidden is not None)
    found = collect_statistics(blocks.domain, states)
    shutil.rmtree(folder, ignore_errors=True)
    return found


def check_described(base: Base, charter: Charter, calibration: Blocks) -> Blocks:
    """The calibration blocks that statistics are over, of enough text.

    Raises:
        CorpusError: If they are so few that statistics would tell of single tokens or documents.
    """
    blocks = calibration.take(charter.amendment.samples.calibration)
    least, clusters = TOKENS_PER_WIDTH * base.hidden_size, len(np.unique(blocks.clusters))
    if blocks.tokens.size < least or clusters < MIN_CLUSTERS:
        raise CorpusError(
            f"Cannot publish statistics of the calibration text of '{blocks.domain}': expected "
            f"{least:,} tokens ({TOKENS_PER_WIDTH} for each number of a hidden state) of "
            f"{MIN_CLUSTERS} documents at least, so that none can be told from them, got "
            f"{blocks.tokens.size:,} of {clusters}. Add text, and prepare the corpus again."
        )
    return blocks
