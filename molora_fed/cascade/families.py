"""Task families: generators of tasks with known answers, for suites that need no download."""

from collections.abc import Sequence
from typing import Literal, Protocol, get_args

from molora_fed.cascade.contract import CascadeTask
from molora_fed.errors import ConfigError
from molora_fed.plugins import Plugins

__all__ = [
    "TASK_SPLITS",
    "TaskFamily",
    "TaskSplit",
    "draw_tasks",
    "parse_levels",
]

TaskSplit = Literal["train", "validation", "calibration", "test"]
"""What tasks are for: models train on the first, recipes are chosen on the second, escalation
policies are fitted on the third, results are reported on the last."""

TASK_SPLITS: tuple[TaskSplit, ...] = get_args(TaskSplit)


class TaskFamily(Protocol):
    """Generates the tasks of a family, registered by `register_task_families`.

    The same arguments give the same tasks. A prompt belongs to one split, whatever seed and level
    it is drawn with: no prompt that anybody is tested on occurs in training. Levels differ in
    difficulty, 1 is the easiest.
    """

    def __call__(
        self, level: int, count: int, seed: int, split: TaskSplit = "test"
    ) -> Sequence[CascadeTask]:
        """Draw tasks with their answers; prompts differ, those of the train split may repeat.

        Args:
            level: Difficulty, at least 1.
            count: Tasks wanted.
            seed: Seed.
            split: What they are for.

        Raises:
            ConfigError: If the family has no such level, or too few different prompts at it.
        """


def parse_levels(text: str) -> tuple[int, ...]:
    """Levels from text, e.g. "1,2".

    Raises:
        ConfigError: If it says anything else than whole numbers from 1.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise ConfigError(
            f"Cannot read levels '{text}': expected whole numbers from 1, separated by commas, "
            "got something else. Write e.g. 1,2."
        )
    return tuple(dict.fromkeys(int(part) for part in parts))


def draw_tasks(
    families: Sequence[str],
    levels: Sequence[int],
    *,
    count: int,
    seed: int,
    split: str,
    plugins: Plugins,
) -> list[CascadeTask]:
    """Tasks of several families and levels, by family, then by level.

    Args:
        families: Registered names.
        levels: Difficulties.
        count: Tasks of each family and level.
        seed: Seed.
        split: What they are for.
        plugins: Where families are looked up.

    Raises:
        ConfigError: If there is no such split, or a family cannot draw that many.
        UnknownNameError: If no plugin registers a family.
    """
    if split not in TASK_SPLITS:
        raise ConfigError(
            f"Cannot draw tasks: expected one of the splits {', '.join(TASK_SPLITS)}, got "
            f"'{split}'. Choose one of these."
        )
    drawn: list[CascadeTask] = []
    for name in families:
        family = plugins.task_families.resolve(name)
        for level in levels:
            drawn.extend(family(level, count, seed, split))
    return drawn
