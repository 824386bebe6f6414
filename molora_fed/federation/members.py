"""Who belongs to a cooperative: members by the key of their node, and invitations not yet used.

An invitation is a secret that is used once, before it expires, and is kept as its hash only.
Whoever uses it becomes a member under the name and domain that were written into it. Files are
whole or not there; `molora coop invite` and `revoke` write them while the server reads.
"""

import os
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import Field

from molora_fed.errors import ConfigError, FederationError, MoloraError, SignatureError
from molora_fed.storage.files import canonical_json, hash_bytes, make_home, write_bytes
from molora_fed.storage.keys import key_fingerprint, verify
from molora_fed.storage.names import check_name
from molora_fed.storage.settings import UntrustedModel, read_model
from molora_fed.storage.untrusted import clean

__all__ = ["Member", "Members", "OpenInvitation", "Redemption", "build_redemption_bytes"]

DAY_SECONDS = 86_400
MAX_DAYS = 365
_FILE_BYTES = 8_192

Record = TypeVar("Record", "Member", "OpenInvitation")

_Name = Annotated[str, Field(min_length=1, max_length=63)]
_Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_Pem = Annotated[str, Field(max_length=1_024)]
_Time = Annotated[int, Field(ge=0, lt=2**53)]


class Member(UntrustedModel):
    """One member.

    Attributes:
        name: Name, bound by the invitation.
        domain: Domain, bound by the invitation.
        node_key: Public key of its node, PEM; what speaks for it on the network.
        contributor: Fingerprint of its contributor's key, which signs what it contributes.
        invitation: Hash of the secret it came with.
        joined: When it used the invitation, seconds since 1970.
        revoked: When it was turned away, seconds since 1970; 0 while it is a member.
    """

    name: _Name
    domain: _Name
    node_key: _Pem
    contributor: _Hash
    invitation: _Hash
    joined: _Time
    revoked: _Time = 0


class OpenInvitation(UntrustedModel):
    """An invitation that nobody has used.

    Attributes:
        name: Name its user will have.
        domain: Domain its user will train on.
        expires: Until when it may be used, seconds since 1970.
    """

    name: _Name
    domain: _Name
    expires: _Time


class Redemption(UntrustedModel):
    """What the user of an invitation sends.

    Attributes:
        secret: The invitation's secret.
        node_key: Public key of the node, PEM.
        contributor_key: Public key of the contributor, PEM.
        signature: Of `build_redemption_bytes`, by the contributor's key.
    """

    secret: Annotated[str, Field(min_length=1, max_length=128)]
    node_key: _Pem
    contributor_key: _Pem
    signature: Annotated[str, Field(max_length=512)]


def build_redemption_bytes(secret: str, node_key: str) -> bytes:
    """What a contributor's key signs, so that nobody joins in another's name."""
    return canonical_json(
        {
            "purpose": "molora-invitation-1",
            "invitation": hash_bytes(secret.encode()),
            "node_key": node_key,
        }
    )


