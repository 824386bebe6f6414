"""The way of a contribution into the ledger; the same for a folder and for an upload.

Each step is committed before the next begins, and done again it changes nothing: after a crash
the same call resumes it.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from molora_fed.charter import Amendment, Charter
from molora_fed.contributions.admission import FILES_CHECK, AdmissionCandidate, admit
from molora_fed.contributions.build import compute_sample_bytes, count_samples
from molora_fed.contributions.carried import find_carried_misfits
from molora_fed.contributions.decision import AdmissionDecision, Refusal, list_quoted
from molora_fed.contributions.ledger import Ledger, LedgerReader
from molora_fed.contributions.manifest import (
    MANIFEST_FILE,
    MAX_CONFIG_BYTES,
    SIGNATURE_FILE,
    STATISTICS_FILE,
    WEIGHTS_FILE,
    Contribution,
    Manifest,
    load_contribution,
)
from molora_fed.contributions.reading import LedgerEntry
from molora_fed.contributions.states import ContributionState
from molora_fed.contributions.store import BlobStore
from molora_fed.errors import AdapterError, AdmissionError, LedgerError
from molora_fed.models.hidden_statistics import compute_statistics_bytes
from molora_fed.plugins import Plugins, get_plugins
from molora_fed.storage.files import hash_bytes
from molora_fed.storage.untrusted import clean
from molora_fed.types import Finding, Progress

if TYPE_CHECKING:
    from molora_fed.models.base import Base

__all__ = [
    "Door",
    "Receipt",
    "admit_pending",
    "build_receipt",
    "check_announced",
    "find_entry",
    "list_stored_files",
    "load_admitted",
    "load_stored",
    "receive_contribution",
]

SIZES_CHECK = "announced-sizes"
MAX_REASON = 1_000
"""Characters of why an upload was refused, in the history."""


@dataclass(frozen=True)
class Receipt:
    """Where a contribution stands after it was received; given only after the commit.

    Attributes:
        contribution_id: Its id.
        contributor: The contributor's name.
        domain: Domain.
        state: Committed state.
        decision: What admission decided and found; None if it has not decided.
        known: True if it had been decided before, so that nothing was done now.
    """

    contribution_id: str
    contributor: str
    domain: str
    state: ContributionState
    decision: AdmissionDecision | None
    known: bool


def receive_contribution(
    ledger: Ledger,
    store: BlobStore,
    folder: Path,
    *,
    charter: Charter,
    base: "Base",
    plugins: Plugins | None = None,
    actor: str = "coordinator",
    progress: Progress | None = None,
    public_folder: Path | None = None,
) -> Receipt:
    """Verify, store and judge a contribution; the same one again returns what was decided.

    Args:
        ledger: Open for writing.
        store: Where its files go.
        folder: Folder of the contribution; not needed any more afterwards.
        charter: The charter with the amendment that counts now.
        base: The cooperative's base.
        plugins: Where checks and kinds are looked up; the installed plugins by default.
        actor: Who does this, for the history.
        progress: Receives blocks done while losses are measured.
        public_folder: Where the coordinator keeps public text of its own, if it does.

    Returns:
        A receipt, also for a contribution that is rejected; see `AdmissionDecision.check_admitted`.

    Raises:
        AdapterError: If manifest or files are malformed, or a file is not the one signed.
        AdmissionError: If the manifest announces more than the charter allows.
        SignatureError: If the signature does not verify.
        LedgerError: If the contributor's name is bound to another key, or has another admitted
            contribution.
        StorageError: On I/O errors; nothing is left half-written.
    """
    try:
        contribution = load_contribution(folder)
        manifest = contribution.manifest
        entry = ledger.find_contribution(contribution.id)
        if entry is not None and entry.decision is not None:
            return build_receipt(ledger, entry, known=True)
        amendment = ledger.find_amendment(contribution.id)
        check_announced(manifest, charter, amendment, base=base)
        ledger.check_no_other_admitted(manifest.contributor, contribution.id)
        store.remove_leftovers()
        ledger.receive(manifest, contribution.signature, actor=actor)
        _store_files(contribution, store)
    except (AdapterError, LedgerError) as error:
        data = {"reason": clean(error, MAX_REASON)}
        subject = clean(folder.name)
        ledger.add_event("contribution-refused", actor=actor, subject=subject, data=data)
        raise
    if find_entry(ledger, contribution.id).state == ContributionState.RECEIVED:
        ledger.set_state(contribution.id, ContributionState.VERIFIED, actor=actor)
    plugins = plugins or get_plugins()
    door = Door(ledger, store, charter, base, plugins, actor, progress, public_folder)
    return door.judge(find_entry(ledger, contribution.id))


def admit_pending(
    ledger: Ledger,
    store: BlobStore,
    *,
    charter: Charter,
    base: "Base",
    plugins: Plugins | None = None,
    actor: str = "coordinator",
    progress: Progress | None = None,
    public_folder: Path | None = None,
) -> list[Receipt]:
    """Judge what was verified but not decided, because a run was stopped in between.

    The arguments are those of `receive_contribution`.

    Returns:
        A receipt for each, in canonical order.
    """
    plugins = plugins or get_plugins()
    door = Door(ledger, store, charter, base, plugins, actor, progress, public_folder)
    return [door.judge(entry) for entry in ledger.contributions(ContributionState.VERIFIED)]


@dataclass(frozen=True)
class Door:
    """Everything that a contribution is judged with.

    Attributes:
        ledger: Open for writing.
        store: Where contributions' files lie.
        charter: The charter with the amendment that counts now.
        base: The cooperative's base.
        plugins: Where checks and kinds are looked up.
        actor: Who does this, for the history.
        progress: Receives blocks done while losses are measured.
        public_folder: Where the coordinator keeps public text of its own, if it does.
    """

    ledger: Ledger
    store: BlobStore
    charter: Charter
    base: "Base"
    plugins: Plugins
    actor: str
    progress: Progress | None = None
    public_folder: Path | None = None

    def decide(self, entry: LedgerEntry, *, accepted: Collection[str] = ()) -> AdmissionDecision:
        """What admission says of a contribution whose files were verified; nothing is written.

        Args:
            entry: The contribution.
            accepted: See `molora_fed.contributions.admission.admit`.

        Raises:
            StorageError: On I/O errors, but files that are gone are a reason like another one.
        """
        lost = self._find_lost(entry)
        if lost:
            finding = Finding(
                f"its files in '{self.store.root.name}'",
                f"nothing there of {list_quoted(lost)}",
                "Restore the folder from a backup, or have another contribution sent.",
                quarantine=True,
            )
            refusal = Refusal.of(entry.contributor, FILES_CHECK, finding, failed=True)
            return AdmissionDecision.of(ContributionState.QUARANTINED, [refusal])
        admitted = self.ledger.contributions(ContributionState.ADMITTED)
        others = [one for one in admitted if one.id != entry.id and not self._find_lost(one)]
        candidate = AdmissionCandidate(
            load_stored(entry, self.store),
            self.charter,
            self.base,
            self.plugins,
            [load_stored(other, self.store) for other in others],
            self.ledger.find_amendment(entry.id),
            self.progress,
            self.public_folder,
        )
        return admit(candidate, accepted=accepted)

    def _find_lost(self, entry: LedgerEntry) -> list[str]:
        """Files that a contribution's manifest names and that are not in the store."""
        return [n for n, sha in list_signed_files(entry).items() if not self.store.has(sha)]

    def judge(self, entry: LedgerEntry) -> Receipt:
        """Decide on a verified contribution, and write it down."""
        decision = self.decide(entry)
        self.ledger.set_state(
            entry.id, decision.state, actor=self.actor, decision=decision.to_json()
        )
        return build_receipt(self.ledger, find_entry(self.ledger, entry.id), known=False)


