"""What admission decides and finds, within bounds: it goes into the ledger, a trace and a message.

A finding quotes what was sent, so every text is cleaned and cut here, and all of them together.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from molora_fed.contributions.states import ContributionState
from molora_fed.errors import AdmissionError, describe_mismatch
from molora_fed.storage.untrusted import clean
from molora_fed.types import Finding

__all__ = [
    "MAX_DECISION",
    "AdmissionDecision",
    "AdmissionLosses",
    "ChangedModules",
    "Refusal",
    "list_quoted",
]

MAX_DECISION = 4_000
"""Characters of all refusals of one contribution together."""
_TEXTS = {"expected": 400, "found": 1_000, "fix": 300}  # characters of each text of a finding
_LEAST = 1_000  # characters that a refusal may need without what was found
_NOTE = 40  # of them, to say how many are left out
_SHOWN = 5
_NOTE_CHARACTERS = 300


def list_quoted(offenders: Sequence[str], *, shown: int = _SHOWN) -> str:
    """Some of what is wrong, each cleaned and cut, and how many more there are, in one line.

    Args:
        offenders: What is wrong, one text each; what was sent may be quoted in it.
        shown: Named at most.
    """
    more = len(offenders) - shown
    texts = "; ".join(clean(offender) for offender in offenders[:shown])
    return texts + (f"; and {more} more" if more > 0 else "")


@dataclass(frozen=True)
class AdmissionLosses:
    """Mean losses on what a contribution is judged on, nats per token; NaN where not finite."""

    base: float
    specialist: float

    def to_json(self) -> dict[str, float | None]:
        """JSON values; a loss that is not finite is null, and a refusal says so."""
        return {name: x if math.isfinite(x) else None for name, x in asdict(self).items()}

    @classmethod
    def from_json(cls, value: Mapping[str, float | None]) -> "AdmissionLosses":
        """The losses that `to_json` wrote."""
        return cls(**{name: math.nan if x is None else x for name, x in value.items()})


@dataclass(frozen=True)
class ChangedModules:
    """Modules whose change is not exactly zero, of those that an adapter is made for."""

    changed: int
    modules: int

    def __str__(self) -> str:
        """The phrase that people see."""
        return f"changed {self.changed} of {self.modules} modules"


@dataclass(frozen=True)
class Refusal:
    """A finding with the contributor and the check it belongs to.

    Attributes:
        contributor: The contributor's name.
        check: The check's name.
        expected: See `molora_fed.types.Finding`.
        found: Likewise.
        fix: Likewise.
        quarantine: True if a person should look at it.
        failed: True if the check itself failed, so that it has found nothing.
        is_note: True if it is only said, and no refusal.
    """

    contributor: str
    check: str
    expected: str
    found: str
    fix: str
    quarantine: bool = False
    failed: bool = False
    is_note: bool = False

    @classmethod
    def of(
        cls, contributor: str, check: str, finding: Finding, *, failed: bool = False
    ) -> "Refusal":
        """A refusal whose texts may be shown, logged and sent."""
        texts = {name: clean(getattr(finding, name), limit) for name, limit in _TEXTS.items()}
        return cls(
            contributor,
            clean(check, 80),
            **texts,
            quarantine=finding.quarantine,
            failed=failed,
            is_note=finding.is_note and not failed,
        )

    @property
    def message(self) -> str:
        """The one line that people see."""
        return describe_mismatch(
            f"Cannot admit contribution of '{self.contributor}', check '{self.check}'",
            expected=self.expected,
            got=self.found,
            fix=self.fix,
        )

    def to_json(self) -> dict[str, Any]:
        """JSON values; `failed` is left out where nothing failed, as earlier versions wrote it."""
        value = {k: v for k, v in asdict(self).items() if k != "is_note"}  # a note is no refusal
        return value if self.failed else {k: v for k, v in value.items() if k != "failed"}


@dataclass(frozen=True)
class AdmissionDecision:
    """What admission decided.

    Attributes:
        state: ADMITTED, QUARANTINED or REJECTED.
        refusals: What was found wrong; empty if admitted.
        checks: Names of the checks that ran, in order.
        losses: What was measured on text; None if no check asked.
        notes: What a check only says, one line each; it decides nothing.
        effect: Modules that the adapter changes; None if its files were not read that far.
    """

    state: ContributionState
    refusals: tuple[Refusal, ...] = ()
    checks: tuple[str, ...] = ()
    losses: AdmissionLosses | None = None
    notes: tuple[str, ...] = ()
    effect: ChangedModules | None = None

    @classmethod
    def of(
        cls,
        state: ContributionState,
        refusals: Sequence[Refusal],
        checks: Sequence[str] = (),
        losses: AdmissionLosses | None = None,
        notes: Sequence[str] = (),
        effect: ChangedModules | None = None,
    ) -> "AdmissionDecision":
        """A decision whose refusals together are cut to `MAX_DECISION` characters.

        Refusals that have no room left are counted in the text of the last one that has.
        """
        kept: list[Refusal] = []
        room = MAX_DECISION - _NOTE
        for refusal in refusals:
            if room < _LEAST:
                break
            longest = room - len(refusal.message) + len(refusal.found)
            kept.append(replace(refusal, found=clean(refusal.found, longest)))
            room -= len(kept[-1].message) + 1
        if more := len(refusals) - len(kept):
            kept[-1] = replace(kept[-1], found=f"{kept[-1].found} (and {more} more findings)")
        names = tuple(clean(name, 80) for name in checks)
        texts = tuple(clean(each, _NOTE_CHARACTERS) for each in notes[:_SHOWN])
        return cls(state, tuple(kept), names, losses, texts, effect)

    def to_json(self) -> dict[str, Any]:
        """JSON values for the ledger; `from_json` reads them back."""
        value: dict[str, Any] = {
            "state": str(self.state),
            "refusals": [refusal.to_json() for refusal in self.refusals],
            "checks": list(self.checks),
            "losses": None if self.losses is None else self.losses.to_json(),
        }
        # Left out where there are none, as earlier versions wrote it.
        if self.notes:
            value["notes"] = list(self.notes)
        if self.effect is not None:
            value["effect"] = asdict(self.effect)
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "AdmissionDecision":
        """The decision that `to_json` wrote; longer texts of an earlier version are cut."""
        losses, effect = value["losses"], value.get("effect")
        return cls.of(
            ContributionState(value["state"]),
            [Refusal(**refusal) for refusal in value["refusals"]],
            value["checks"],
            None if losses is None else AdmissionLosses.from_json(losses),
            value.get("notes", ()),
            None if effect is None else ChangedModules(**effect),
        )

    def check_admitted(self) -> None:
        """Refuse to go on unless the contribution was admitted.

        Raises:
            AdmissionError: With a sentence for each refusal, in one line.
        """
        if self.state != ContributionState.ADMITTED:
            raise AdmissionError(" ".join(refusal.message for refusal in self.refusals))
