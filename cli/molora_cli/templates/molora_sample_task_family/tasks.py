"""The task family: tasks whose answers are known."""

import hashlib
import random
import string
from collections.abc import Sequence

from molora_fed import CascadeTask
from molora_fed.cascade.contract import TaskSplit
from molora_fed.errors import ConfigError

MEASURED: tuple[TaskSplit, ...] = ("test", "calibration", "validation")
MAX_TRIES = 10_000


def draw(level: int, count: int, seed: int, split: TaskSplit = "test") -> Sequence[CascadeTask]:
    """Draw tasks with their answers: the one function to fill in.

    The same arguments give the same tasks. A prompt belongs to one split, whatever the seed, so
    that nobody is tested on a prompt that a model was trained on.

    Args:
        level: Difficulty, at least 1; here, letters of a word less two.
        count: Tasks wanted.
        seed: Of the random numbers.
        split: What they are for.

    Returns:
        As many tasks with different prompts; `extractor` names who makes answers canonical.

    Raises:
        ConfigError: If there is no such level, or it has too few different prompts.

    See docs/hooks/task-families.md, and docs/tasks.md.
    """
    if level < 1:
        raise ConfigError(f"Cannot draw tasks: expected a level from 1, got {level}. Raise it.")
    source = random.Random(f"sample-task-family {level} {seed} {split}")
    words: dict[str, None] = {}
    for _ in range(MAX_TRIES + 100 * count):
        if len(words) == count:
            break
        word = "".join(source.choices(string.ascii_lowercase, k=level + 2))
        if find_split(word) == split:
            words[word] = None
    if len(words) < count:
        raise ConfigError(
            f"Cannot draw tasks of level {level}: expected {count} different words, got "
            f"{len(words)}. Ask for fewer, or for a higher level."
        )
    return [
        CascadeTask(
            id=f"sample-task-family-{level}-{split}-{seed}-{place}",
            family="sample-task-family",
            prompt=f"spell {word} backwards:",
            extractor="normalised-text",
            answer=word[::-1],
            level=level,
        )
        for place, word in enumerate(words)
    ]


def find_split(word: str) -> TaskSplit:
    """The split of a word, by its SHA-256: train for seven of ten, the others one each."""
    part = hashlib.sha256(word.encode()).digest()[0] % 10
    return MEASURED[part] if part < len(MEASURED) else "train"
