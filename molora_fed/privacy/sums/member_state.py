"""What a member keeps between the messages of a masked sum."""

from typing import Annotated

from pydantic import Field, ValidationError

from molora_fed.errors import SumError
from molora_fed.privacy.sums.messages import (
    MAX_MEMBERS,
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
from molora_fed.storage.files import canonical_json
from molora_fed.storage.settings import UntrustedModel, describe_offenders
from molora_fed.storage.untrusted import clean, parse_json

__all__ = ["PHASES", "MemberState"]

_INCOMING: tuple[type[Message], ...] = (KeysList, Deliver, Survivors, Opening)
PHASES = tuple(str(model.model_fields["phase"].default) for model in _INCOMING)
"""Phases of what the coordinator sends, in order."""


class MemberState(UntrustedModel):
    """What a member has to keep between messages; no secret is in it.

    Attributes:
        terms: The sum's.
        vector: SHA-256 of the encoded vector.
        whole: Survivors of the first sum over this same vector; empty in the first.
        accepted: Lines of the coordinator that were answered, in order.
    """

    terms: Terms
    vector: Sha
    whole: Names = Field(default=[])
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
        size = 2 * (len(PHASES) + 2) * max_message_bytes(MAX_MEMBERS)
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

    def find_whole(self) -> list[str]:
        """Survivors of the first sum over this vector that this member agreed to; maybe none.

        To be given to the next attempt at the same question: what was agreed to counts as opened.
        """
        number = PHASES.index("survivors")
        if self.whole or len(self.accepted) <= number:
            return self.whole
        return Survivors.model_validate_json(self.accepted[number]).survivors
