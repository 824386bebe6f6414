"""Two domains a tiny base can learn, a population for them, and an adaptation that is killed."""

import os
import signal
from pathlib import Path

import numpy as np
from molora_evolution.routers import ParallelSigmoidOptions, ParallelSigmoidRouter

from molora_fed.bank.states import build_states
from molora_fed.corpus.blocks import Blocks
from molora_fed.models.base import load_base
from molora_fed.population.adaptation import adapt
from molora_fed.population.adaptation_config import AdaptationConfig
from molora_fed.population.slots import make_population
from molora_fed.testing import build_random_adapter
from molora_fed.types import Split

DOMAINS = {"up": 1, "down": -1}
CONFIG = AdaptationConfig(
    steps=12, batch=4, seed=5, threads=1, learning_rate=1e-2, checkpoint_every=4
)


def build_counting_blocks(domain, count=12, seed=0, length=16, split=Split.TRAIN):
    """Rows that count up or down by 1 from a random start; two documents to a row."""
    random = np.random.default_rng([seed, DOMAINS[domain] + 1])
    starts = random.integers(20, 200, (count, 1))
    tokens = (starts + DOMAINS[domain] * np.arange(length)).astype(np.int32)
    documents = np.arange(count * 2, dtype=np.int32).reshape(count, 2).repeat(length // 2, axis=1)
    return Blocks(domain, split, tokens, documents, documents)


def build_all_states(base, folder, readings=frozenset({"base_hidden"}), **more):
    return build_states(base, [build_counting_blocks(d, **more) for d in DOMAINS], readings, folder)


def build_router(num_slots=3, width=32, seed=0, **options):
    return ParallelSigmoidRouter.build(num_slots, width, ParallelSigmoidOptions(**options), seed)


def build_population(base, num_slots=3):
    """One slot that changes the base, and fresh ones that do not yet."""
    adapter = build_random_adapter(base.model, rank=2, seed=1, strength=0.1)
    return make_population(
        base, [("one", "up", adapter)], num_slots=num_slots, filling="fresh", seed=1
    )


def adapt_counting(base, folder, *, config=CONFIG, router=None, progress=None):
    return adapt(
        base,
        build_population(base),
        router or build_router(),
        build_all_states(base, folder / "states"),
        config,
        folder / "adaptation",
        progress=progress,
    )


def adapt_until_killed(checkpoint: str, folder: str, count: int) -> None:
    """Adapt in a process of its own that SIGKILL ends before the disk has the `count`-th file."""
    left = [count]
    base = load_base(Path(checkpoint))
    build_all_states(base, Path(folder) / "states")
    real_fsync = os.fsync

    def fsync(descriptor) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        real_fsync(descriptor)

    os.fsync = fsync
    adapt_counting(base, Path(folder))
