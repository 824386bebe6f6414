"""Messages of a masked sum as typed values within bounds, and what is signed of them.

A message is one line of JSON; a masked vector follows its line as raw words. What a member says is
signed by its contributor's key over the terms, so that it counts in one sum and one phase only.
What the coordinator says needs no signature here: it is the sender whom nobody trusts.
"""

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, TypeVar

from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import AfterValidator, Field, ValidationError, model_validator

from molora_fed.charter import MIN_MEMBERS
from molora_fed.errors import MoloraError, SumError
from molora_fed.privacy.sums.fixed_point import Bits, FixedPoint
from molora_fed.privacy.sums.primitives import SHARE_BYTES
from molora_fed.privacy.sums.vectors import MAX_ENTRIES
from molora_fed.storage.files import canonical_json, hash_bytes
from molora_fed.storage.keys import key_fingerprint, sign, verify
from molora_fed.storage.names import is_name
from molora_fed.storage.settings import UntrustedModel, describe_offenders
from molora_fed.storage.untrusted import clean, parse_json

__all__ = [
    "MAX_MEMBERS",
    "SEALED_BYTES",
    "Agreement",
    "Deliver",
    "Invited",
    "Keys",
    "KeysList",
    "Masked",
    "MemberMessage",
    "Opening",
    "Revealed",
    "Sealed",
    "Shares",
    "Survivors",
    "Terms",
    "compute_threshold",
    "describe_sender",
    "max_message_bytes",
    "measure_phases",
    "read_message",
]

MAX_MEMBERS = 1_024
SEALED_BYTES = 2 * SHARE_BYTES + 16
"""Two shares and the tag of their cipher."""
MAX_NAME = 63
MAX_SIGNATURE = 208
_PURPOSE = "molora-masked-sum-1"
_BYTES_A_MEMBER = 1_024  # of a message that says something of each
_BYTES_BESIDE = 8_192


def compute_threshold(members: int) -> int:
    """Fewest members whose shares may open a total: more than two thirds, at least three.

    With t > 2n/3 a coordinator that tells two stories needs honest members to reveal both secrets
    of one, as long as fewer than a third are with it (Bonawitz et al. 2017, section 6.2).
    """
    return max(MIN_MEMBERS, 2 * members // 3 + 1)


def _check_name(value: str) -> str:
    if not is_name(value):
        raise ValueError("expected lower-case letters, digits and dashes")
    return value


def _check_sorted(value: list[str]) -> list[str]:
    if sorted(set(value)) != value:
        raise ValueError("expected sorted names, each once")
    return value


def _hex(size: int) -> Any:
    return Field(pattern=rf"^[0-9a-f]{{{2 * size}}}$")


Sha = Annotated[str, _hex(32)]
Key = Annotated[str, _hex(32)]
Share = Annotated[str, _hex(SHARE_BYTES)]
SealedText = Annotated[str, _hex(SEALED_BYTES)]
Signature = Annotated[str, Field(pattern=rf"^[0-9a-f]{{0,{MAX_SIGNATURE}}}$")]
Name = Annotated[str, AfterValidator(_check_name)]
Names = Annotated[list[Name], Field(max_length=MAX_MEMBERS), AfterValidator(_check_sorted)]


class Invited(UntrustedModel):
    """One who may take part.

    Attributes:
        name: Contributor.
        public_key: The contributor's signing key, PEM.
    """

    name: Name
    public_key: Annotated[str, Field(max_length=1_024)]


class Terms(UntrustedModel):
    """What one masked sum is: everything that is said and derived in it is bound to all of this.

    Attributes:
        identity: The charter's.
        fusion: Which fusion.
        question: Hash of what the members compute their vectors from.
        attempt: 0 for all members, more where the same question is summed again over some.
        members: Who may take part, sorted by name, 3 to 1,024.
        threshold: Members needed to open the total, at least `compute_threshold` of them.
        length: Entries of the vectors, N.
        bits: k of the modulus 2^k.
        encoding: `FixedPoint.digest`.
    """

    identity: Sha
    fusion: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.-]{0,79}$")]
    question: Sha
    attempt: Annotated[int, Field(ge=0, le=1_000_000)]
    members: Annotated[list[Invited], Field(min_length=MIN_MEMBERS, max_length=MAX_MEMBERS)]
    threshold: Annotated[int, Field(le=MAX_MEMBERS)]
    length: Annotated[int, Field(ge=1, le=MAX_ENTRIES)]
    bits: Bits
    encoding: Sha

    @model_validator(mode="after")
    def _check(self) -> "Terms":
        _check_sorted(self.names)
        least = compute_threshold(len(self.members))
        if not least <= self.threshold <= len(self.members):
            raise ValueError(f"expected a threshold of {least} to {len(self.members)}")
        fingerprints = {key_fingerprint(member.public_key) for member in self.members}
        if len(fingerprints) != len(self.members):
            raise ValueError("expected a key of its own for each member")
        return self

    @classmethod
    def build(
        cls,
        public_keys: Mapping[str, str],
        encoding: FixedPoint,
        *,
        identity: str,
        fusion: str,
        question: str,
        attempt: int = 0,
    ) -> "Terms":
        """The terms of a sum with the smallest threshold.

        Args:
            public_keys: The members' signing keys by name, PEM.
            encoding: How vectors are encoded, for as many members at least.
            identity: See `Terms`.
            fusion: See `Terms`.
            question: See `Terms`.
            attempt: See `Terms`.

        Raises:
            SumError: If there are fewer than three members, or more than are encoded for; or a
                name or a key cannot be used.
        """
        if len(public_keys) > encoding.max_members or len(public_keys) < MIN_MEMBERS:
            raise SumError(
                f"Cannot begin a masked sum: expected {MIN_MEMBERS} to {encoding.max_members} "
                f"members, got {len(public_keys)}. Wait for more, or encode for as many."
            )
        try:
            return cls(
                identity=identity,
                fusion=fusion,
                question=question,
                attempt=attempt,
                members=[
                    Invited(name=name, public_key=key) for name, key in sorted(public_keys.items())
                ],
                threshold=compute_threshold(len(public_keys)),
                length=encoding.layout.length,
                bits=encoding.bits,
                encoding=encoding.digest,
            )
        except ValidationError as error:
            raise SumError(
                f"Cannot begin a masked sum: expected valid terms, got "
                f"{clean(describe_offenders(error, whole='members'), 300)}. Check the members."
            ) from error

    def over(self, names: Collection[str], attempt: int) -> "Terms":
        """The terms of another attempt at the same question, over some of the members.

        Raises:
            SumError: If these are fewer than three, or not all members.
        """
        chosen = [member for member in self.members if member.name in names]
        if len(chosen) < MIN_MEMBERS or len(chosen) != len(set(names)):
            raise SumError(
                f"Cannot repeat a masked sum: expected {MIN_MEMBERS} or more of its "
                f"{len(self.members)} members, got {len(chosen)} of {len(names)}. Ask for others."
            )
        threshold = compute_threshold(len(chosen))
        changed = {"members": chosen, "attempt": attempt, "threshold": threshold}
        return self.model_copy(update=changed)

    @property
    def names(self) -> list[str]:
        """Who may take part, in order."""
        return [member.name for member in self.members]

    @property
    def context(self) -> str:
        """Hash of all of it; keys and signatures are bound to this."""
        return hash_bytes(canonical_json([_PURPOSE, self.model_dump(mode="json")]))

    @property
    def places(self) -> dict[str, int]:
        """Where each member's shares lie on the polynomials, from 1."""
        return {name: place for place, name in enumerate(self.names, start=1)}


