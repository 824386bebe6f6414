"""Task families: generators of tasks with known answers, for suites that need no download."""

from collections.abc import Sequence
from typing import Literal, Protocol, get_args

from molora_fed.cascade.contract import CascadeTask

__all__ = ["TASK_SPLITS", "TaskFamily", "TaskSplit"]

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
