"""Arithmetic: sums, differences and products of whole numbers."""

import random

from molora_acar.tasks.problems import Problem

__all__ = ["make_arithmetic"]


def make_arithmetic(generator: random.Random, level: int) -> Problem:
    """A calculation.

    Level 1: two numbers of two digits, + or -. Level 2: of three digits, or one digit times two.
    From level 3 on: a product and `level` - 2 further numbers of two digits.

    Args:
        generator: Source of chance.
        level: Difficulty.
    """
    if level == 1:
        text = _join(generator, [generator.randint(10, 99) for _ in range(2)])
    elif level == 2 and generator.random() < 2 / 3:
        text = _join(generator, [generator.randint(100, 999) for _ in range(2)])
    else:
        text = f"{generator.randint(2, 9)}*{generator.randint(10, 99)}"
        for _ in range(level - 2):
            text += f"{generator.choice('+-')}{generator.randint(10, 99)}"
    answer = str(_evaluate(text))
    return Problem(f"{text}=", answer, answer)


def _join(generator: random.Random, numbers: list[int]) -> str:
    return f"{numbers[0]}{generator.choice('+-')}{numbers[1]}"


def _evaluate(text: str) -> int:
    """Value of numbers joined by *, + and -; a product comes first only."""
    total = 0
    for term in text.replace("-", "+-").split("+"):
        value = 1
        for factor in term.split("*"):
            value *= int(factor)
        total += value
    return total
