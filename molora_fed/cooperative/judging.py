"""What a coordinator decides about contributions by hand: every state has a way out.

The table is in docs/protocol.md. Nothing here trusts a contribution more than admission does: who
is released has passed every check but those whose wish for a person's look was granted.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from molora_fed.contributions.decision import AdmissionDecision, Refusal
from molora_fed.contributions.ledger import Ledger
from molora_fed.contributions.reading import LedgerEntry, LedgerReader
from molora_fed.contributions.receive import Door, Receipt, build_receipt, find_entry
from molora_fed.contributions.states import ContributionState
from molora_fed.cooperative.cooperative import Cooperative
from molora_fed.cooperative.pins import check_pins
from molora_fed.errors import LedgerError, describe_mismatch
from molora_fed.plugins import Plugins, get_plugins
from molora_fed.storage.untrusted import clean
from molora_fed.types import Finding, Progress

__all__ = [
    "LEAVES",
    "Standing",
    "judge_pending",
    "list_standings",
    "quarantine",
    "reject",
    "release",
]

_C = ContributionState
RELEASED_FROM = (_C.VERIFIED, _C.QUARANTINED, _C.REJECTED)
REJECTED_FROM = (_C.RECEIVED, _C.VERIFIED, _C.QUARANTINED)
LEAVES: dict[ContributionState, str] = {
    _C.RECEIVED: "molora coop reject; or have it sent again",
    _C.VERIFIED: "molora coop repair, release or reject",
    _C.ADMITTED: "molora coop withdraw",
    _C.QUARANTINED: "molora coop release, reject or withdraw",
    _C.REJECTED: "molora coop release, which judges it again",
    _C.WITHDRAWN: "nothing: it is out for good, and another contribution may come",
}
"""What leaves each state."""
_REASON = 500  # characters
_LEAST_DIGITS = 6  # of an id
Announce = Callable[[LedgerEntry, Receipt], None]


@dataclass(frozen=True)
class Standing:
    """Where a contribution stands, for people.

    Attributes:
        contribution_id: Its id.
        contributor: The contributor's name.
        domain: Domain.
        state: Committed state.
        reason: Why, if it is not in; empty if nothing was found.
    """

    contribution_id: str
    contributor: str
    domain: str
    state: ContributionState
    reason: str


def list_standings(ledger: LedgerReader) -> list[Standing]:
    """Where every contribution stands, in canonical order.

    Args:
        ledger: Open.
    """
    found = []
    for entry in ledger.contributions():
        receipt = build_receipt(ledger, entry, known=True)
        is_in = entry.state in (_C.ADMITTED, _C.WITHDRAWN)
        refusals = () if is_in or receipt.decision is None else receipt.decision.refusals
        reason = " ".join(f"{one.check}: {one.found}." for one in refusals)
        found.append(
            Standing(entry.id, entry.contributor, entry.domain, entry.state, clean(reason))
        )
    return found


def _find(ledger: LedgerReader, which: str, states: Collection[ContributionState]) -> LedgerEntry:
    """The one contribution in one of these states that an id's first digits or a name mean.

    Raises:
        LedgerError: If there is none, or more than one; names their states.
    """
    meant = [
        entry
        for entry in ledger.contributions()
        if entry.contributor == which
        or (len(which) >= _LEAST_DIGITS and entry.id.startswith(which))
    ]
    found = [entry for entry in meant if entry.state in states]
    if len(found) == 1:
        return found[0]
    there = ", ".join(f"{entry.id[:16]} {entry.state}" for entry in (found or meant)[:8])
    raise LedgerError(
        describe_mismatch(
            f"Cannot decide on contribution '{clean(which)}'",
            expected=f"one that is {' or '.join(states)}",
            got=there or "none of that name or id",
            fix="Name it by the first digits of its id; `molora coop list` shows all.",
        )
    )


def release(
    cooperative: Cooperative,
    which: str,
    *,
    reason: str = "",
    actor: str = "molora coop release",
    announce: Announce = lambda entry, receipt: None,
    plugins: Plugins | None = None,
    progress: Progress | None = None,
) -> Receipt:
    """Judge a contribution again by today's rules, and grant what it was quarantined for.

    A check that wants a person's look is granted if the last decision named it; what is found
    beside it holds the contribution back. A check that failed must come to an end this time.

    Args:
        cooperative: No server may work on it.
        which: First digits of the contribution's id, or its contributor's name.
        reason: Why, for the history.
        actor: Who does this, for the history.
        announce: Tells the contributor, after the commit.
        plugins: Where checks and kinds are registered; the installed plugins by default.
        progress: Receives blocks done while losses are measured.

    Raises:
        AdmissionError: If it is held back; says why, and its state has changed where another may
            follow.
        PluginError: If plugins that the charter pins are not here as they are pinned.
        LedgerError: If there is no such contribution, or a server works on the cooperative.
        StorageError: On I/O errors.
    """
    plugins = plugins or get_plugins()
    check_pins(cooperative.charter, plugins)
    with cooperative.open_ledger() as ledger:
        entry = _find(ledger, which, RELEASED_FROM)
        ledger.check_no_other_admitted(entry.contributor, entry.id)
        last = build_receipt(ledger, entry, known=True).decision
        refusals = () if last is None else last.refusals
        granted = sorted({one.check for one in refusals if one.quarantine and not one.failed})
        door = Door(
            ledger,
            cooperative.store,
            cooperative.charter,
            cooperative.load_base(progress),
            plugins,
            actor,
            progress,
            cooperative.public_folder,
        )
        decision = door.decide(entry, accepted=granted)
        data = {
            "contributor": entry.contributor,
            "reason": clean(reason, _REASON),
            "granted": granted,
            "decision": decision.to_json(),
        }
        ledger.add_event("contribution-judged", actor=actor, subject=entry.id, data=data)
        if (entry.state, decision.state) != (_C.REJECTED, _C.REJECTED):
            ledger.set_state(entry.id, decision.state, actor=actor, decision=decision.to_json())
        receipt = build_receipt(ledger, find_entry(ledger, entry.id), known=False)
        announce(entry, receipt)
        decision.check_admitted()
        return receipt


def reject(
    cooperative: Cooperative,
    which: str,
    *,
    reason: str = "",
    actor: str = "molora coop reject",
    announce: Announce = lambda entry, receipt: None,
) -> Receipt:
    """Reject a contribution that is not in, whatever it waits for.

    Args:
        cooperative: No server may work on it.
        which: First digits of the contribution's id, or its contributor's name.
        reason: Why, for the history and the contributor.
        actor: Who does this, for the history.
        announce: Tells the contributor, after the commit.

    Raises:
        LedgerError: If there is no such contribution, or a server works on the cooperative.
    """
    finding = Finding(
        "the coordinator's consent", clean(reason, _REASON) or "none", "Ask the coordinator."
    )
    with cooperative.open_ledger() as ledger:
        entry = _find(ledger, which, REJECTED_FROM)
        decision = _refuse(entry, _C.REJECTED, "coordinator", finding)
        ledger.set_state(entry.id, _C.REJECTED, actor=actor, decision=decision.to_json())
        receipt = build_receipt(ledger, find_entry(ledger, entry.id), known=False)
        announce(entry, receipt)
        return receipt


def quarantine(
    ledger: Ledger, contribution_id: str, check: str, finding: Finding, *, actor: str
) -> Receipt:
    """Take an admitted contribution out of what is fused until a person has looked at it.

    Args:
        ledger: Open for writing.
        contribution_id: Which.
        check: Where the fault was met.
        finding: What it was.
        actor: Who does this, for the history.

    Raises:
        LedgerError: If it is not admitted.
    """
    entry = find_entry(ledger, contribution_id)
    decision = _refuse(entry, _C.QUARANTINED, check, finding)
    ledger.set_state(entry.id, _C.QUARANTINED, actor=actor, decision=decision.to_json())
    return build_receipt(ledger, find_entry(ledger, entry.id), known=False)


def _refuse(
    entry: LedgerEntry, state: ContributionState, check: str, finding: Finding
) -> AdmissionDecision:
    return AdmissionDecision.of(state, [Refusal.of(entry.contributor, check, finding)])


def judge_pending(
    cooperative: Cooperative,
    ledger: Ledger,
    *,
    actor: str = "molora coop repair",
    plugins: Plugins | None = None,
) -> list[Receipt]:
    """Decide on what was verified and never decided, as the server does at its start.

    Args:
        cooperative: Whose charter, base and store count.
        ledger: Its ledger, open for writing.
        actor: Who does this, for the history.
        plugins: Where checks and kinds are registered; the installed plugins by default.

    Raises:
        PluginError: If plugins that the charter pins are not here as they are pinned.
    """
    pending = ledger.contributions(_C.VERIFIED)
    if not pending:
        return []
    found = plugins or get_plugins()
    check_pins(cooperative.charter, found)
    base = cooperative.load_base()
    public = cooperative.public_folder
    door = Door(ledger, cooperative.store, cooperative.charter, base, found, actor, None, public)
    return [door.judge(entry) for entry in pending]
