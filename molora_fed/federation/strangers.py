"""Who may be a contributor: which key may use which name, and how much strangers may take.

A stranger is whoever has said hello and was never admitted. Strangers are limited in number and in
bytes, and forgotten when they stay away; who was admitted keeps its name and mailbox. Being
forgotten costs nobody more than its place: whoever comes back says hello and offers again.
"""

import os
import shutil
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress

from molora_fed.errors import describe_mismatch
from molora_fed.federation.envelopes import keep_letter, open_letter
from molora_fed.federation.homes import ContributorMailbox, CoordinatorHome
from molora_fed.federation.kept import Limits, Names, Offer
from molora_fed.federation.letters import Acknowledgement, ShownState

__all__ = [
    "UploadRoom",
    "bind_name",
    "find_refusal",
    "is_admitted",
    "list_states",
    "measure_absence",
    "note_presence",
    "read_limits",
]

ABSENT_SECONDS = 24 * 3_600.0
"""After this long without a message the name of a stranger that never uploaded is free."""
CROWDED_SECONDS = 600.0
"""The same for any stranger, where all places of strangers are taken."""
PRESENCE_SECONDS = 60.0
"""A contributor's presence is noted at most this often."""
UPLOADS = 8
"""Strangers' parts may take as many bytes as so many contributions of the largest size."""
_IN = ("ADMITTED", "WITHDRAWN")


def read_limits(home: CoordinatorHome) -> Limits | None:
    """What the coordinator's worker allows; None before it has said so."""
    return open_letter(home.outbox / "limits.json", Limits)


def is_admitted(mailbox: ContributorMailbox) -> bool:
    """Whether a contribution of this key is, or was, in the cooperative."""
    letters = (open_letter(path, Acknowledgement) for path in mailbox.list_acknowledgements())
    return any(letter is not None and letter.state in _IN for letter in letters)


def list_states(home: CoordinatorHome) -> list[ShownState]:
    """Where all contributors stood when they last said so."""
    states = (open_letter(one.state_file, ShownState) for one in home.contributors())
    return [state for state in states if state is not None]


def bind_name(mailbox: ContributorMailbox, name: str) -> None:
    """Let a name belong to a key for good; call it once the key is admitted under it.

    Raises:
        StorageError: On I/O errors.
    """
    kept = open_letter(mailbox.names_file, Names)
    bound = set() if kept is None else set(kept.names)
    keep_letter(mailbox.names_file, {"names": sorted({*bound, name})})


def _list_bound(mailbox: ContributorMailbox) -> list[str]:
    kept = open_letter(mailbox.names_file, Names)
    if kept is not None:
        return kept.names
    return [mailbox.name] if is_admitted(mailbox) else []  # an earlier version kept no names


def find_refusal(home: CoordinatorHome, fingerprint: str, name: str) -> str:
    """Why a key may not use a name; empty if it may. The one place that says so.

    Strangers who stay away lose their places here, to whoever needs them.

    Args:
        home: The coordinator's home.
        fingerprint: Fingerprint of the key that signed the hello.
        name: Name it goes by.
    """
    others = [one for one in home.contributors() if one.fingerprint != fingerprint]
    for other in others:
        if name in _list_bound(other) or (other.name == name and not _is_absent(other)):
            return describe_mismatch(
                f"Cannot join as '{name}'",
                expected="a name nobody else has",
                got="one that belongs to another key",
                fix="Choose another with --name.",
            )
        if other.name == name:
            _forget(other)
    if home.contributor(fingerprint).folder.is_dir():
        return ""
    limits = read_limits(home) or Limits(contribution_bytes=0)
    strangers = [one for one in others if one.folder.is_dir() and not is_admitted(one)]
    if len(strangers) < limits.strangers or _forget_longest_away(strangers):
        return ""
    return describe_mismatch(
        f"Cannot join as '{name}'",
        expected=f"at most {limits.strangers} contributors who are not admitted yet",
        got="as many",
        fix="Try again later, or ask the coordinator.",
    )


def measure_absence(mailbox: ContributorMailbox) -> float:
    """Seconds since a contributor was last heard of."""
    for path in (mailbox.hello_file, mailbox.folder):
        with suppress(FileNotFoundError):
            return time.time() - path.stat().st_mtime
    return 0.0


def _is_absent(mailbox: ContributorMailbox) -> bool:
    """Whether this is a stranger that never uploaded and stays away."""
    return not mailbox.list_acknowledgements() and measure_absence(mailbox) > ABSENT_SECONDS


def _forget_longest_away(strangers: Iterable[ContributorMailbox]) -> bool:
    """Forget the stranger that has been away longest, if that is long enough; whether one was."""
    found = max(strangers, key=measure_absence)
    if measure_absence(found) <= CROWDED_SECONDS:
        return False
    _forget(found)
    return True


def _forget(mailbox: ContributorMailbox) -> None:
    # Gone at once for everybody else who looks; a killed server's leftover is removed at its start.
    gone = mailbox.folder.with_name(f".{mailbox.fingerprint}.{uuid.uuid4().hex}.tmp")
    with suppress(FileNotFoundError):
        mailbox.folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def note_presence(mailbox: ContributorMailbox) -> None:
    """Note that a contributor was heard of, now and then."""
    with suppress(OSError):
        if measure_absence(mailbox) > PRESENCE_SECONDS:
            os.utime(mailbox.hello_file)


class UploadRoom:
    """Lets strangers upload within what all of their parts together may take.

    Args:
        home: The coordinator's home.
    """

    def __init__(self, home: CoordinatorHome) -> None:
        self._home = home
        self._granted: dict[str, float] = {}

    def grant(self, mailbox: ContributorMailbox, offer: Offer) -> bool:
        """Whether an upload may begin, or go on; parts of whoever sends no more make room.

        Args:
            mailbox: Of the contributor.
            offer: What it would send.
        """
        limits = read_limits(self._home)
        if limits is None:
            return False
        if is_admitted(mailbox) or mailbox.parts.num_bytes:
            return True
        left = UPLOADS * limits.contribution_bytes - offer.files.num_bytes
        left -= sum(self._reserve(one) for one in self._home.contributors() if one != mailbox)
        if left >= 0:
            self._granted[mailbox.fingerprint] = time.time()
        return left >= 0

    def _reserve(self, mailbox: ContributorMailbox) -> int:
        """Bytes that another's upload takes, or will take once it is whole."""
        changed = mailbox.parts.changed if mailbox.parts.num_bytes else 0.0
        last = max(changed, self._granted.get(mailbox.fingerprint, 0.0))
        if not last or is_admitted(mailbox):
            return 0
        if time.time() - last > CROWDED_SECONDS:
            mailbox.parts.keep_only(())
            return 0
        offer = open_letter(mailbox.offer_file, Offer)
        if offer is None or mailbox.acknowledgement_file(offer.id).exists():
            return 0
        return offer.files.num_bytes
