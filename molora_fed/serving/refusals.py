"""Who is told that a request or a connection was refused, and how often at most."""

import asyncio
from collections import Counter
from collections.abc import Callable

__all__ = ["FewRefusals", "OnRefusal", "ignore_refusal"]

OnRefusal = Callable[[str, str, int, str], None]
"""Told of a refusal: the address it came from, the path it asked for (empty if it never asked),
the HTTP status (0 if there was none to give), the reason. Paths are as a stranger wrote them."""


def ignore_refusal(address: str, path: str, status: int, reason: str) -> None:
    """Tell nobody."""


class FewRefusals:
    """Passes refusals on, so many in a window of time, and then how many were left out.

    No flood of refusals fills a disk with its log, and none from one address hides the others.
    Call it inside the event loop.

    Args:
        tell: Whom to pass them on to; the count of what was left out has no address, path and
            status.
        most: Refusals of a window.
        most_of_one: Of these, of one address.
        seconds: Length of a window; it begins with a refusal.
    """

    def __init__(
        self, tell: OnRefusal, *, most: int = 60, most_of_one: int = 20, seconds: float = 60.0
    ) -> None:
        self._tell = tell
        self._most, self._most_of_one = most, most_of_one
        self._seconds = seconds
        self._told: Counter[str] = Counter()
        self._left_out = 0

    def __call__(self, address: str, path: str, status: int, reason: str) -> None:
        """Pass one on, or count it."""
        if not self._told:
            asyncio.get_running_loop().call_later(self._seconds, self._end_window)
        if self._told.total() < self._most and self._told[address] < self._most_of_one:
            self._told[address] += 1
            self._tell(address, path, status, reason)
        else:
            self._left_out += 1

    def _end_window(self) -> None:
        left_out, self._left_out = self._left_out, 0
        self._told.clear()
        if left_out:
            self._tell("", "", 0, f"{left_out} more in {self._seconds:g} s")
