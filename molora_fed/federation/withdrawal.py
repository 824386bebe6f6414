"""Shrinking a cooperative: a contributor is withdrawn, and what it gave is deleted.

The ledger keeps manifest, signature and history, which prove what was withdrawn and when; files,
bank columns and the published model that holds its adapter go. Nobody else is touched: the next
fusion finds the others' columns in the bank.
"""

import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from molora_fed.adapters.files import hash_adapter_files, load_adapter
from molora_fed.bank.passes import list_totals
from molora_fed.bank.prune import prune_bank, subtract_expert
from molora_fed.contributions.receive import list_stored_files, load_admitted
from molora_fed.contributions.states import ContributionState
from molora_fed.cooperative.controls import find_control_adapter
from molora_fed.cooperative.cooperative import Cooperative
from molora_fed.corpus.blocks import Blocks
from molora_fed.errors import LedgerError, describe_mismatch
from molora_fed.federation.coordinator_mail import (
    announce_decision,
    announce_withdrawal,
    retract_result,
)
from molora_fed.federation.homes import CoordinatorHome
from molora_fed.plugins import Plugins, get_plugins
from molora_fed.routing.bundle import load_manifest
from molora_fed.storage.files import storage_errors
from molora_fed.storage.keys import key_fingerprint, load_key
from molora_fed.types import Progress

if TYPE_CHECKING:
    from molora_fed.contributions.ledger import Ledger, LedgerReader
    from molora_fed.contributions.manifest import Contribution
    from molora_fed.contributions.reading import LedgerEntry
    from molora_fed.contributions.receive import Receipt

__all__ = ["Withdrawal", "build_announcer", "withdraw_contributor"]

ACTOR = "molora coop withdraw"
_C = ContributionState
_ON_THEIR_WAY = (_C.RECEIVED, _C.VERIFIED)


@dataclass(frozen=True)
class Withdrawal:
    """What a withdrawal did.

    Attributes:
        contribution_id: The contribution that is withdrawn.
        domain: Its domain.
        retracted: Whether a published model that held it was deleted.
        freed_bytes: Bytes of files and bank columns that were deleted now.
        remaining: Contributors who are still in, by name.
    """

    contribution_id: str
    domain: str
    retracted: bool
    freed_bytes: int
    remaining: tuple[str, ...]


def withdraw_contributor(
    cooperative: Cooperative,
    contributor: str,
    *,
    reason: str = "",
    actor: str = ACTOR,
    plugins: Plugins | None = None,
    progress: Progress | None = None,
) -> Withdrawal:
    """Withdraw a contributor; safe to interrupt, run again to resume.

    The state is committed first. Where routers read the experts' average, one last pass takes
    the leaver out of it. Then its files, its rejected earlier attempts' files, bank columns that
    the remaining ones do not need, and the published model that holds its adapter, fused or
    evolved, are deleted.
    Copies of the model that others already have cannot be called back.

    Args:
        cooperative: The coordinator's cooperative; no server may work on it.
        contributor: The contributor's name.
        reason: Why, for the history.
        actor: Who does this, for the history.
        plugins: Where adapter kinds are registered; the installed plugins by default.
        progress: Receives blocks done where the leaver is taken out of the experts' average.

    Raises:
        LedgerError: If nobody of that name is admitted or quarantined, or a server works on the
            cooperative.
        StorageError: On I/O errors.
    """
    with cooperative.open_ledger() as ledger:
        entry = _find_entry(ledger, contributor)
        if entry.state != _C.WITHDRAWN:
            data = {"contributor": contributor, "reason": reason[:1_000]}
            ledger.add_event("withdrawal-decided", actor=actor, subject=entry.id, data=data)
            ledger.set_state(entry.id, _C.WITHDRAWN, actor=actor)
        remaining = load_admitted(ledger, cooperative.store)
        _subtract(cooperative, entry, remaining, plugins or get_plugins(), progress)
        home = CoordinatorHome(cooperative.folder)
        mailbox = home.contributor(key_fingerprint(entry.manifest.public_key))
        announce_withdrawal(mailbox, load_key(cooperative.key_path), entry.id)
        retracted = retract_result(home, entry.id)
        retracted = _delete_fused(cooperative.folder / "fused", entry.id) or retracted
        retracted = _delete_evolution(cooperative.folder / "evolution", entry.id) or retracted
        freed = _prune(cooperative, remaining) + _delete_files(ledger, cooperative, contributor)
    return Withdrawal(
        entry.id,
        entry.domain,
        retracted,
        freed,
        tuple(sorted(one.manifest.contributor for one in remaining)),
    )


