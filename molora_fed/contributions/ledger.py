"""The coordinator's only truth: SQLite, flushed to disk before anything is acknowledged.

One process writes; see `lock`. Every change and the event that tells of it are one transaction.
"""

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from filelock import BaseFileLock

from molora_fed.contributions.manifest import Manifest
from molora_fed.contributions.reading import LedgerReader, SignedAmendment, ledger_errors
from molora_fed.contributions.states import (
    CONTRIBUTION_TRANSITIONS,
    COOPERATIVE_TRANSITIONS,
    ContributionState,
    CooperativeState,
    build_statements,
    build_transition_rules,
)
from molora_fed.errors import LedgerError
from molora_fed.storage.files import canonical_json, make_folder, sync_folder
from molora_fed.storage.keys import key_fingerprint
from molora_fed.storage.locks import LOCK_MODE, read_holder, try_lock

__all__ = ["Ledger", "LedgerReader", "create_ledger"]


def _take_lock(path: Path) -> BaseFileLock:
    """Take the right to write a ledger, until it is released.

    Raises:
        LedgerError: If there is no folder, or another process, or another `Ledger` of this one,
            has it.
        StorageError: On I/O errors.
    """
    if not path.parent.is_dir():
        raise LedgerError(
            f"Cannot open ledger '{path}': expected a folder '{path.parent}', got none. "
            "Make a cooperative with `molora coop create NAME`."
        )
    lock_path = path.with_name(f"{path.name}.lock")
    lock = try_lock(lock_path)
    if lock is None:
        raise LedgerError(
            f"Cannot write ledger '{path}': expected to be its only writer, got process "
            f"{read_holder(lock_path)} writing it already. Stop that `molora` process, or wait for "
            "it."
        )
    return lock


