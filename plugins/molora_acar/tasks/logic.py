"""Small logic: truth values of expressions."""

import random

from molora_acar.tasks.problems import Problem

__all__ = ["make_logic"]


def make_logic(generator: random.Random, level: int) -> Problem:
    """Three expressions of `level` + 1 truth values each, read from the left; three letters answer.

    Args:
        generator: Source of chance.
        level: Difficulty.
    """
    drawn = [_draw_expression(generator, level + 1) for _ in range(3)]
    answer = "".join("T" if value else "F" for _, value in drawn)
    return Problem(f"{' '.join(text for text, _ in drawn)}:", answer, answer.lower())


def _draw_expression(generator: random.Random, atoms: int) -> tuple[str, bool]:
    """An expression without brackets, and its value from the left."""
    text, value = _draw_atom(generator)
    for _ in range(atoms - 1):
        operator = generator.choice("&|^")
        atom, right = _draw_atom(generator)
        text += operator + atom
        value = {"&": value and right, "|": value or right, "^": value != right}[operator]
    return text, value


def _draw_atom(generator: random.Random) -> tuple[str, bool]:
    is_true, is_negated = generator.random() < 0.5, generator.random() < 0.5
    return ("~" if is_negated else "") + ("T" if is_true else "F"), is_true != is_negated
