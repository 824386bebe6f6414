"""The task families as `register_task_families` wants them, and what models are trained on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from molora_acar.tasks.arithmetic import make_arithmetic
from molora_acar.tasks.choices import make_choice
from molora_acar.tasks.code import make_code
from molora_acar.tasks.logic import make_logic
from molora_acar.tasks.problems import Problem, ProblemMaker, draw_problems
from molora_acar.tasks.sequences import make_sequence
from molora_acar.tasks.sorting import make_sorting
from molora_acar.tasks.strings import make_string
from molora_fed.cascade.contract import CascadeTask, TaskSplit

__all__ = [
    "FAMILIES",
    "Family",
    "arithmetic",
    "choices",
    "code",
    "logic",
    "sequences",
    "sorting",
    "strings",
]


@dataclass(frozen=True)
class Family:
    """A family of tasks.

    Attributes:
        name: Registered name.
        make: Draws one problem.
        extractor: Registered extractor of its answers.
    """

    name: str
    make: ProblemMaker
    extractor: str

    def draw(self, level: int, count: int, seed: int, split: TaskSplit) -> list[Problem]:
        """Problems with their solutions; see `molora_acar.tasks.problems.draw_problems`."""
        return draw_problems(self.make, self.name, level, count, seed, split)

    def __call__(
        self, level: int, count: int, seed: int, split: TaskSplit = "test"
    ) -> Sequence[CascadeTask]:
        """Tasks; ids say family, level, split, seed and place.

        Args:
            level: Difficulty, at least 1.
            count: Tasks wanted.
            seed: Seed.
            split: What they are for.

        Raises:
            ConfigError: If there is no such level, or too few different prompts at it.
        """
        return [
            CascadeTask(
                id=f"{self.name}-{level}-{split}-{seed}-{place}",
                family=self.name,
                prompt=problem.prompt,
                extractor=self.extractor,
                answer=problem.answer,
                level=level,
                details=problem.details,
            )
            for place, problem in enumerate(self.draw(level, count, seed, split))
        ]


arithmetic = Family("arithmetic", make_arithmetic, "number")
choices = Family("choices", make_choice, "choice-letter")
code = Family("code", make_code, "code-tests")
logic = Family("logic", make_logic, "normalised-text")
sequences = Family("sequences", make_sequence, "number")
sorting = Family("sorting", make_sorting, "normalised-text")
strings = Family("strings", make_string, "normalised-text")

FAMILIES: Mapping[str, Family] = {
    one.name: one for one in (arithmetic, choices, code, logic, sequences, sorting, strings)
}
