"""States of contributions and cooperatives, their transitions, and the ledger's tables."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

__all__ = [
    "APPLICATION_ID",
    "CONTRIBUTION_TRANSITIONS",
    "COOPERATIVE_TRANSITIONS",
    "FORMAT_VERSION",
    "ContributionState",
    "CooperativeState",
    "build_statements",
    "build_transition_rules",
]


class ContributionState(StrEnum):
    """Where a contribution stands; docs/protocol.md says which command leaves each state.

    RECEIVED: manifest and signature are in the ledger, files may still be missing.
    VERIFIED: every file is stored and is the one that was signed.
    ADMITTED, QUARANTINED, REJECTED: what admission decided; a fusion that cannot use an admitted
        one quarantines it, and a person may have the other two judged again.
    WITHDRAWN: taken back, its files deleted; nothing leaves it.
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
    _C.RECEIVED: frozenset({_C.VERIFIED, _C.REJECTED}),
    _C.VERIFIED: frozenset({_C.ADMITTED, _C.QUARANTINED, _C.REJECTED}),
    _C.ADMITTED: frozenset({_C.WITHDRAWN, _C.QUARANTINED}),
    _C.QUARANTINED: frozenset({_C.ADMITTED, _C.REJECTED, _C.WITHDRAWN}),
    _C.REJECTED: frozenset({_C.ADMITTED, _C.QUARANTINED}),
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


FORMAT_VERSION = 1
APPLICATION_ID = 0x4D4C4644  # "MLFD": tells a ledger from any other SQLite file.

_TABLES = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT",
    """CREATE TABLE contributors (
        name TEXT PRIMARY KEY, fingerprint TEXT NOT NULL, public_key TEXT NOT NULL,
        joined TEXT NOT NULL) STRICT""",
    """CREATE TABLE contributions (
        id TEXT PRIMARY KEY, contributor TEXT NOT NULL REFERENCES contributors (name),
        domain TEXT NOT NULL, state TEXT NOT NULL CHECK (state <> '' AND id <> ''),
        manifest TEXT NOT NULL, signature TEXT NOT NULL, decision TEXT,
        received TEXT NOT NULL, changed TEXT NOT NULL) STRICT""",
    "CREATE UNIQUE INDEX one_admitted ON contributions (contributor) WHERE state = 'ADMITTED'",
    """CREATE TABLE cooperative (
        only INTEGER PRIMARY KEY CHECK (only = 1), state TEXT NOT NULL) STRICT""",
    """CREATE TABLE amendments (
        number INTEGER PRIMARY KEY, amendment TEXT NOT NULL, signature TEXT NOT NULL,
        added TEXT NOT NULL) STRICT""",
    """CREATE TABLE records (
        number INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, data TEXT NOT NULL,
        created TEXT NOT NULL, outcome TEXT, scored TEXT) STRICT""",
    """CREATE TABLE events (
        number INTEGER PRIMARY KEY AUTOINCREMENT, time TEXT NOT NULL, actor TEXT NOT NULL,
        what TEXT NOT NULL, subject TEXT NOT NULL, data TEXT NOT NULL) STRICT""",
)

_TABLE_NAMES = (
    "meta", "contributors", "contributions", "cooperative", "amendments", "records", "events",
)  # fmt: skip
_NEVER_CHANGED: Mapping[str, tuple[str, ...]] = {
    "meta": ("key", "value"),
    "contributors": ("name", "fingerprint", "public_key", "joined"),
    "contributions": (
        "id", "contributor", "domain", "manifest", "signature", "received",
    ),
    "cooperative": ("only",),
    "amendments": ("number", "amendment", "signature", "added"),
    "records": ("number", "kind", "data", "created"),
    "events": ("number", "time", "actor", "what", "subject", "data"),
}  # fmt: skip


def build_transition_rules() -> dict[str, str]:
    """SQL of the triggers that allow these transitions only, by name; the only ones ever renewed.

    A ledger of an earlier version has them with fewer transitions.
    """
    return {
        "contributions_forward": _only_forward("contributions", CONTRIBUTION_TRANSITIONS),
        "cooperative_forward": _only_forward("cooperative", COOPERATIVE_TRANSITIONS),
    }


def build_statements() -> list[str]:
    """SQL that makes an empty ledger, in order."""
    statements = list(_TABLES)
    for table in _TABLE_NAMES:
        statements.append(
            f"CREATE TRIGGER {table}_kept BEFORE DELETE ON {table} "
            f"BEGIN SELECT RAISE(ABORT, '{table} are never deleted'); END"
        )
    for table, columns in _NEVER_CHANGED.items():
        statements.append(
            f"CREATE TRIGGER {table}_unchanged BEFORE UPDATE OF {', '.join(columns)} ON {table} "
            f"BEGIN SELECT RAISE(ABORT, '{table} are never changed'); END"
        )
    statements += [
        *build_transition_rules().values(),
        "CREATE TRIGGER contributions_begin BEFORE INSERT ON contributions "
        "WHEN NEW.state <> 'RECEIVED' "
        "BEGIN SELECT RAISE(ABORT, 'contributions begin as RECEIVED'); END",
        "CREATE TRIGGER decided_once BEFORE UPDATE OF decision ON contributions "
        "WHEN OLD.decision IS NOT NULL AND NEW.decision IS NOT OLD.decision "
        "BEGIN SELECT RAISE(ABORT, 'a decision is never changed'); END",
        "CREATE TRIGGER scored_once BEFORE UPDATE OF outcome, scored ON records "
        "WHEN OLD.outcome IS NOT NULL "
        "BEGIN SELECT RAISE(ABORT, 'a record is scored once'); END",
        "CREATE TRIGGER amendments_numbered BEFORE INSERT ON amendments "
        "WHEN NEW.number <> (SELECT COUNT(*) FROM amendments) "
        "BEGIN SELECT RAISE(ABORT, 'amendments are numbered without gaps'); END",
        f"PRAGMA application_id = {APPLICATION_ID}",
        f"PRAGMA user_version = {FORMAT_VERSION}",
    ]
    return statements


def _only_forward(table: str, transitions: Mapping[Any, frozenset[Any]]) -> str:
    allowed = " OR ".join(
        f"(OLD.state = '{before}' AND NEW.state = '{after}')"
        for before, afters in transitions.items()
        for after in sorted(afters)
    )
    return (
        f"CREATE TRIGGER {table}_forward BEFORE UPDATE OF state ON {table} "
        f"WHEN NOT ({allowed}) "
        f"BEGIN SELECT RAISE(ABORT, 'states only move forward'); END"
    )