class Message(UntrustedModel):
    """One message of one phase."""

    phase: str

    def to_bytes(self) -> bytes:
        """One line of JSON; equal messages, equal bytes."""
        return canonical_json(self.model_dump(mode="json"))

    @property
    def digest(self) -> str:
        """SHA-256 of its bytes."""
        return hash_bytes(self.to_bytes())


class MemberMessage(Message):
    """What a member says, signed.

    Attributes:
        member: Who says it.
        signature: Over the terms and all else of the message.
    """

    member: Name
    signature: Signature = ""

    def build_signed_bytes(self, context: str) -> bytes:
        """What is signed."""
        said = self.model_dump(mode="json", exclude={"signature"})
        return canonical_json([_PURPOSE, context, said])

    def signed(self, context: str, key: ec.EllipticCurvePrivateKey) -> "MemberMessage":
        """The same message with its signature."""
        return self.model_copy(update={"signature": sign(key, self.build_signed_bytes(context))})

    def check_signature(self, terms: Terms, context: str) -> None:
        """Refuse what the named member did not sign in this sum.

        Args:
            terms: The sum's.
            context: `terms.context`, which takes a while where members are many.

        Raises:
            SumError: If it did not, or has no part in the sum.
        """
        names = terms.names
        if self.member not in names:
            raise SumError(
                f"{describe_sender(self.member, self.phase)}: expected one of the "
                f"{len(names)} members of this sum, got another. Leave it out."
            )
        public = terms.members[names.index(self.member)].public_key
        try:
            verify(public, self.build_signed_bytes(context), self.signature)
        except MoloraError as error:
            raise SumError(
                f"{describe_sender(self.member, self.phase)}: expected that member's signature "
                "over this sum and phase, got another. Ask it to send it again."
            ) from error


class Keys(MemberMessage):
    """Member: its public keys of this sum, X25519.

    Attributes:
        mask_key: For the masks it shares with each other member.
        share_key: For what is sealed for it.
    """

    phase: Literal["keys"] = "keys"
    mask_key: Key
    share_key: Key


class KeysList(Message):
    """Coordinator: the keys of all who sent theirs, sorted by name."""

    phase: Literal["keys-list"] = "keys-list"
    keys: Annotated[list[Keys], Field(max_length=MAX_MEMBERS)]


