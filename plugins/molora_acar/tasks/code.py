"""Code: the body of a small Python function, checked by unit tests."""

import random
from collections.abc import Callable, Mapping, Sequence

from molora_acar.code_answers import format_outcomes
from molora_acar.tasks.problems import Problem

__all__ = ["make_code"]

NUM_TESTS = 6
_BINARY: Mapping[str, Callable[[str, str], str]] = {
    "sum": lambda x, y: f"({x}+{y})",
    "minus": lambda x, y: f"({x}-{y})",
    "times": lambda x, y: f"({x}*{y})",
    "max": lambda x, y: f"max({x},{y})",
    "min": lambda x, y: f"min({x},{y})",
}
_COMMUTING = frozenset({"sum", "times", "max", "min"})
_UNARY: Mapping[str, Callable[[str], str]] = {
    "neg": lambda x: f"-{x}",
    "half": lambda x: f"{x}//2",
    "square": lambda x: f"{x}**2",
}


def make_code(generator: random.Random, level: int) -> Problem:
    """A description in words before their operands, and the Python expression it means.

    Level 1: one operation on two of a, b and a number, perhaps negated, halved or squared. Every
    further level puts another operation around it. The solution has operands of sums, products,
    max and min in either order, so equal answers differ as texts.

    Args:
        generator: Source of chance.
        level: Difficulty.
    """
    words = code = _draw_operand(generator)
    for _ in range(level):
        words, code = _wrap(generator, words, code)
    pairs = [[generator.randint(-20, 120) for _ in range(2)] for _ in range(NUM_TESTS)]
    return Problem(
        f"f(a,b) {words}:",
        code,
        format_outcomes(_evaluate(code, pairs)),
        {
            "before": "def f(a, b):\n    return ",
            "function": "f",
            "tests": [{"arguments": pair} for pair in pairs],
        },
    )


def _draw_operand(generator: random.Random) -> str:
    return generator.choice(["a", "b", str(generator.randint(1, 99))])


def _wrap(generator: random.Random, words: str, code: str) -> tuple[str, str]:
    """An operation on what there is and a new operand, perhaps with a unary one outside."""
    name = generator.choice(sorted(_BINARY))
    other = _draw_operand(generator)
    while other == code:
        other = _draw_operand(generator)
    pair = [(words, code), (other, other)]
    generator.shuffle(pair)
    words = f"{name} {pair[0][0]} {pair[1][0]}"
    if name in _COMMUTING:
        generator.shuffle(pair)
    code = _BINARY[name](pair[0][1], pair[1][1])
    if generator.random() < 1 / 3:
        outer = generator.choice(sorted(_UNARY))
        words, code = f"{outer} {words}", _UNARY[outer](code)
    return words, code


def _evaluate(code: str, pairs: Sequence[Sequence[int]]) -> list[int]:
    """Values of an expression that was made above."""
    function = eval(f"lambda a, b: {code}", {"__builtins__": {}, "max": max, "min": min})
    return [function(*pair) for pair in pairs]
