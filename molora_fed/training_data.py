"""Which blocks a training step sees: a pure function of seed and step."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["mix_domains", "take_batch"]


@lru_cache(maxsize=2)  # a batch may span the end of one epoch and the start of the next
def _permutation(seed: int, epoch: int, num_blocks: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(num_blocks)


def take_batch(blocks: NDArray[np.int32], step: int, *, batch: int, seed: int) -> NDArray[np.int32]:
    """The blocks of a step: epochs follow each other, each in its own order of (seed, epoch).

    Args:
        blocks: Training blocks (N, T).
        step: Step from 0.
        batch: Blocks per step B.
        seed: Seed of the order.

    Returns:
        Tokens (B, T).
    """
    num_blocks = len(blocks)
    places = range(step * batch, (step + 1) * batch)
    rows = [_permutation(seed, p // num_blocks, num_blocks)[p % num_blocks] for p in places]
    return blocks[rows]


def mix_domains(
    blocks: Sequence[NDArray[np.int32]], num_blocks: int, *, seed: int
) -> NDArray[np.int32]:
    """Choose blocks so that every domain has the same number of them.

    Args:
        blocks: Tokens of each domain, (N_d, T); all N_d > 0.
        num_blocks: Blocks wanted at least.
        seed: Seed of the choice; within a domain, none is taken twice before all were once.

    Returns:
        Tokens (N, T), the smallest multiple of the number of domains that is >= `num_blocks`.
    """
    share = -(-num_blocks // len(blocks))
    chosen = []
    for index, rows in enumerate(blocks):
        random = np.random.default_rng([seed, index])
        rounds = [random.permutation(len(rows)) for _ in range(-(-share // len(rows)))]
        chosen.append(rows[np.concatenate(rounds)[:share]])
    return np.concatenate(chosen)
