"""What is kept of letters in the folders of a coordinator and of a contributor, as typed models."""

from molora_fed.federation.letters import (
    Bytes,
    Files,
    Letter,
    Name,
    OwnName,
    PartBytes,
    PublicKey,
    Sha,
    Summary,
)
from molora_fed.federation.status import Count
from molora_fed.storage.settings import UntrustedModel

__all__ = ["Accepted", "EarlierResult", "HelloRecord", "Limits", "Names", "Offer"]


class HelloRecord(Letter):
    """What the server keeps of a hello."""

    kind = "hello"

    public_key: PublicKey
    name: OwnName
    domain: Name


class EarlierResult(Letter):
    """A result as versions before signatures kept it."""

    kind = "result"

    id: Sha
    files: Files
    summary: Summary
    part_bytes: PartBytes


class Offer(Letter):
    """What is kept of a manifest.

    Attributes:
        id: Id of the shipment.
        files: Its files.
        recipe: At home: hash of what the contribution was made from.
    """

    kind = "manifest"

    id: Sha
    files: Files
    recipe: str | None = None


class Limits(UntrustedModel):
    """What the coordinator's worker lets the server take.

    Attributes:
        contribution_bytes: Largest contribution.
        strangers: Contributors who are not admitted yet, at once.
    """

    contribution_bytes: Bytes
    strangers: Count = 256


class Accepted(UntrustedModel):
    """What a contributor took last: results of earlier amendments are refused then."""

    amendment: Count


class Names(UntrustedModel):
    """The names that belong to a key for good, because it was admitted under them."""

    names: list[OwnName]
