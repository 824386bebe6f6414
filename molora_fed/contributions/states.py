"""States of a contribution and of a cooperative, and the only ways from one to the next."""

from collections.abc import Mapping
from enum import StrEnum

__all__ = [
    "CONTRIBUTION_TRANSITIONS",
    "COOPERATIVE_TRANSITIONS",
    "ContributionState",
    "CooperativeState",
]


class ContributionState(StrEnum):
    """Where a contribution stands; it only moves forward.

    RECEIVED: manifest and signature are in the ledger, files may still be missing.
    VERIFIED: every file is stored and is the one that was signed.
    ADMITTED, QUARANTINED, REJECTED: what admission decided.
    WITHDRAWN: taken back after it was admitted.
    """

    RECEIVED = "RECEIVED"
    VERIFIED = "VERIFIED"
    ADMITTED = "ADMITTED"
    QUARANTINED = "QUARANTINED"
    REJECTED = "REJECTED"
    WITHDRAWN = "WITHDRAWN"


class CooperativeState(StrEnum):
    """Where a cooperative stands."""

    CREATED = "CREATED"
    RECRUITING = "RECRUITING"
    TRAINING = "TRAINING"
    FUSING = "FUSING"
    PUBLISHED = "PUBLISHED"
    GROWING = "GROWING"


_C = ContributionState
CONTRIBUTION_TRANSITIONS: Mapping[ContributionState, frozenset[ContributionState]] = {
    _C.RECEIVED: frozenset({_C.VERIFIED}),
    _C.VERIFIED: frozenset({_C.ADMITTED, _C.QUARANTINED, _C.REJECTED}),
    _C.ADMITTED: frozenset({_C.WITHDRAWN}),
    _C.QUARANTINED: frozenset(),
    _C.REJECTED: frozenset(),
    _C.WITHDRAWN: frozenset(),
}
"""From each state, the states that may follow."""

_O = CooperativeState
COOPERATIVE_TRANSITIONS: Mapping[CooperativeState, frozenset[CooperativeState]] = {
    _O.CREATED: frozenset({_O.RECRUITING}),
    _O.RECRUITING: frozenset({_O.TRAINING}),
    _O.TRAINING: frozenset({_O.FUSING}),
    _O.FUSING: frozenset({_O.PUBLISHED}),
    _O.PUBLISHED: frozenset({_O.GROWING}),
    _O.GROWING: frozenset({_O.PUBLISHED}),
}
"""From each state, the states that may follow; a re-fusion happens while GROWING."""