class Shares(MemberMessage):
    """Member: shares of its two secrets, sealed for each other member.

    Attributes:
        keys: Digest of the list of keys.
        sealed: By recipient.
        mask_commitments: Hash of the share of the mask key, by holder, itself included.
        self_commitments: Hash of the share of the own mask's seed, the same.
        seed_commitment: Hash of that seed.
    """

    phase: Literal["shares"] = "shares"
    keys: Sha
    sealed: Annotated[dict[Name, SealedText], Field(max_length=MAX_MEMBERS)]
    mask_commitments: Annotated[dict[Name, Sha], Field(max_length=MAX_MEMBERS)]
    self_commitments: Annotated[dict[Name, Sha], Field(max_length=MAX_MEMBERS)]
    seed_commitment: Sha


class Sealed(UntrustedModel):
    """What one member sealed for the reader, and the hashes of the two shares in it."""

    member: Name
    text: SealedText
    mask_commitment: Sha
    self_commitment: Sha


class Deliver(Message):
    """Coordinator: what the others sealed for the reader, sorted by name.

    Those others and the reader are the participants, between whom masks are made.
    """

    phase: Literal["deliver"] = "deliver"
    sealed: Annotated[list[Sealed], Field(max_length=MAX_MEMBERS)]


class Masked(MemberMessage):
    """Member: its masked vector, which follows the line as raw little-endian words.

    Attributes:
        participants: Digest of the participants' names.
        unusable: Participants whose sealed shares could not be used.
        vector: SHA-256 of the words.
    """

    phase: Literal["masked"] = "masked"
    participants: Sha
    unusable: Names
    vector: Sha


class Survivors(Message):
    """Coordinator: whose masked vectors are in the total, and whose are not.

    Attributes:
        survivors: In.
        dropped: Participants that are not.
    """

    phase: Literal["survivors"] = "survivors"
    survivors: Names
    dropped: Names


class Agreement(MemberMessage):
    """Member: that it was told these survivors.

    Attributes:
        survivors: Digest of the message `Survivors`.
    """

    phase: Literal["agreement"] = "agreement"
    survivors: Sha


class Opening(Message):
    """Coordinator: who agreed, and of whom which secret is asked for.

    Attributes:
        survivors: Members whose own mask is opened.
        dropped: Members whose mask key is opened.
        agreements: Of at least `threshold` survivors.
    """

    phase: Literal["opening"] = "opening"
    survivors: Names
    dropped: Names
    agreements: Annotated[list[Agreement], Field(max_length=MAX_MEMBERS)]


class Revealed(MemberMessage):
    """Member: its shares of the survivors' own masks and of the dropped members' mask keys."""

    phase: Literal["revealed"] = "revealed"
    self_shares: Annotated[dict[Name, Share], Field(max_length=MAX_MEMBERS)]
    mask_shares: Annotated[dict[Name, Share], Field(max_length=MAX_MEMBERS)]


Read = TypeVar("Read", bound=Message)


def describe_sender(name: object, phase: str) -> str:
    """Start of an error about what somebody sent."""
    return f"Cannot use what '{clean(name, 63)}' sent in phase '{phase}' of a masked sum"


def max_message_bytes(members: int) -> int:
    """Largest line of JSON of a sum over so many members."""
    return _BYTES_BESIDE + _BYTES_A_MEMBER * members


def measure_phases(members: int) -> dict[str, int]:
    """Most bytes that a member sends in each phase of a sum, its masked vector's words aside.

    Args:
        members: Of the sum.
    """
    names = [f"{place:0{MAX_NAME}d}" for place in range(members)]
    sha, share = "0" * 64, "0" * (2 * SHARE_BYTES)
    who = names[0]
    longest = (
        Keys(member=who, mask_key=sha, share_key=sha),
        Shares(
            member=who,
            keys=sha,
            sealed=dict.fromkeys(names[1:], "0" * (2 * SEALED_BYTES)),
            mask_commitments=dict.fromkeys(names, sha),
            self_commitments=dict.fromkeys(names, sha),
            seed_commitment=sha,
        ),
        Masked(member=who, participants=sha, unusable=names[1:], vector=sha),
        Agreement(member=who, survivors=sha),
        Revealed(
            member=who,
            self_shares=dict.fromkeys(names, share),
            mask_shares=dict.fromkeys(names, share),
        ),
    )
    return {message.phase: len(message.to_bytes()) + MAX_SIGNATURE for message in longest}


def read_message(data: bytes, model: type[Read], *, sender: str, members: int) -> Read:
    """Read one line of JSON that came from outside.

    Args:
        data: The line.
        model: What it has to be.
        sender: Who sent it, for errors.
        members: Number of members of the sum, which bounds the size.

    Raises:
        SumError: If it is too large, no JSON, or something else.
    """
    phase = str(model.model_fields["phase"].default)
    try:
        return model.model_validate(parse_json(data, max_bytes=max_message_bytes(members)))
    except ValidationError as error:
        got = describe_offenders(error, whole="message")
    except ValueError as error:
        got = clean(error, 100)
    raise SumError(
        f"{describe_sender(sender, phase)}: expected a well-formed message of that phase, got "
        f"{clean(got, 300)}. Run the same molora-fed version on both sides."
    )