def build_announcer(cooperative: Cooperative) -> "Callable[[LedgerEntry, Receipt], None]":
    """What tells a contributor of a decision that the coordinator made by hand.

    Args:
        cooperative: Whose mailboxes.
    """
    home, key = CoordinatorHome(cooperative.folder), load_key(cooperative.key_path)

    def announce(entry: "LedgerEntry", receipt: "Receipt") -> None:
        refusals = receipt.decision.refusals if receipt.decision else ()
        announce_decision(
            home.contributor(key_fingerprint(entry.manifest.public_key)),
            key,
            entry.id,
            state=str(receipt.state),
            findings=[refusal.message for refusal in refusals],
        )

    return announce


def _find_entry(ledger: "LedgerReader", contributor: str) -> "LedgerEntry":
    """The contributor's admitted contribution, else a quarantined one, else the last withdrawn.

    Raises:
        LedgerError: If the contributor never had an admitted one; names those who have.
    """
    own = [entry for entry in ledger.contributions() if entry.contributor == contributor]
    for state in (_C.ADMITTED, _C.QUARANTINED, _C.WITHDRAWN):
        found = [entry for entry in own if entry.state == state]
        if found:
            return max(found, key=lambda entry: entry.changed)
    admitted = [entry.contributor for entry in ledger.contributions(_C.ADMITTED)]
    raise LedgerError(
        describe_mismatch(
            f"Cannot withdraw contributor '{contributor}'",
            expected=f"one who is in ({', '.join(sorted(admitted)) or 'nobody is'})",
            got=", ".join(sorted({str(entry.state) for entry in own})) or "nobody of that name",
            fix="Look the name up with `molora report`.",
        )
    )


def _subtract(
    cooperative: Cooperative,
    entry: "LedgerEntry",
    remaining: "list[Contribution]",
    plugins: Plugins,
    progress: Progress | None,
) -> None:
    """Take the leaver out of the experts' average, while its adapter is still there."""
    charter, bank = cooperative.charter, cooperative.folder / "bank"
    stored = cooperative.store.folder(list_stored_files(entry)) / "adapter"
    if not stored.is_dir():
        return
    own = hash_adapter_files(stored)
    if all(own not in total.adapters for total in list_totals(bank)):
        return
    base = cooperative.load_base()
    rules = charter.identity.adapters
    subtract_expert(
        bank,
        base,
        load_adapter(
            stored, rules=rules, model=base.model, plugins=plugins, name=entry.contributor
        ),
        _load_blocks(remaining),
        batch=charter.identity.corpus.evaluation_batch,
        progress=progress,
    )


def _delete_fused(folder: Path, contribution_id: str) -> bool:
    """Delete the fused model in the cooperative's folder if it holds the contribution."""
    if not (folder / "fused.json").is_file():
        return False
    if all(expert.contribution != contribution_id for expert in load_manifest(folder).experts):
        return False
    with storage_errors(folder):
        shutil.rmtree(folder)
    return True


def _delete_evolution(folder: Path, contribution_id: str) -> bool:
    """Delete the evolution in the cooperative's folder unless it began without the contribution.

    Adapters bred from the leaver's are in every later generation, so all of it goes. One that is
    not finished does not say whose it is, and goes as well.
    """
    if not folder.is_dir():
        return False
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        result = json.loads((folder / "evolution.json").read_text(encoding="utf-8"))
        if contribution_id not in result["fingerprints"]["contributions"].values():
            return False
    with storage_errors(folder):
        shutil.rmtree(folder)
    return True


def _prune(cooperative: Cooperative, remaining: "list[Contribution]") -> int:
    folder, charter = cooperative.folder / "bank", cooperative.charter
    if not folder.is_dir():
        return 0
    adapters = [one.adapter_folder for one in remaining]
    control = find_control_adapter(cooperative.folder)
    adapters += [] if control is None else [control]
    return prune_bank(
        folder,
        base=charter.identity.base.weights,
        adapters=[hash_adapter_files(adapter) for adapter in adapters],
        blocks=[part.fingerprint for part in _load_blocks(remaining)],
        batch=charter.identity.corpus.evaluation_batch,
        frozen_depth=charter.identity.adapters.frozen_depth,
    )


def _load_blocks(contributions: "list[Contribution]") -> list[Blocks]:
    """All blocks that contributions brought."""
    return [
        contribution.load_samples(split)
        for contribution in contributions
        for split in contribution.manifest.sample_files
    ]


def _delete_files(ledger: "Ledger", cooperative: Cooperative, contributor: str) -> int:
    """Delete what only the contributor's decided contributions hold, rejected ones as well."""
    gone, needed = [], set()
    for entry in ledger.contributions():
        if entry.contributor == contributor and entry.state not in _ON_THEIR_WAY:
            gone.append(list_stored_files(entry))
        else:
            needed |= set(list_stored_files(entry).values())
    return sum(cooperative.store.discard(files, keep=needed) for files in gone)
