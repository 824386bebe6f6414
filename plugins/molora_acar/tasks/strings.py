"""String operations on made-up words."""

import random
import string
from collections.abc import Callable, Mapping

from molora_acar.tasks.problems import Problem

__all__ = ["make_string"]

_OPERATIONS: Mapping[str, Callable[[str], str]] = {
    "reverse": lambda word: word[::-1],
    "double": lambda word: "".join(letter * 2 for letter in word),
    "rotate": lambda word: word[1:] + word[0],
    "swap": lambda word: word[-1] + word[1:-1] + word[0],
    "odd": lambda word: word[::2],
}


def make_string(generator: random.Random, level: int) -> Problem:
    """A word of `level` + 3 letters and what to do with it; from level 3 on, two things in turn.

    Args:
        generator: Source of chance.
        level: Difficulty.
    """
    word = "".join(generator.choice(string.ascii_lowercase) for _ in range(level + 3))
    names = [generator.choice(sorted(_OPERATIONS)) for _ in range(1 if level < 3 else 2)]
    answer = word
    for name in names:
        answer = _OPERATIONS[name](answer)
    return Problem(f"{' '.join(names)} {word}:", answer, answer)
