"""Sequences: the next number."""

import random
from itertools import accumulate, cycle, islice

from molora_acar.tasks.problems import Problem

__all__ = ["make_sequence"]


def make_sequence(generator: random.Random, level: int) -> Problem:
    """Four numbers or more, and the one that follows.

    Level 1: one step, up or down. Level 2: two steps in turn. From level 3 on: steps that grow by
    a constant, from larger numbers at higher levels.

    Args:
        generator: Source of chance.
        level: Difficulty.
    """
    if level <= 2:
        steps = [generator.choice([-1, 1]) * generator.randint(1, 12) for _ in range(level)]
        shown = 3 + level
        start = generator.randint(0, 99)
        numbers = list(accumulate(islice(cycle(steps), shown), initial=start))
    else:
        shown = 4
        start, step = generator.randint(0, 50 * level), generator.randint(1, 10)
        growth = generator.randint(1, 3 * level)
        numbers = list(accumulate((step + growth * k for k in range(shown)), initial=start))
    answer = str(numbers[-1])
    return Problem(f"next {' '.join(map(str, numbers[:-1]))}:", answer, answer)
