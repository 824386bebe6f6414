"""What checks of a contract find: one that raises is a finding like any other."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from molora_fed.errors import PluginError
from molora_fed.guard import one_line

__all__ = [
    "CheckResult",
    "Remark",
    "describe_raised",
    "examine",
    "refuse_broken",
]

Case = TypeVar("Case")


class Remark(str):
    """What a check says although nothing is wrong, e.g. a figure it measured."""


@dataclass(frozen=True)
class CheckResult:
    """What one check of a conformance kit found.

    Attributes:
        name: What it checks, in a few words: "gates are distributions".
        problem: "expected ..., got ..."; None if nothing is wrong.
        remark: What it says although nothing is wrong; empty if nothing.
    """

    name: str
    problem: str | None = None
    remark: str = ""


def examine(checks: Iterable[Callable[[Case], str | None]], case: Case) -> tuple[CheckResult, ...]:
    """Run all checks; one that raises has found something, and the others go on.

    Args:
        checks: Each describes what it found wrong, or gives None or a `Remark`.
        case: What they look at.
    """
    found = []
    for check in checks:
        name = check.__name__.strip("_").replace("_", " ")
        try:
            said = check(case)
        except (Exception, SystemExit) as error:  # whatever a stranger's code raises
            said = f"expected '{name}', got {describe_raised(error)}"
        if isinstance(said, Remark):
            found.append(CheckResult(name, None, str(said)))
        else:
            found.append(CheckResult(name, said))
    return tuple(found)


def describe_raised(error: BaseException) -> str:
    """Class and text of an error in one line; an error may fail to describe itself."""
    try:
        text = one_line(str(error))
    except Exception:
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def refuse_broken(title: str, results: Sequence[CheckResult], *, page: str) -> None:
    """Raise if any check found something.

    Args:
        title: What was checked, e.g. "Router 'MyRouter'".
        results: What the checks found.
        page: Page of the documentation that has the contract.

    Raises:
        PluginError: Naming every rule that is broken, with what was found.
    """
    broken = [result.problem for result in results if result.problem is not None]
    if broken:
        raise PluginError(f"{title} breaks its contract: {'; '.join(broken)}. See {page}.")
