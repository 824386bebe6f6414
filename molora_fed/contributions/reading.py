"""Reading the ledger, amendments too; any number of processes may, while one writes."""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from molora_fed.charter import Amendment, read_amendment
from molora_fed.contributions.manifest import Manifest, read_manifest
from molora_fed.contributions.states import (
    APPLICATION_ID,
    FORMAT_VERSION,
    ContributionState,
    CooperativeState,
)
from molora_fed.errors import LedgerError, StorageError
from molora_fed.storage.files import canonical_json
from molora_fed.storage.keys import sign, verify

__all__ = [
    "Contributor",
    "Event",
    "LedgerEntry",
    "LedgerReader",
    "LedgerRecord",
    "SignedAmendment",
    "ledger_errors",
    "sign_amendment",
]


@dataclass(frozen=True)
class SignedAmendment:
    """An amendment and the coordinator's signature over it and the charter's identity.

    Attributes:
        identity_hash: Identity of the charter it amends.
        text: The amendment's canonical JSON as it was signed; an earlier version wrote fewer keys,
            so that it cannot be made again from the amendment.
        signature: Hex signature.
    """

    identity_hash: str
    text: str
    signature: str

    @cached_property
    def amendment(self) -> Amendment:
        """What counts from now on, whole."""
        return read_amendment(json.loads(self.text))

    def check(self, coordinator_key: str) -> None:
        """Refuse it unless the coordinator signed it for this charter.

        Args:
            coordinator_key: The coordinator's public key, PEM.

        Raises:
            SignatureError: If the signature does not verify.
        """
        verify(
            coordinator_key,
            _signed_bytes(self.identity_hash, self.text),
            self.signature,
            what=f"amendment {self.amendment.number}",
        )


def sign_amendment(
    key: EllipticCurvePrivateKey, identity_hash: str, amendment: Amendment
) -> SignedAmendment:
    """Sign an amendment with the coordinator's key."""
    text = canonical_json(amendment.model_dump(mode="json")).decode()
    return SignedAmendment(identity_hash, text, sign(key, _signed_bytes(identity_hash, text)))


def _signed_bytes(identity_hash: str, text: str) -> bytes:
    return canonical_json({"charter_identity": identity_hash, "amendment": json.loads(text)})


_DISK_ERRORS = ("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")


@dataclass(frozen=True)
class Contributor:
    """A name and the key it is bound to.

    Attributes:
        name: The contributor's name.
        fingerprint: Fingerprint of the public key; this is who the contributor is.
        public_key: PEM.
        joined: When the name was bound, ISO 8601 UTC.
    """

    name: str
    fingerprint: str
    public_key: str
    joined: str


@dataclass(frozen=True)
class LedgerEntry:
    """A contribution as the ledger holds it.

    Attributes:
        id: Contribution id.
        contributor: The contributor's name.
        domain: Domain.
        state: Where it stands.
        canonical: The manifest's canonical JSON.
        signature: Hex signature over it.
        decision: What admission decided and found, JSON values; None before.
        received: When, ISO 8601 UTC.
        changed: When the state last changed, ISO 8601 UTC.
    """

    id: str
    contributor: str
    domain: str
    state: ContributionState
    canonical: str
    signature: str
    decision: dict[str, Any] | None
    received: str
    changed: str

    @cached_property
    def manifest(self) -> Manifest:
        """The signed manifest, also one received under an earlier version's bounds."""
        return read_manifest(self.canonical.encode(), where=self.id[:16])


@dataclass(frozen=True)
class Event:
    """One line of the history: who did what to which subject, and when (ISO 8601 UTC)."""

    number: int
    time: str
    actor: str
    what: str
    subject: str
    data: dict[str, Any]


@dataclass(frozen=True)
class LedgerRecord:
    """Something stated before its outcome was known, such as a forecast.

    Attributes:
        number: In order of creation, from 1.
        kind: E.g. "forecast".
        data: What was stated, JSON values.
        created: When, ISO 8601 UTC.
        outcome: What came out, JSON values; None before.
        scored: When the outcome was written, ISO 8601 UTC; None before.
    """

    number: int
    kind: str
    data: dict[str, Any]
    created: str
    outcome: dict[str, Any] | None
    scored: str | None