class Ledger(LedgerReader):
    """A ledger open for writing; use it as a context manager, or close it.

    Raises:
        LedgerError: If there is no ledger at the path, or another process writes it.
    """

    def __init__(self, path: Path) -> None:
        self._lock = _take_lock(path)
        try:
            super().__init__(path)
        except BaseException:
            self._lock.release()
            raise

    def _connect(self) -> sqlite3.Connection:
        super()._connect().close()  # Says what is wrong if there is no ledger.
        return _connect_writer(self.path)

    def _check_format(self) -> None:
        super()._check_format()
        _renew_transition_rules(self._connection)

    def close(self) -> None:
        """Let go of the file and of the right to write."""
        super().close()
        self._lock.release()

    def register_contributor(self, name: str, public_key: str, *, actor: str) -> None:
        """Bind a name to a key, once; one key may have several names.

        Raises:
            LedgerError: If the name is bound to another key.
            SignatureError: If it is not a P-384 public key.
        """
        fingerprint = key_fingerprint(public_key)
        bound = next((c.fingerprint for c in self.contributors() if c.name == name), None)
        if bound == fingerprint:
            return
        if bound is not None:
            raise LedgerError(
                f"Cannot register contributor '{name}': expected the key {bound[:16]} that the "
                f"name is bound to, got {fingerprint[:16]}. Join under another name."
            )
        with self._transaction() as now:
            self._connection.execute(
                "INSERT INTO contributors VALUES (?, ?, ?, ?)", (name, fingerprint, public_key, now)
            )
            self._log(now, actor, "contributor-registered", name, {"fingerprint": fingerprint})

    def receive(self, manifest: Manifest, signature: str, *, actor: str) -> ContributionState:
        """Write down a contribution as RECEIVED; a known one is left as it is.

        Args:
            manifest: Manifest whose signature was verified.
            signature: Hex signature over it.
            actor: Who does this, for the history.

        Returns:
            The state the contribution is in now.

        Raises:
            LedgerError: If the contributor's name is bound to another key.
        """
        known = self.find_contribution(manifest.contribution_id)
        if known is not None:
            return known.state
        self.register_contributor(manifest.contributor, manifest.public_key, actor=actor)
        with self._transaction() as now:
            self._connection.execute(
                "INSERT INTO contributions VALUES (?, ?, ?, ?, ?, ?, NULL, ?, ?)",
                (
                    manifest.contribution_id, manifest.contributor, manifest.domain,
                    ContributionState.RECEIVED, manifest.canonical.decode(), signature, now, now,
                ),
            )  # fmt: skip
            data = {"contributor": manifest.contributor, "domain": manifest.domain}
            self._log(now, actor, "contribution-received", manifest.contribution_id, data)
        return ContributionState.RECEIVED

    def set_state(
        self,
        contribution_id: str,
        state: ContributionState,
        *,
        actor: str,
        decision: Mapping[str, Any] | None = None,
    ) -> None:
        """Move a contribution forward; where it is there already, nothing happens.

        Args:
            contribution_id: Which.
            state: A state that may follow its present one.
            actor: Who does this, for the history.
            decision: What admission decided and found, JSON values. The first one stands beside
                the contribution; a later one, too, is in the history (`find_decision`).

        Raises:
            LedgerError: If it is unknown, the state may not follow, or the contributor has
                another admitted contribution.
        """
        entry = self.find_contribution(contribution_id)
        if entry is None:
            raise LedgerError(
                f"Cannot change contribution {contribution_id[:16]}: expected one the ledger "
                "knows, got none of that id. See `molora report`."
            )
        what = f"Cannot change contribution {contribution_id[:16]} of '{entry.contributor}'"
        _check_step(what, entry.state, state, CONTRIBUTION_TRANSITIONS)
        if entry.state == state:
            return
        if state == ContributionState.ADMITTED:
            self.check_no_other_admitted(entry.contributor, contribution_id)
        is_first = entry.decision is None and decision is not None
        text = canonical_json(dict(decision or {})).decode() if is_first else None
        with self._transaction() as now:
            self._connection.execute(
                "UPDATE contributions SET state = ?, decision = COALESCE(?, decision), changed = ? "
                "WHERE id = ?",
                (state, text, now, contribution_id),
            )
            data = {"from": entry.state, "to": state, "decision": decision}
            self._log(now, actor, "contribution-changed", contribution_id, data)

    def check_no_other_admitted(self, contributor: str, contribution_id: str) -> None:
        """Refuse a second admitted contribution under one name.

        Raises:
            LedgerError: If the contributor has an admitted contribution of another id.
        """
        for other in self.contributions(ContributionState.ADMITTED):
            if other.contributor == contributor and other.id != contribution_id:
                raise LedgerError(
                    f"Cannot admit contribution {contribution_id[:16]} of '{contributor}': "
                    f"expected no other admitted one under this name, got {other.id[:16]}. "
                    "Withdraw that one first, or contribute under another name."
                )

    def advance(self, state: CooperativeState, *, actor: str) -> None:
        """Move the cooperative forward; where it is there already, nothing happens.

        Raises:
            LedgerError: If the state may not follow the present one.
        """
        before = self.cooperative_state
        _check_step("Cannot change the cooperative", before, state, COOPERATIVE_TRANSITIONS)
        if before == state:
            return
        with self._transaction() as now:
            self._connection.execute("UPDATE cooperative SET state = ?", (state,))
            self._log(now, actor, "cooperative-changed", state, {"from": before})

    def add_amendment(self, signed: SignedAmendment, *, actor: str) -> None:
        """Add an amendment; the same one again is left as it is.

        Raises:
            LedgerError: If its number does not follow the last, or it is for another charter.
            SignatureError: If the coordinator did not sign it.
        """
        signed.check(self.coordinator_key)
        known = self.amendments()
        number = signed.amendment.number
        what = f"Cannot add amendment {number}"
        if signed.identity_hash != self.identity_hash:
            raise LedgerError(
                f"{what}: expected one for charter {self.identity_hash[:16]}, "
                f"got {signed.identity_hash[:16]}. Sign it for this cooperative."
            )
        if number < len(known) and known[number].amendment == signed.amendment:
            return
        if number != len(known):
            raise LedgerError(
                f"{what}: expected number {len(known)}, got {number}. "
                "Amendments are numbered without gaps and never changed."
            )
        with self._transaction() as now:
            self._insert_amendment(signed, now, actor)

    def _insert_amendment(self, signed: SignedAmendment, now: str, actor: str) -> None:
        number = signed.amendment.number
        self._connection.execute(
            "INSERT INTO amendments VALUES (?, ?, ?, ?)",
            (number, signed.text, signed.signature, now),
        )
        self._log(now, actor, "amendment-added", str(number), {})

    def add_record(self, kind: str, data: Mapping[str, Any], *, actor: str) -> int:
        """Write down a statement before its outcome is known.

        Args:
            kind: E.g. "forecast".
            data: What is stated, JSON values; never changed afterwards.
            actor: Who does this, for the history.

        Returns:
            The record's number.
        """
        with self._transaction() as now:
            cursor = self._connection.execute(
                "INSERT INTO records (kind, data, created) VALUES (?, ?, ?)",
                (kind, canonical_json(dict(data)).decode(), now),
            )
            number = int(cursor.lastrowid or 0)
            self._log(now, actor, "record-added", str(number), {"kind": kind})
        return number

    def score_record(self, number: int, outcome: Mapping[str, Any], *, actor: str) -> None:
        """Write the outcome beside a record, once.

        Raises:
            LedgerError: If there is no such record, or it has an outcome already.
        """
        rows = self._rows("SELECT outcome FROM records WHERE number = ?", (number,))
        if not rows or rows[0][0] is not None:
            got = "an outcome already" if rows else "no such record"
            raise LedgerError(
                f"Cannot score record {number}: expected one without an outcome, got {got}. "
                "A record is scored once; make a new one."
            )
        with self._transaction() as now:
            self._connection.execute(
                "UPDATE records SET outcome = ?, scored = ? WHERE number = ?",
                (canonical_json(dict(outcome)).decode(), now, number),
            )
            self._log(now, actor, "record-scored", str(number), {})

    def add_event(
        self, what: str, *, actor: str, subject: str, data: Mapping[str, Any] | None = None
    ) -> None:
        """Add a line to the history that comes with no change of state, e.g. a refused upload."""
        with self._transaction() as now:
            self._log(now, actor, what, subject, dict(data or {}))

    def _log(self, now: str, actor: str, what: str, subject: str, data: dict[str, Any]) -> None:
        self._connection.execute(
            "INSERT INTO events (time, actor, what, subject, data) VALUES (?, ?, ?, ?, ?)",
            (now, actor, what, subject, canonical_json(data).decode()),
        )

    @contextmanager
    def _transaction(self) -> Iterator[str]:
        """Commit what the block changes, all or nothing; yields the time to write beside it."""
        with ledger_errors(self.path), _transaction(self._connection):
            yield datetime.now(UTC).isoformat(timespec="microseconds")