class Members:
    """The members and invitations below a folder.

    Args:
        folder: Folder of the coordinator's home.
        now: Seconds since 1970.
    """

    def __init__(self, folder: Path, now: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._invitations = folder / "invitations"
        self._now = now
        self._lock = threading.Lock()
        self._seen = -1
        self._by_key: dict[str, Member] = {}

    def prepare(self) -> None:
        """Make the folders.

        Raises:
            StorageError: On I/O errors.
        """
        make_home(self._folder)
        make_home(self._invitations)

    def list_members(self) -> list[Member]:
        """All that ever joined, by name; a file that cannot be read is left out."""
        found = []
        for path in sorted(self._folder.glob("*.json")):
            try:
                found.append(_read(path, Member))
            except FederationError:
                continue
        return sorted(found, key=lambda member: (member.name, member.joined))

    def list_invitations(self) -> list[OpenInvitation]:
        """Invitations that can still be used, by name."""
        found = []
        for path in sorted(self._invitations.glob("*.json")):
            try:
                invitation = _read(path, OpenInvitation)
            except FederationError:
                continue
            if invitation.expires > self._now():
                found.append(invitation)
        return sorted(found, key=lambda invitation: invitation.name)

    def find(self, node_key: str) -> Member | None:
        """The member with this node key, if it is one now."""
        try:
            changed = self._folder.stat().st_mtime_ns
        except OSError:
            return None
        with self._lock:
            if changed != self._seen:
                members = self.list_members()
                self._by_key = {m.node_key: m for m in members if not m.revoked}
                self._seen = changed
            return self._by_key.get(node_key)

    def invite(self, name: str, domain: str, *, days: float) -> tuple[str, int]:
        """Make an invitation.

        Args:
            name: Name its user will have.
            domain: Domain its user will train on.
            days: For how long it may be used.

        Returns:
            Its secret, which is kept nowhere, and until when it may be used, seconds since 1970.

        Raises:
            ConfigError: If a name is malformed, a member has it, or the time is out of range.
            StorageError: On I/O errors.
        """
        check_name("name", name)
        check_name("domain", domain)
        if not 0 < days <= MAX_DAYS:
            raise ConfigError(
                f"Cannot invite '{name}': expected 0 to {MAX_DAYS} days, got {days}. "
                "Choose another number with --days."
            )
        if any(member.name == name and not member.revoked for member in self.list_members()):
            raise ConfigError(
                f"Cannot invite '{name}': expected a name that no member has, got a member's. "
                f"Choose another, or turn the member away first with `molora coop revoke`."
            )
        self.prepare()
        self._drop_expired()
        secret = secrets.token_urlsafe(24)
        invitation = OpenInvitation(
            name=name, domain=domain, expires=int(self._now() + days * DAY_SECONDS)
        )
        _write(self._invitations / f"{hash_bytes(secret.encode())}.json", invitation)
        return secret, invitation.expires

    def redeem(self, redemption: Redemption) -> Member:
        """Make a member of an invitation's user; the same user may repeat it.

        Raises:
            FederationError: If there is no such invitation any more, or a member has its name.
            SignatureError: If a key is malformed, or the contributor's did not sign.
            StorageError: On I/O errors; nothing has changed then.
        """
        signed = build_redemption_bytes(redemption.secret, redemption.node_key)
        verify(redemption.contributor_key, signed, redemption.signature, what="invitation")
        contributor = key_fingerprint(redemption.contributor_key)
        node = key_fingerprint(redemption.node_key)
        if node == contributor:
            raise SignatureError(
                "Cannot join: expected a node's key that signs nothing else, got the "
                "contributor's. Run the same molora-fed version on both sides."
            )
        invitation_id = hash_bytes(redemption.secret.encode())
        path = self._invitations / f"{invitation_id}.json"
        with self._lock:
            member_file = self._folder / f"{node}.json"
            if member_file.exists():
                member = _read(member_file, Member)
                if member.invitation == invitation_id and not member.revoked:
                    path.unlink(missing_ok=True)  # the answer was lost, or a crash came between
                    return member
                raise _unusable()
            try:
                invitation = _read(path, OpenInvitation)
            except FederationError as error:
                raise _unusable() from error
            if invitation.expires <= self._now():
                raise _unusable()
            for member in self.list_members():
                if member.invitation == invitation_id or (
                    member.name == invitation.name and not member.revoked
                ):
                    raise _unusable()
            member = Member(
                name=invitation.name,
                domain=invitation.domain,
                node_key=redemption.node_key,
                contributor=contributor,
                invitation=invitation_id,
                joined=int(self._now()),
            )
            _write(member_file, member)
            path.unlink(missing_ok=True)
            return member

    def revoke(self, name: str) -> int:
        """Turn a member away, and take back its invitations; its key never comes back.

        Returns:
            How many members and invitations there were.

        Raises:
            ConfigError: If there is nobody of that name.
            StorageError: On I/O errors.
        """
        count = 0
        for path in sorted(self._folder.glob("*.json")):
            try:
                member = _read(path, Member)
            except FederationError:
                continue
            if member.name == name and not member.revoked:
                _write(path, member.model_copy(update={"revoked": int(self._now())}))
                count += 1
        for path in sorted(self._invitations.glob("*.json")):
            try:
                invited = _read(path, OpenInvitation).name
            except FederationError:
                continue
            if invited == name:
                path.unlink(missing_ok=True)
                count += 1
        if not count:
            names = sorted({member.name for member in self.list_members() if not member.revoked})
            raise ConfigError(
                f"Cannot revoke '{clean(name, 80)}': expected a member or an invited name, got "
                f"neither. Members are: {', '.join(names) or 'nobody'}."
            )
        return count

    def _drop_expired(self) -> None:
        for path in self._invitations.glob("*.json"):
            try:
                expires = _read(path, OpenInvitation).expires
            except FederationError:
                continue
            if expires <= self._now():
                path.unlink(missing_ok=True)


def _unusable() -> MoloraError:
    """One answer for all: a guess learns nothing."""
    return FederationError(
        "Cannot join with this invitation: expected one that is unused and has not expired, got "
        "another. Ask the coordinator for a new one."
    )


def _read(path: Path, model: type[Record]) -> Record:
    return read_model(
        path,
        model,
        what=f"Cannot read '{path}'",
        error=FederationError,
        fix="Restore it from a backup, or delete it and invite again.",
        max_bytes=_FILE_BYTES,
    )


def _write(path: Path, record: UntrustedModel) -> None:
    write_bytes(path, record.model_dump_json(indent=2).encode() + b"\n", mode=0o600)
    os.utime(path.parent)  # the folder's time tells the server that something changed
