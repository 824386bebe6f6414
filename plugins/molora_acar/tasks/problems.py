"""Problems, and the splits they fall into: no prompt of one split ever occurs in another.

The split of a prompt is a function of its text alone. Whatever seeds and counts somebody draws,
and however often, what models are trained on holds no prompt that anybody is tested on.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from molora_fed.cascade.contract import TaskSplit
from molora_fed.errors import ConfigError
from molora_fed.storage.files import hash_bytes

__all__ = ["Problem", "ProblemMaker", "compute_split", "draw_problems"]

MEASURED: tuple[TaskSplit, ...] = ("test", "calibration", "validation")
PARTS = 10  # one for each of these, the others train
MAX_TRIES = 2000  # for one problem: of an easy level, most prompts are taken after a while


@dataclass(frozen=True)
class Problem:
    """A prompt with its solution.

    Attributes:
        prompt: What a model reads.
        solution: A text that solves it: what models are trained to write.
        answer: Canonical answer: what the extractor makes of the solution.
        details: What the extractor needs beside, JSON values.
    """

    prompt: str
    solution: str
    answer: str
    details: Mapping[str, Any] = field(default_factory=dict)


ProblemMaker = Callable[[random.Random, int], Problem]
"""Draws a problem of a level, for any split."""


def compute_split(text: str) -> TaskSplit:
    """The split of a text, by its SHA-256: train for seven of ten, the others one each."""
    part = int(hash_bytes(text.encode())[:16], 16) % PARTS
    return MEASURED[part] if part < len(MEASURED) else "train"


def draw_problems(
    make: ProblemMaker, family: str, level: int, count: int, seed: int, split: TaskSplit
) -> list[Problem]:
    """Draw problems of a split; each prompt once, unless they are for training.

    Args:
        make: Draws one problem.
        family: Its family; decides the random numbers together with all below.
        level: Difficulty from 1.
        count: Problems wanted.
        seed: Seed.
        split: Split they belong to.

    Raises:
        ConfigError: If there is no such level, or it has fewer different prompts.
    """
    what = f"Cannot draw {count} tasks of family '{family}' at level {level}"
    if level < 1 or count < 0:
        raise ConfigError(
            f"{what}: expected a level from 1 and a count from 0, got {level} and {count}. "
            "Correct these."
        )
    generator = random.Random(f"{family} {level} {seed} {split}")
    found: list[Problem] = []
    seen: set[str] = set()
    tries = 0
    while len(found) < count:
        problem = make(generator, level)
        tries += 1
        is_new = split == "train" or problem.prompt not in seen
        if is_new and compute_split(problem.prompt) == split:
            seen.add(problem.prompt)
            found.append(problem)
            tries = 0
        elif tries > MAX_TRIES:
            raise ConfigError(
                f"{what}: expected as many different prompts, got {len(found)}. Ask for fewer, or "
                "for another level."
            )
    return found
