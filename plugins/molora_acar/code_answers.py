"""Code as an answer: two programs agree if they return the same on the inputs of the task.

What the right values are never enters the sandbox: a program cannot claim to have passed, and a
policy cannot read from a canonical answer whether it is right.
"""

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from molora_acar.sandbox import run_function
from molora_acar.sandbox_child import describe_value
from molora_fed.cascade.contract import CascadeTask
from molora_fed.errors import ConfigError
from molora_fed.storage.files import canonical_json

__all__ = ["MAX_PROGRAM", "extract_code", "format_outcomes"]

MAX_PROGRAM = 20_000
"""Characters of a program; a longer one is no answer."""

_MAX_TESTS = 100
_FENCE = re.compile(r"```[ \t]*[\w+-]*[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


def extract_code(task: CascadeTask, text: str) -> str | None:
    """What a task's function returns on each of its tests, as a canonical JSON list of texts.

    A value is its Python text (`format_outcomes`), an exception "!" and its name. The test in which
    a program was killed is "!killed: network" (or "time", "memory", "processes", "files", "output",
    ...), those after it "!not run". A text that is no Python has no answer.

    Args:
        task: `details["function"]` is the function's name, `details["tests"]` a list of objects
            with the list "arguments"; `details["before"]`, if there, is text put before the
            sample's, so that a model may answer with an expression alone.
        text: A sample; the last fenced block of it if it has one.

    Raises:
        ConfigError: If the task has no such tests, or this machine cannot lock a program down.
    """
    function, before = task.details.get("function"), task.details.get("before", "")
    tests: Any = task.details.get("tests")
    if not isinstance(function, str) or not isinstance(before, str) or not _are_tests(tests):
        raise ConfigError(
            f"Cannot check code for task '{task.id}': expected details with 'function' and 1 to "
            f"{_MAX_TESTS} 'tests' with 'arguments', got {sorted(task.details)}. Correct the task."
        )
    blocks = _FENCE.findall(text)
    shown = blocks[-1] if blocks else text
    source = before + (shown.strip() if before else shown)
    if not shown.strip() or len(source) > MAX_PROGRAM or "\0" in source:
        return None
    arguments = canonical_json([one["arguments"] for one in tests]).decode()
    return _run_cached(source, function, arguments)


def format_outcomes(values: Sequence[Any]) -> str:
    """The canonical answer of a program that returns these values: what a task states as right.

    Args:
        values: Of each test, plain values.
    """
    return canonical_json([describe_value(value) for value in values]).decode()


def _are_tests(tests: Any) -> bool:
    return (
        isinstance(tests, list | tuple)
        and 0 < len(tests) <= _MAX_TESTS
        and all(isinstance(one, dict) and isinstance(one.get("arguments"), list) for one in tests)
    )


@lru_cache(maxsize=4096)
def _run_cached(source: str, function: str, arguments: str) -> str | None:
    """The same program is run once: small models repeat themselves."""
    tests = json.loads(arguments)
    report = run_function(source, function, tests)
    if not report.compiled:
        return None
    outcomes = list(report.outcomes)
    if report.stopped is not None and len(outcomes) < len(tests):
        outcomes.append(f"!killed: {report.stopped}")
    outcomes += ["!not run"] * (len(tests) - len(outcomes))
    return canonical_json(outcomes).decode()