@contextmanager
def ledger_errors(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into the one-line errors users see."""
    try:
        yield
    except sqlite3.IntegrityError as error:
        raise LedgerError(
            f"Cannot write ledger '{path}': expected a change its rules allow, got: {error}. "
            "Look up the present state first."
        ) from error
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", "")
        if name.startswith(_DISK_ERRORS):
            raise StorageError(
                f"Cannot use ledger '{path}': expected a disk that takes it, got {error}. "
                "Free some space, check permissions, then run the same command again."
            ) from error
        raise LedgerError(
            f"Cannot use ledger '{path}': expected a ledger of format {FORMAT_VERSION}, "
            f"got {error}. Check the path, or restore the file from a backup."
        ) from error


class LedgerReader:
    """Read-only view of a ledger; use it as a context manager, or close it.

    Attributes:
        path: The ledger's file.

    Raises:
        LedgerError: If there is no ledger at `path`, or it is of another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with ledger_errors(path):
            self._connection = self._connect()
            try:
                self._check_format()
            except BaseException:
                self._connection.close()
                raise

    def _connect(self) -> sqlite3.Connection:
        if not self.path.is_file():
            raise LedgerError(
                f"Cannot open ledger '{self.path}': expected a file, got nothing there. "
                "Make a cooperative with `molora coop create NAME`."
            )
        return sqlite3.connect(f"file:{quote(str(self.path.resolve()))}?mode=ro", uri=True)

    def _check_format(self) -> None:
        found = tuple(self._value(f"PRAGMA {name}") for name in ("application_id", "user_version"))
        if found != (APPLICATION_ID, FORMAT_VERSION):
            raise LedgerError(
                f"Cannot open ledger '{self.path}': expected a ledger of format {FORMAT_VERSION}, "
                f"got another file (application {found[0]}, format {found[1]}). "
                "Check the path and the installed version."
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    @property
    def identity_hash(self) -> str:
        """Identity hash of the charter the ledger belongs to."""
        return str(self._value("SELECT value FROM meta WHERE key = 'identity_hash'"))

    @property
    def coordinator_key(self) -> str:
        """The coordinator's public key, PEM."""
        return str(self._value("SELECT value FROM meta WHERE key = 'coordinator_key'"))

    @property
    def cooperative_state(self) -> CooperativeState:
        """Where the cooperative stands."""
        return CooperativeState(self._value("SELECT state FROM cooperative"))

    def contributors(self) -> list[Contributor]:
        """All contributors, by name."""
        query = "SELECT name, fingerprint, public_key, joined FROM contributors ORDER BY name"
        return [Contributor(*row) for row in self._rows(query)]

    def find_contribution(self, contribution_id: str) -> LedgerEntry | None:
        """The contribution of an id, or None."""
        entries = self._entries("WHERE id = ?", (contribution_id,))
        return entries[0] if entries else None

    def contributions(self, state: ContributionState | None = None) -> list[LedgerEntry]:
        """Contributions in canonical order, by id.

        Args:
            state: Only those in this state; None for all.
        """
        return self._entries("") if state is None else self._entries("WHERE state = ?", (state,))

    def find_decision(self, entry: LedgerEntry) -> dict[str, Any] | None:
        """What was decided last of a contribution, JSON values; None before.

        The first decision stands beside the contribution and is never changed; what a fusion or a
        person decided later is in the history.
        """
        query = (
            "SELECT data FROM events WHERE what IN ('contribution-changed', 'contribution-judged') "
            "AND subject = ? ORDER BY number DESC"
        )
        decided = (json.loads(data).get("decision") for (data,) in self._rows(query, (entry.id,)))
        return next((decision for decision in decided if decision is not None), entry.decision)

    def find_amendment(self, contribution_id: str) -> Amendment:
        """The amendment that was in force when a contribution was received; the last for a new one.

        The history keeps both in one order, so that no clock decides.
        """
        query = (
            "SELECT subject FROM events WHERE what = 'amendment-added' AND number < COALESCE("
            "(SELECT MIN(number) FROM events WHERE what = 'contribution-received' AND subject = ?),"
            " 1 + (SELECT MAX(number) FROM events)) ORDER BY number DESC LIMIT 1"
        )
        number = int(self._rows(query, (contribution_id,))[0][0])
        return self.amendments()[number].amendment

    def amendments(self) -> list[SignedAmendment]:
        """All amendments by number; the last one counts."""
        identity = self.identity_hash
        rows = self._rows("SELECT amendment, signature FROM amendments ORDER BY number")
        return [SignedAmendment(identity, text, signature) for text, signature in rows]

    def records(self, kind: str) -> list[LedgerRecord]:
        """Records of one kind in order of creation."""
        query = (
            "SELECT number, kind, data, created, outcome, scored FROM records "
            "WHERE kind = ? ORDER BY number"
        )
        return [
            LedgerRecord(
                number, name, json.loads(data), created, outcome and json.loads(outcome), scored
            )
            for number, name, data, created, outcome, scored in self._rows(query, (kind,))
        ]

    def events(self, *, after: int = 0) -> list[Event]:
        """The history in order.

        Args:
            after: Only events with a higher number.
        """
        query = (
            "SELECT number, time, actor, what, subject, data FROM events "
            "WHERE number > ? ORDER BY number"
        )
        return [
            Event(number, time, actor, what, subject, json.loads(data))
            for number, time, actor, what, subject, data in self._rows(query, (after,))
        ]

    def _entries(self, where: str, values: tuple[object, ...] = ()) -> list[LedgerEntry]:
        query = (
            "SELECT id, contributor, domain, state, manifest, signature, decision, received, "
            f"changed FROM contributions {where} ORDER BY id"
        )
        return [
            LedgerEntry(
                id=row[0],
                contributor=row[1],
                domain=row[2],
                state=ContributionState(row[3]),
                canonical=row[4],
                signature=row[5],
                decision=None if row[6] is None else json.loads(row[6]),
                received=row[7],
                changed=row[8],
            )
            for row in self._rows(query, values)
        ]

    def _rows(self, query: str, values: tuple[object, ...] = ()) -> list[Any]:
        with ledger_errors(self.path):
            return self._connection.execute(query, values).fetchall()

    def _value(self, query: str) -> Any:
        rows = self._rows(query)
        return rows[0][0] if rows else None
