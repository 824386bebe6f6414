"""What the supervisors report while they run, for whoever draws it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

__all__ = ["FederationEvent", "OnEvent"]


@dataclass(frozen=True)
class FederationEvent:
    """One thing that changed.

    Attributes:
        phase: Phase of the cooperative (RECRUITING, TRAINING, FUSING, PUBLISHED), or of the
            contributor's worker (JOINING, CORPUS, TRAINING, SUBMITTING, SUBMITTED, ADMITTED,
            EVOLVING, QUARANTINED, REJECTED, DONE) if `contributor` is given; STARTING before,
            STOPPED after.
        contributor: Name of the contributor it is about; empty for the server.
        state: State of the contribution in the ledger (RECEIVED to WITHDRAWN), empty before.
        step: Steps done of the current work; None if it has no steps.
        total: Steps in all; None likewise.
        loss: Last reported loss, nats per token.
        eta_seconds: Estimated seconds left of the current work.
        message: One line for people; empty if the fields say it all.
        problem: True if the message is bad news that is being retried.
        seen_by: Who reports it: the server (of a contributor, what its last message said), or
            the contributor itself.
    """

    phase: str
    contributor: str = ""
    state: str = ""
    step: int | None = None
    total: int | None = None
    loss: float | None = None
    eta_seconds: float | None = None
    message: str = ""
    problem: bool = False
    seen_by: Literal["server", "contributor"] = "server"


OnEvent = Callable[[FederationEvent], None]
