"""Conformance checks of task families.

`check_task_family_conformance(family)` is the whole test a plugin's task family needs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from molora_fed.cascade.contract import TASK_SPLITS, CascadeTask, TaskFamily
from molora_fed.cascade.escalation import hide_answer
from molora_fed.cascade.task_files import hash_tasks
from molora_fed.errors import ConfigError, MoloraError
from molora_fed.hookspecs import check_callable
from molora_fed.plugins import Plugins, get_plugins
from molora_fed.testing.extractors import reads_own_answers
from molora_fed.testing.findings import CheckResult, refuse_broken
from molora_fed.testing.targets import Target, describe_target, examine_target, other_chance

__all__ = ["check_task_family_conformance", "examine_task_family"]

COUNT = 4
_LEVELS = range(1, 5)
_SEEDS = (0, 1)


def check_task_family_conformance(
    family: Any, options: Any = None, *, plugins: Plugins | None = None
) -> None:
    """Check a task family against the whole contract, at its first four levels.

    Args:
        family: What is registered.
        options: None; families have no options.
        plugins: Where its extractor is registered; the installed ones if None.

    Raises:
        PluginError: Naming every rule that is broken, with what was found.
    """
    title = describe_target("task family", family)
    results = examine_task_family(family, options, plugins=plugins)
    refuse_broken(title, results, page="docs/hooks/task-families.md")


def examine_task_family(
    family: Any, options: Any = None, *, plugins: Plugins | None = None
) -> tuple[CheckResult, ...]:
    """What `check_task_family_conformance` finds, one result a check.

    Args:
        family: What is registered.
        options: None; families have no options.
        plugins: Where its extractor is registered; the installed ones if None.
    """
    case = _Case(family, options, get_plugins() if plugins is None else plugins)
    return examine_target(_CHECKS, case, contract=check_callable)


@dataclass(frozen=True)
class _Draw:
    level: int
    split: str
    seed: int
    tasks: list[CascadeTask]

    def __str__(self) -> str:
        return f"level {self.level}, split {self.split}, seed {self.seed}"


@dataclass(frozen=True)
class _Case(Target):
    plugins: Plugins | None = None

    def draw_all(self, *, splits: tuple[Any, ...] = TASK_SPLITS) -> Iterator[_Draw]:
        """Tasks of every level there is, of every split, by two seeds."""
        family: TaskFamily = self.make()
        for level in _LEVELS:
            for split in splits:
                for seed in _SEEDS:
                    try:
                        tasks = list(family(level, COUNT, seed, split))
                    except ConfigError:
                        if level == 1:  # which every family has
                            raise
                        return
                    yield _Draw(level, split, seed, tasks)


def _draws_as_many_tasks_as_asked(case: _Case) -> str | None:
    for draw in case.draw_all():
        strange = [type(one).__name__ for one in draw.tasks if not isinstance(one, CascadeTask)]
        if strange or len(draw.tasks) != COUNT:
            found = f"{len(draw.tasks)}, of {', '.join(sorted(set(strange))) or 'CascadeTask'}"
            return f"expected {COUNT} CascadeTasks at {draw}, got {found}"
    family = case.make()
    for count in (0, 1):
        if (got := len(list(family(1, count, 0, "test")))) != count:
            return f"expected {count} tasks where that many are asked, got {got}"
    return None


def _gives_the_same_tasks_for_the_same_arguments(case: _Case) -> str | None:
    hashes = []
    for chance in (0, 991):
        with other_chance(chance):
            hashes.append({str(draw): hash_tasks(draw.tasks) for draw in case.draw_all()})
    differing = [name for name in hashes[0] if hashes[0][name] != hashes[1].get(name)]
    if differing:
        return f"expected the same tasks at {differing[0]}, got others"
    family = case.make()
    if hash_tasks(family(1, COUNT, 0)) != hash_tasks(family(1, COUNT, 0, "test")):
        return "expected the split 'test' where none is named, got another"
    return None


def _keeps_a_prompt_in_one_split(case: _Case) -> str | None:
    split_of: dict[str, str] = {}
    for draw in case.draw_all():
        for task in draw.tasks:
            known = split_of.setdefault(task.prompt, draw.split)
            if known != draw.split:
                return (
                    f"expected a prompt in one split whatever the seed and level, got "
                    f"{task.prompt[:80]!r} in {known} and {draw.split}"
                )
    return None


def _repeats_no_prompt_that_is_measured(case: _Case) -> str | None:
    for draw in case.draw_all(splits=TASK_SPLITS[1:]):  # those of the train split may repeat
        prompts = [task.prompt for task in draw.tasks]
        if len(set(prompts)) < len(prompts):
            return f"expected different prompts at {draw}, got one twice"
    return None


def _names_every_task(case: _Case) -> str | None:
    ids: dict[tuple[str, int], list[str]] = {}
    for draw in case.draw_all():
        known = ids.setdefault((draw.split, draw.seed), [])
        for task in draw.tasks:
            if task.id in known or not task.id:
                return f"expected ids that differ over all levels, got {task.id!r} twice at {draw}"
            known.append(task.id)
            if task.level != draw.level or not task.family:
                found = f"level {task.level} of {task.family!r}"
                return f"expected tasks of a named family at {draw}, got {found}"
    return None


def _refuses_levels_it_lacks(case: _Case) -> str | None:
    try:
        case.make()(0, 1, 0, "test")
    except ConfigError:
        return None
    return "expected ConfigError at level 0, got tasks"


def _knows_answers_that_its_extractor_gives(case: _Case) -> str | None:
    plugins = case.plugins or get_plugins()
    texts: dict[str, bool] = {}
    for draw in case.draw_all(splits=("test",)):
        for task in draw.tasks:
            if not isinstance(task.answer, str):
                return f"expected a known answer at {draw}, got {task.answer!r}"
            try:
                extract = plugins.extractors.resolve(task.extractor)
            except MoloraError as error:
                return f"expected a registered extractor, got '{task.extractor}': {error}"
            hidden = hide_answer(task)
            if task.extractor not in texts:
                texts[task.extractor] = reads_own_answers(extract, hidden)
            if texts[task.extractor] and (found := extract(hidden, task.answer)) != task.answer:
                return (
                    f"expected the canonical answer of extractor '{task.extractor}' at {draw}, "
                    f"got {task.answer[:80]!r}, of which it makes {found!r}"
                )
    return None


_CHECKS: tuple[Callable[[_Case], str | None], ...] = (
    _draws_as_many_tasks_as_asked,
    _gives_the_same_tasks_for_the_same_arguments,
    _keeps_a_prompt_in_one_split,
    _repeats_no_prompt_that_is_measured,
    _names_every_task,
    _refuses_levels_it_lacks,
    _knows_answers_that_its_extractor_gives,
)
