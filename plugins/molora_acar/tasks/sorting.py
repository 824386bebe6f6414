"""Sorting of digits and numbers."""

import random

from molora_acar.tasks.problems import Problem

__all__ = ["make_sorting"]


def make_sorting(generator: random.Random, level: int) -> Problem:
    """Numbers in a random order.

    Levels 1 and 2: 3 + 2 * `level` digits in one word. From level 3 on: `level` + 1 numbers of two
    digits.

    Args:
        generator: Source of chance.
        level: Difficulty.
    """
    if level <= 2:
        numbers = [generator.randint(0, 9) for _ in range(3 + 2 * level)]
    else:
        numbers = [generator.randint(10, 99) for _ in range(level + 1)]
    gap = "" if level <= 2 else " "
    answer = gap.join(map(str, sorted(numbers)))
    return Problem(f"sort {gap.join(map(str, numbers))}:", answer, answer)
