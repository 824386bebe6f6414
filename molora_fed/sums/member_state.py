"""What a member keeps between the messages of a masked sum, and which totals it lets be opened."""

import json
from collections.abc import Iterable, Sequence
from typing import Annotated

from pydantic import Field, ValidationError

from molora_fed.errors import SumError, SumRefusedError
from molora_fed.storage.files import canonical_json
from molora_fed.storage.settings import UntrustedModel, describe_offenders
from molora_fed.storage.untrusted import clean, parse_json
from molora_fed.sums.messages import (
    MAX_MEMBERS,
    MIN_MEMBERS,
    Deliver,
    KeysList,
    Message,
    Names,
    Opening,
    Sha,
    Survivors,
    Terms,
    max_message_bytes,
)

__all__ = ["PHASES", "MemberState", "check_told_apart"]

_INCOMING: tuple[type[Message], ...] = (KeysList, Deliver, Survivors, Opening)
PHASES = tuple(str(model.model_fields["phase"].default) for model in _INCOMING)
"""Phases of what the coordinator sends, in order."""
_MAX_OPENED = 1_000


class MemberState(UntrustedModel):
    """What a member has to keep between messages; no secret is in it.

    Attributes:
        terms: The sum's.
        vector: SHA-256 of the encoded vector.
        opened: Survivors of earlier sums over this same vector.
        accepted: Lines of the coordinator that were answered, in order.
    """

    terms: Terms
    vector: Sha
    opened: Annotated[list[Names], Field(max_length=_MAX_OPENED)] = Field(default=[])
    accepted: Annotated[list[str], Field(max_length=len(PHASES))] = Field(default=[])

    def to_bytes(self) -> bytes:
        """JSON; equal states, equal bytes."""
        return canonical_json(self.model_dump(mode="json"))

    @classmethod
    def from_bytes(cls, data: bytes) -> "MemberState":
        """Read a kept state.

        Raises:
            SumError: If it is something else.
        """
        size = (len(PHASES) + 2) * 2 * max_message_bytes(MAX_MEMBERS) * _MAX_OPENED
        try:
            return cls.model_validate(parse_json(data, max_bytes=size))
        except ValidationError as error:
            got = describe_offenders(error, whole="state")
        except ValueError as error:
            got = clean(error, 100)
        raise SumError(
            f"Cannot go on with a masked sum: expected the state that was kept, got "
            f"{clean(got, 300)}. Ask the coordinator for another attempt."
        )

    def list_opened(self) -> list[list[str]]:
        """Survivors of all sums over this vector that were agreed to, this one included.

        To be given to the next attempt at the same question: what was agreed to counts as opened.
        """
        if len(self.accepted) <= PHASES.index("survivors"):
            return self.opened
        told = json.loads(self.accepted[PHASES.index("survivors")])
        return [*self.opened, told["survivors"]]


def check_told_apart(opened: Sequence[Iterable[str]], *, what: str) -> None:
    """Refuse totals from which something of fewer than three members could be computed.

    Members that were in the same totals stay together whatever is computed from these; so every
    such group has to have three members at least.

    Args:
        opened: Members of each total over the same vectors, the one that is asked for included.
        what: Start of the error.

    Raises:
        SumRefusedError: If a group is smaller; it is named.
    """
    sets = [frozenset(names) for names in opened]
    groups: dict[tuple[bool, ...], list[str]] = {}
    for name in sorted(frozenset().union(*sets)):
        groups.setdefault(tuple(name in each for each in sets), []).append(name)
    small = sorted(names for names in groups.values() if len(names) < MIN_MEMBERS)
    if small:
        raise SumRefusedError(
            f"{what}: expected totals that tell no fewer than {MIN_MEMBERS} members apart, got "
            f"some that tell {', '.join(small[0])}. Sum over other members."
        )
