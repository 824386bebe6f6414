"""Which blocks a training step sees: a pure function of seed and step."""

from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["choose_rows", "mix_domains", "take_batch"]


@lru_cache(maxsize=32)  # of several domains at once, and a batch may span two epochs
def _permutation(seed: int, epoch: int, num_blocks: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(num_blocks)


def choose_rows(num_blocks: int, step: int, *, batch: int, seed: int) -> list[int]:
    """Indices of a step's blocks: epochs follow each other, each in its own order.

    Args:
        num_blocks: N.
        step: Step from 0.
        batch: Blocks per step B.
        seed: Seed of the order; each epoch's follows from (seed, epoch).

    Returns:
        B indices below N.
    """
    places = range(step * batch, (step + 1) * batch)
    return [int(_permutation(seed, p // num_blocks, num_blocks)[p % num_blocks]) for p in places]


_Value = TypeVar("_Value", bound=np.generic)


def take_batch(blocks: NDArray[_Value], step: int, *, batch: int, seed: int) -> NDArray[_Value]:
    """The blocks of a step, see `choose_rows`.

    Args:
        blocks: Tokens of training blocks, or their targets, (N, T).
        step: Step from 0.
        batch: Blocks per step B.
        seed: Seed of the order.

    Returns:
        The step's rows, (B, T).
    """
    return blocks[choose_rows(len(blocks), step, batch=batch, seed=seed)]


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
