"""Which phase a whole federation is in, told from its events, and the time each phase takes."""

import time
from collections.abc import Iterable

from molora_fed.federation.events import FederationEvent
from molora_fed.reporting.phases import BUDGET_SECONDS

__all__ = ["PhaseClock"]

_ORDER = ("JOINING", "CORPUS", "TRAINING", "SUBMITTING", "SUBMITTED", "ADMITTED", "DONE")
_SLOWEST = ("starting", "corpus", "training", "admission")
"""The phase while the slowest contributor is at this place of the order."""


class PhaseClock:
    """Measures wall-clock time by phase; contributors work side by side, the slowest counts.

    Args:
        contributors: Names of all that take part.
    """

    def __init__(self, contributors: Iterable[str] = ()) -> None:
        self._places = dict.fromkeys(contributors, 0)
        self._server_phase = ""
        self._server_message = ""
        self._since = time.monotonic()
        self.phase = ""
        self.seconds: dict[str, float] = {}

    def enter(self, phase: str) -> None:
        """Begin a phase; the time since the last one counts for that. Empty ends the last."""
        now = time.monotonic()
        if self.phase:
            self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self._since
        self._since, self.phase = now, phase

    def observe(self, event: FederationEvent) -> None:
        """Take in what a server or a contributor reports."""
        if event.contributor:
            if event.contributor in self._places and event.phase in _ORDER:
                place = _ORDER.index(event.phase)
                self._places[event.contributor] = max(place, self._places[event.contributor])
        elif not event.problem:
            self._server_phase, self._server_message = event.phase, event.message
        phase = self._find()
        if phase != self.phase:
            self.enter(phase)

    def _find(self) -> str:
        is_fusing = self._server_phase in ("FUSING", "GROWING")
        if is_fusing and self._server_message in BUDGET_SECONDS:
            return self._server_message
        if self._server_phase == "PUBLISHED":
            return "delivery"
        if is_fusing or self._server_phase == "STOPPED":
            return self.phase
        slowest = min(self._places.values(), default=0)
        return _SLOWEST[min(slowest, len(_SLOWEST) - 1)]
