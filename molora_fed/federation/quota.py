"""What one key may keep in the ledger's store, and what a refused upload leaves there: nothing.

Imports no torch: the coordinator's worker looks into its mailboxes without it.
"""

from typing import TYPE_CHECKING

from molora_fed.contributions.states import ContributionState
from molora_fed.errors import AdmissionError, MoloraError, describe_mismatch
from molora_fed.storage.keys import key_fingerprint
from molora_fed.storage.untrusted import clean

if TYPE_CHECKING:
    from molora_fed.contributions.ledger import Ledger, LedgerReader
    from molora_fed.contributions.manifest import Manifest
    from molora_fed.contributions.reading import LedgerEntry
    from molora_fed.contributions.store import BlobStore

__all__ = ["check_quota", "describe_failure", "discard_rejected"]

UPLOADS = 4
"""The store keeps as many bytes of one key as so many contributions of the largest size."""
_C = ContributionState
_USELESS = (_C.RECEIVED, _C.REJECTED)
_KEPT = (_C.VERIFIED, _C.ADMITTED, _C.QUARANTINED)


def _list_of_key(ledger: "LedgerReader", public_key: str) -> "list[LedgerEntry]":
    fingerprint = key_fingerprint(public_key)
    names = {one.name for one in ledger.contributors() if one.fingerprint == fingerprint}
    return [entry for entry in ledger.contributions() if entry.contributor in names]


def check_quota(ledger: "LedgerReader", manifest: "Manifest", *, contribution_bytes: int) -> None:
    """Refuse another contribution of a key that keeps too much already.

    Args:
        ledger: The cooperative's.
        manifest: Of the contribution; one that the ledger knows adds nothing.
        contribution_bytes: Largest contribution.

    Raises:
        AdmissionError: If it does.
    """
    if ledger.find_contribution(manifest.contribution_id) is not None:
        return
    kept = [e for e in _list_of_key(ledger, manifest.public_key) if e.state in _KEPT]
    total = sum(entry.manifest.num_bytes for entry in kept)
    limit = UPLOADS * contribution_bytes
    if total + manifest.num_bytes > limit:
        raise AdmissionError(
            describe_mismatch(
                f"Cannot take another contribution of '{manifest.contributor}'",
                expected=f"at most {limit:,} bytes under one key",
                got=f"{manifest.num_bytes:,} and {total:,} in {len(kept)} earlier ones",
                fix="Ask the coordinator to withdraw one of them.",
            )
        )


def discard_rejected(ledger: "Ledger", store: "BlobStore", public_key: str) -> int:
    """Delete the files of a key's refused uploads; manifests and decisions stay in the ledger.

    Args:
        ledger: The cooperative's.
        store: Where its files are.
        public_key: The key, PEM.

    Returns:
        Bytes of the files that are gone now.

    Raises:
        StorageError: On I/O errors.
    """
    from molora_fed.contributions.receive import list_stored_files

    useless = [e for e in _list_of_key(ledger, public_key) if e.state in _USELESS]
    needed = {
        sha
        for entry in ledger.contributions()
        if entry.state in _KEPT
        for sha in list_stored_files(entry).values()
    }
    return sum(store.discard(list_stored_files(entry), keep=needed) for entry in useless)


def describe_failure(error: Exception) -> str:
    """Why an upload was refused, in one line: the checks' own words, or what ended them."""
    if isinstance(error, MoloraError):
        return str(error)
    return (
        f"Cannot check this upload: expected a contribution, got {type(error).__name__}: "
        f"{clean(error)}. Build it again with the same molora-fed version as the server."
    )
