"""What checks of a contract find: one that raises is a finding like any other."""

from collections.abc import Callable, Iterable
from typing import TypeVar

from molora_fed.guard import one_line

__all__ = ["run_checks"]

Case = TypeVar("Case")


def run_checks(checks: Iterable[Callable[[Case], str | None]], case: Case) -> list[str]:
    """All that is wrong, one text each.

    Args:
        checks: Each describes what it found wrong, or gives None.
        case: What they look at.
    """
    found = []
    for check in checks:
        try:
            text = check(case)
        except Exception as error:  # whatever a stranger's code raises
            what = check.__name__.strip("_").replace("_", " ")
            text = f"expected '{what}', got {type(error).__name__}: {one_line(str(error))}"
        if text is not None:
            found.append(text)
    return found