def create_ledger(
    path: Path, *, coordinator_key: str, first: SignedAmendment, actor: str = "coordinator"
) -> None:
    """Make a ledger with its first amendment; an equal one that is there already is kept.

    Args:
        path: File to make; its folder is made.
        coordinator_key: The coordinator's public key, PEM.
        first: Amendment 0.
        actor: Who does this, for the history.

    Raises:
        LedgerError: If a different ledger is there, or another process writes it.
        SignatureError: If the coordinator did not sign the amendment.
        StorageError: On I/O errors.
    """
    first.check(coordinator_key)
    make_folder(path.parent)
    with _take_lock(path), ledger_errors(path):
        connection = _connect_writer(path)
        try:
            if not connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]:
                with _transaction(connection):
                    _fill(connection, coordinator_key, first.identity_hash)
        finally:
            connection.close()
        sync_folder(path.parent)
    with Ledger(path) as ledger:
        found = (ledger.identity_hash, ledger.coordinator_key)
        if found != (first.identity_hash, coordinator_key):
            raise LedgerError(
                f"Cannot make ledger '{path}': expected no ledger or one of charter "
                f"{first.identity_hash[:16]} under this key, got one of {found[0][:16]}. "
                "Choose another folder."
            )
        ledger.add_amendment(first, actor=actor)


def _fill(connection: sqlite3.Connection, coordinator_key: str, identity_hash: str) -> None:
    for statement in build_statements():
        connection.execute(statement)
    connection.executemany(
        "INSERT INTO meta VALUES (?, ?)",
        [("identity_hash", identity_hash), ("coordinator_key", coordinator_key)],
    )
    connection.execute("INSERT INTO cooperative VALUES (1, ?)", (CooperativeState.CREATED,))


def _connect_writer(path: Path) -> sqlite3.Connection:
    # isolation_level None: no transaction begins behind our back, BEGIN and COMMIT are explicit.
    path.touch(mode=LOCK_MODE)  # the files beside it, of WAL, take its mode over
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


def _renew_transition_rules(connection: sqlite3.Connection) -> None:
    """Let a ledger of an earlier version take the transitions that have been added since."""
    query = "SELECT sql FROM sqlite_master WHERE type = 'trigger' AND name = ?"
    for name, statement in build_transition_rules().items():
        if connection.execute(query, (name,)).fetchone() != (statement,):
            with _transaction(connection):
                connection.execute(f"DROP TRIGGER IF EXISTS {name}")
                connection.execute(statement)


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _check_step(
    what: str,
    before: StrEnum,
    after: StrEnum,
    transitions: Mapping[Any, frozenset[Any]],
) -> None:
    allowed = transitions[before]
    if after != before and after not in allowed:
        names = ", ".join(sorted(allowed)) or "no further state"
        raise LedgerError(
            f"{what}: expected {names} after {before}, got {after}. States only move forward."
        )
