"""When a server stops waiting: contributions expected, a quorum, and a clock that nobody can set.

The deadline counts seconds since the server first opened. While it runs they are counted by a clock
that only goes forward, so that setting the machine's clock changes nothing; the time between two
runs is what the machine's clock says, and never less than nothing.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from molora_fed.charter import Amendment, Charter
from molora_fed.errors import StorageError
from molora_fed.federation.mailbox import read_json
from molora_fed.storage.files import write_json

__all__ = ["MIN_CONTRIBUTIONS", "Patience", "count_least", "count_needed", "count_quorum"]

MIN_CONTRIBUTIONS = 2
"""Contributions that a fusion waits for where the charter says nothing else."""
NOTE_SECONDS = 60.0
"""The seconds that have passed are written at most this often."""


def count_least(charter: Charter) -> int:
    """Fewest contributions that can be fused: a masked total is of three members at least."""
    return charter.identity.privacy_rules.min_members if charter.is_summed else 1


def count_quorum(amendment: Amendment) -> int:
    """Contributions without which not even the deadline fuses, at least one."""
    if amendment.quorum:
        return amendment.quorum
    return min(MIN_CONTRIBUTIONS, amendment.expected or MIN_CONTRIBUTIONS)


def count_needed(amendment: Amendment) -> int:
    """Contributions to wait for: as the amendment says, or one for each domain."""
    needed = amendment.expected or max(MIN_CONTRIBUTIONS, len(amendment.domains))
    return max(needed, count_quorum(amendment))


def _tick() -> float:
    """Seconds of a clock that goes forward only, and on while the machine sleeps if it can."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Patience:
    """Says whether a server still waits for contributions, over restarts.

    Args:
        path: Where the seconds that have passed are kept.
        amendment: What counts.
        now: Seconds since 1970, by the machine's clock.
        tick: Seconds of a clock that goes forward only.
        least: Fewest contributions that can be fused.
    """

    def __init__(
        self,
        path: Path,
        amendment: Amendment,
        *,
        now: Callable[[], float] = time.time,
        tick: Callable[[], float] = _tick,
        least: int = 1,
    ) -> None:
        self._quorum = max(least, count_quorum(amendment))
        self._needed = max(least, count_needed(amendment))
        self._path = path
        self._amendment = amendment
        self._now, self._tick = now, tick
        self._opened, self._passed = self._read()
        self._since = self._noted = tick()
        with suppress(StorageError):  # on a full disk the machine's clock stands in
            self._note()

    def _read(self) -> tuple[float, float]:
        """When the server first opened, and the seconds that have passed since."""
        now = self._now()
        kept = read_json(self._path)
        kept = kept if isinstance(kept, dict) else {}
        opened, passed, noted = (kept.get(key) for key in ("time", "passed", "noted"))
        if not isinstance(opened, int | float):
            return now, 0.0
        if not (isinstance(passed, int | float) and isinstance(noted, int | float)):
            passed, noted = 0.0, opened  # an earlier version kept the opening alone
        return float(opened), float(passed) + max(0.0, now - noted)

    def _note(self) -> None:
        kept = {"time": self._opened, "passed": self.count_seconds(), "noted": self._now()}
        write_json(self._path, kept)
        self._noted = self._tick()

    def count_seconds(self) -> float:
        """Seconds since the server first opened."""
        return self._passed + self._tick() - self._since

    def is_late(self) -> bool:
        """Whether the deadline has passed; call it now and then, it keeps the time.

        Raises:
            StorageError: On I/O errors.
        """
        deadline = self._amendment.deadline_seconds
        if not deadline:
            return False
        if self._tick() - self._noted >= NOTE_SECONDS:
            self._note()
        return self.count_seconds() >= deadline

    def is_enough(self, num_admitted: int) -> bool:
        """Whether so many contributions are to be fused now.

        Raises:
            StorageError: On I/O errors.
        """
        if num_admitted >= self._needed:
            return True
        return num_admitted >= self._quorum and self.is_late()

    def describe(self, num_admitted: int, *, is_settled: bool) -> str:
        """What there is and what is missing, in one line.

        Args:
            num_admitted: Contributions admitted.
            is_settled: Whether a first fusion was published: nobody is waited for then.

        Raises:
            StorageError: On I/O errors.
        """
        count = f"{num_admitted} of {self._needed} contributions admitted"
        quorum = self._quorum
        if is_settled or num_admitted >= quorum or not self.is_late():
            return count
        return (
            f"{count}; the deadline has passed, and the quorum is {quorum}: waiting for "
            f"{quorum - num_admitted} more"
        )
