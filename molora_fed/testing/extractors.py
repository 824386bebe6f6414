"""Conformance checks of extractors, on texts of all sorts.

`check_extractor_conformance(extract)` is the whole test a plugin's extractor needs.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from molora_fed.cascade.contract import CascadeTask, Extractor
from molora_fed.cascade.escalation import hide_answer
from molora_fed.errors import ConfigError, PluginError
from molora_fed.guard import one_line
from molora_fed.hookspecs import check_callable
from molora_fed.plugins import Plugins, get_plugins
from molora_fed.testing.cascades import build_task
from molora_fed.testing.findings import CheckResult, refuse_broken
from molora_fed.testing.targets import Target, describe_target, examine_target, other_chance

__all__ = ["check_extractor_conformance", "examine_extractor", "reads_own_answers"]

ORDINARY = ("7", "B", "a pear", "The answer is 12.", "1, 2, 3", '{"a": [1, 2]}', "yes\nno")
"""Texts as models say them."""

ODD = (
    "", "\n\n\t", "\0", "\ufeff", "\u202eabc", "e\u0301", "\ufb01\ufb03", "\u01c5 \u00df \u0130",
    "\u0663\u0664 \u06f7", "\u00bd \u2167 \u00b2", "\u22125 \u2044 3", "\U0001f642\u200d",
    "\u6f22\u5b57", "\ud800", "1/0", "1e999", "\\boxed{", "####", "```python\n", "```\n```", "[[[[",
    '{"a": NaN}', "None", "\x1b[31mred",
)  # fmt: skip
"""Texts without sense: white space, marks, digits of other scripts, surrogates, half a syntax."""

REPEATED = ("a", "9", "1,", "[", "```\n", "answer is ", "1/")
"""Pieces that long texts are made of."""

_LENGTHS = (1_000, 8_000, 64_000)  # what is too slow shows at a length that can be waited for

LIMIT_SECONDS = 2.0
"""Processor time for one text, whatever its length."""


def check_extractor_conformance(
    extractor: Any, options: Any = None, *, tasks: Sequence[CascadeTask] = ()
) -> None:
    """Check an extractor against the whole contract.

    Args:
        extractor: What is registered.
        options: None; extractors have no options.
        tasks: Tasks with the details that it needs. If there are none: a plain task, or where it
            refuses that one those of a registered family that names it.

    Raises:
        PluginError: Naming every rule that is broken, with what was found.
    """
    title = describe_target("extractor", extractor)
    results = examine_extractor(extractor, options, tasks=tasks)
    refuse_broken(title, results, page="docs/hooks/extractors.md")


def examine_extractor(
    extractor: Any, options: Any = None, *, tasks: Sequence[CascadeTask] = ()
) -> tuple[CheckResult, ...]:
    """What `check_extractor_conformance` finds, one result a check.

    Args:
        extractor: What is registered.
        options: None; extractors have no options.
        tasks: Tasks with the details that it needs; see there.
    """
    return examine_target(_CHECKS, _Case(extractor, options, tuple(tasks)), contract=check_callable)


def reads_own_answers(extract: Extractor, task: CascadeTask) -> bool:
    """Whether an answer, read as a text, is that answer again: so it is for ordinary texts.

    It is not where answers are of another kind than texts, what a program returns for example.

    Args:
        extract: The extractor.
        task: A task that names it.
    """
    found = [answer for text in ORDINARY if (answer := extract(task, text)) is not None]
    return bool(found) and all(extract(task, answer) == answer for answer in found)


@dataclass(frozen=True)
class _Case(Target):
    given: tuple[CascadeTask, ...] = field(default=())

    @cached_property
    def tasks(self) -> tuple[CascadeTask, ...]:
        """Without their right answers, as an extractor sees them."""
        if self.given:
            return tuple(hide_answer(task) for task in self.given)
        plain = build_task(answer=None)
        try:
            self.make()(plain, ORDINARY[0])
        except ConfigError:  # it needs details that a plain task does not have
            return _find_tasks(self.target, get_plugins()) or (plain,)
        except Exception:  # which the checks report
            return (plain,)
        return (plain,)


def _find_tasks(target: Any, plugins: Plugins) -> tuple[CascadeTask, ...]:
    """Tasks of a registered family that names a registered extractor."""
    registry, families = plugins.extractors, plugins.task_families
    names = set()
    for entry in registry:
        with suppress(PluginError):  # of another plugin, which cannot be loaded
            names |= {entry.name} if registry.resolve(entry.name) is target else set()
    words = {word for name in names for word in name.split("-")}
    # Some families take seconds to draw from: those that share a word with the extractor first.
    for family in sorted(families.names(), key=lambda name: not words & {*name.split("-")}):
        with suppress(Exception):  # another plugin's family, whatever it raises
            tasks = families.resolve(family)(1, 1, 0)
            if tasks[0].extractor in names:
                return tuple(hide_answer(task) for task in tasks)
    return ()


def _list_texts() -> Iterator[tuple[str, str]]:
    """Every text with its name in a message."""
    for text in (*ORDINARY, *ODD):
        yield repr(text), text
    for piece in REPEATED:
        yield f"{piece!r} repeated", piece * (_LENGTHS[0] // len(piece))


def _gives_text_or_nothing_for_any_text(case: _Case) -> str | None:
    extract = case.make()
    for task in case.tasks:
        for what, text in _list_texts():
            try:
                answer = extract(task, text)
            except Exception as error:
                found = f"{type(error).__name__}: {one_line(str(error))}"
                return f"expected an answer or None from {what}, got {found}"
            if answer is not None and not isinstance(answer, str):
                return f"expected text or None from {what}, got {type(answer).__name__}"
    return None


def _follows_from_the_text(case: _Case) -> str | None:
    texts = list(_list_texts())
    for task in case.tasks:
        found = []
        for chance, order in ((0, texts), (991, texts[::-1])):
            extract = case.make()
            with other_chance(chance):
                found.append({what: extract(task, text) for what, text in order})
        differing = [what for what in found[0] if found[0][what] != found[1][what]]
        if differing:
            return f"expected the same answer from the same text, got another from {differing[0]}"
    return None


def _does_not_know_the_right_answer(case: _Case) -> str | None:
    """A run hides it: an extractor that looks for it would answer otherwise when it is replayed."""
    extract = case.make()
    for task in case.given:
        for what, text in _list_texts():
            if extract(task, text) != extract(hide_answer(task), text):
                return f"expected an answer that the right one does not change, got one from {what}"
    return None


def _reads_its_answers_again(case: _Case) -> str | None:
    extract = case.make()
    for task in case.tasks:
        if not reads_own_answers(extract, task):
            continue
        for what, text in _list_texts():
            answer = extract(task, text)
            if answer is not None and (again := extract(task, answer)) != answer:
                return (
                    f"expected the canonical answer from {what} to be itself when it is read "
                    f"again, as it is from ordinary texts, got {one_line(repr(again), 60)} from "
                    f"{one_line(repr(answer), 60)}"
                )
    return None


def _takes_bounded_time(case: _Case) -> str | None:
    extract, task = case.make(), case.tasks[0]
    for piece in REPEATED:
        for length in _LENGTHS:
            text = piece * (length // len(piece))
            started = time.process_time()
            extract(task, text)
            spent = time.process_time() - started
            if spent > LIMIT_SECONDS:
                return (
                    f"expected at most {LIMIT_SECONDS:g} s for a text, got {spent:.1f} s for "
                    f"{piece!r} repeated to {length} characters"
                )
    return None


_CHECKS: tuple[Callable[[_Case], str | None], ...] = (
    _gives_text_or_nothing_for_any_text,
    _follows_from_the_text,
    _does_not_know_the_right_answer,
    _reads_its_answers_again,
    _takes_bounded_time,
)