def load_admitted(ledger: LedgerReader, store: BlobStore) -> list[Contribution]:
    """All admitted contributions, from the store, in canonical order (by id)."""
    entries = ledger.contributions(ContributionState.ADMITTED)
    return [load_stored(entry, store) for entry in entries]


def load_stored(entry: LedgerEntry, store: BlobStore) -> Contribution:
    """A verified contribution as a folder laid out from the store.

    Raises:
        StorageError: If a blob is missing, or on I/O errors.
        AdapterError: If it is not yet verified, so that files may be missing, or was withdrawn.
    """
    if entry.state == ContributionState.RECEIVED:
        raise AdapterError(
            f"Cannot open contribution {entry.id[:16]} of '{entry.contributor}': expected a "
            "verified one, got one whose files have not all arrived. Send it again."
        )
    if entry.state == ContributionState.WITHDRAWN:
        raise AdapterError(
            f"Cannot open contribution {entry.id[:16]} of '{entry.contributor}': expected one that "
            "is in the cooperative, got a withdrawn one, whose files are deleted. Leave it out."
        )
    for data in _write_signed(entry).values():
        store.put_bytes(data)
    return Contribution(store.put_folder(list_stored_files(entry)), entry.manifest, entry.signature)


def list_stored_files(entry: LedgerEntry) -> dict[str, str]:
    """Hash of every stored file of a contribution by its path in the contribution's folder."""
    own = {name: hash_bytes(data) for name, data in _write_signed(entry).items()}
    return {**list_signed_files(entry), **own}


