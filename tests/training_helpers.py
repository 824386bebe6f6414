"""Blocks that a tiny model can learn, and a child process that trains until it is killed."""

import os
import signal
from pathlib import Path

import numpy as np

from molora_fed.charter import AdapterRules, TrainingRules
from molora_fed.corpus.blocks import Blocks
from molora_fed.models.base import load_base
from molora_fed.training.specialists import train_specialist
from molora_fed.types import Split

RULES = AdapterRules()
TRAINING = TrainingRules(rank=4, steps=16, batch=4, learning_rate=1e-2, validate_every=4)


def build_tokens(count, seed=0, length=24):
    """Rows that count upwards by 1 or 2, from a random start."""
    random = np.random.default_rng(seed)
    starts, strides = random.integers(0, 100, (count, 1)), random.integers(1, 3, (count, 1))
    return (starts + strides * np.arange(length)).astype(np.int32)


def build_blocks(split, count, seed=0, domain="counting"):
    tokens = build_tokens(count, seed)
    owners = np.repeat(np.arange(count, dtype=np.int32)[:, None], tokens.shape[1], axis=1)
    return Blocks(domain, split, tokens, owners, owners)


def train_counting(base, folder, *, kind="svd", training=TRAINING, threads=1, **more):
    return train_specialist(
        base,
        build_blocks(Split.TRAIN, 40, seed=1),
        build_blocks(Split.VALIDATION, 8, seed=2),
        **{"kind": kind, "rules": RULES, "training": training, "seed": 3, **more},
        threads=threads,
        folder=folder,
    )


def run_until_killed(checkpoint: str, folder: str, kind: str, where: str, count: int) -> None:
    """Train in a process of its own that SIGKILL ends at a chosen moment.

    Args:
        checkpoint: Base checkpoint.
        folder: The specialist's folder.
        kind: Adapter kind.
        where: "report" (of progress), "fsync" (before the disk has it) or "never".
        count: How many of these happen before.
    """
    left = [count]

    def count_down() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    real_fsync = os.fsync

    def fsync(descriptor) -> None:
        if where == "fsync":
            count_down()
        real_fsync(descriptor)

    def report(done, total, **fields) -> None:
        if where == "report":
            count_down()

    os.fsync = fsync
    train_counting(load_base(Path(checkpoint)), Path(folder), kind=kind, progress=report)