def list_signed_files(entry: LedgerEntry) -> dict[str, str]:
    """Hash of every file that a contribution's manifest names, by its path."""
    return {name: file.sha256 for name, file in entry.manifest.files.items()}


def _write_signed(entry: LedgerEntry) -> dict[str, bytes]:
    """The files that the ledger itself holds: manifest and signature."""
    return {
        MANIFEST_FILE: entry.canonical.encode(),
        SIGNATURE_FILE: f"{entry.signature}\n".encode(),
    }


def check_announced(
    manifest: Manifest, charter: Charter, amendment: Amendment, *, base: "Base"
) -> None:
    """Refuse a manifest that announces more than was agreed, before a file is read or sent.

    Args:
        manifest: What is announced.
        charter: The cooperative's charter.
        amendment: The amendment that was in force when it was received, or is now: an earlier one
            that the contributor signed does not count any more.
        base: The cooperative's base, whose width bounds statistics of hidden states.

    Raises:
        AdmissionError: Naming every size that is out of bounds.
    """
    then = charter.model_copy(update={"amendment": amendment})
    asked, size = count_samples(then), charter.identity.corpus.block_size
    wrong = []
    for name, file in manifest.adapter_files.items():
        limit = charter.identity.adapters.max_bytes if name == WEIGHTS_FILE else MAX_CONFIG_BYTES
        if file.bytes > limit:
            wrong.append((f"{name} of at most {limit} bytes", f"{file.bytes}"))
    for split, count in asked.items():
        if split not in manifest.sample_files:
            wrong.append((f"1 to {count} {split} blocks", "none"))
    for split, sample in manifest.sample_files.items():
        limit = asked.get(split, 0)
        if sample.blocks > limit:
            wrong.append((f"at most {limit} {split} blocks", f"{sample.blocks}"))
        elif sample.tokens != sample.blocks * size:
            wrong.append((f"{sample.blocks * size} {split} tokens", f"{sample.tokens}"))
        elif sample.bytes > compute_sample_bytes(sample.blocks, size):
            most = compute_sample_bytes(sample.blocks, size)
            wrong.append((f"{split} blocks in at most {most} bytes", f"{sample.bytes}"))
    published = manifest.statistics_file
    if charter.publishes_statistics and published is None:
        wrong.append((f"{STATISTICS_FILE} of hidden states", "none"))
    elif published is not None and not charter.publishes_statistics:
        wrong.append((f"no {STATISTICS_FILE}, which this cooperative does not ask for", "one"))
    elif published is not None:
        most = compute_statistics_bytes(base.hidden_size)
        if published.bytes > most:
            wrong.append((f"{STATISTICS_FILE} of at most {most} bytes", f"{published.bytes}"))
    wrong += find_carried_misfits(manifest, then)
    if wrong:
        refusal = Refusal(
            manifest.contributor,
            SIZES_CHECK,
            expected=", ".join(want for want, _ in wrong),
            found=", ".join(got for _, got in wrong),
            fix="Build the contribution again under the charter's rules.",
        )
        raise AdmissionError(refusal.message)


def _store_files(contribution: Contribution, store: BlobStore) -> None:
    manifest = contribution.manifest
    for name, file in manifest.files.items():
        store.put_file(
            contribution.folder / name,
            expected=file.sha256,
            max_bytes=file.bytes,
            what=f"'{name}' of '{manifest.contributor}'",
        )


def find_entry(ledger: LedgerReader, contribution_id: str) -> LedgerEntry:
    """The contribution of an id.

    Raises:
        LedgerError: If the ledger has none.
    """
    entry = ledger.find_contribution(contribution_id)
    if entry is None:
        raise LedgerError(
            f"Cannot find contribution {contribution_id[:16]}: expected it in the ledger, "
            "got nothing. Restore the ledger from a backup."
        )
    return entry


def build_receipt(ledger: LedgerReader, entry: LedgerEntry, *, known: bool) -> Receipt:
    """Where a contribution stands, with what was decided last.

    Args:
        ledger: Open.
        entry: The contribution.
        known: Whether it had been decided before.
    """
    value = ledger.find_decision(entry)
    decision = None if value is None else AdmissionDecision.from_json(value)
    return Receipt(entry.id, entry.contributor, entry.domain, entry.state, decision, known)
