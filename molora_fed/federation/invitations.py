"""An invitation: one line that a coordinator hands to one person, and what becomes of it.

It names the server, the hash of the certificate authority that vouches for it, the charter's
identity and the coordinator's key, so that its user trusts nothing it meets on the way; and a
secret, so that the server trusts its user, once.
"""

import base64
import binascii
import re
from dataclasses import asdict, dataclass, fields
from typing import Any

from pydantic import ValidationError

from molora_fed.charter import load_charter
from molora_fed.errors import (
    ConfigError,
    MoloraError,
    StorageError,
)
from molora_fed.federation.certificates import ServerCertificate
from molora_fed.federation.envelopes import open_letter
from molora_fed.federation.gateway import INVITATION_BYTES, Refusal
from molora_fed.federation.homes import CoordinatorHome
from molora_fed.federation.letters import CharterLetter
from molora_fed.federation.mailbox import read_json
from molora_fed.federation.members import Members, Redemption
from molora_fed.serving.addresses import DEFAULT_PORT, format_server, parse_server
from molora_fed.storage.files import (
    canonical_json,
    hash_bytes,
    make_home,
    write_json,
)
from molora_fed.storage.keys import (
    build_public_pem,
    key_fingerprint,
    load_or_make_key,
)
from molora_fed.storage.names import check_name
from molora_fed.storage.untrusted import clean, parse_json

__all__ = [
    "Invitation",
    "answer_redemption",
    "keep_address",
    "make_invitation",
    "parse_invitation",
    "read_address",
]

_PREFIX = "molora1"
_MAX_CHARACTERS = 2_048
_SERVER = re.compile(r"([A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]):[0-9]{1,5}")


@dataclass(frozen=True)
class Invitation:
    """What an invitation says.

    Attributes:
        server: "HOST:PORT".
        authority: SHA-256 of the authority's certificate.
        charter: The charter's identity.
        coordinator: Fingerprint of the coordinator's key.
        secret: Used once.
        name: Name its user will have.
        domain: Domain its user will train on.
        expires: Until when it may be used, seconds since 1970.
    """

    server: str
    authority: str
    charter: str
    coordinator: str
    secret: str
    name: str
    domain: str
    expires: int

    @property
    def id(self) -> str:
        """Hash of the secret, by which the server knows it."""
        return hash_bytes(self.secret.encode())

    def __str__(self) -> str:
        payload = base64.urlsafe_b64encode(canonical_json(asdict(self))).decode().rstrip("=")
        return f"{_PREFIX}.{payload}.{hash_bytes(payload.encode())[:8]}"

    def __repr__(self) -> str:
        return f"Invitation(name={self.name!r}, server={self.server!r})"  # no secret in a log


def keep_address(home: CoordinatorHome, address: str, port: int) -> tuple[str, ...]:
    """Keep by which address members reach a server; invitations name it.

    Args:
        home: The coordinator's home.
        address: "HOST" or "HOST:PORT"; empty keeps the one there is.
        port: The server's port, where the address has none.

    Returns:
        The names the server's certificate needs: the address's host, if there is an address.

    Raises:
        CharterError: If there is no cooperative in the folder.
        ConfigError: If it is malformed.
        StorageError: On I/O errors.
    """
    load_charter(home.charter)
    if address:
        host, own_port = parse_server(address, port)
        write_json(home.address_file, {"host": host, "port": own_port})
    kept = read_json(home.address_file) or {}
    return (str(kept["host"]),) if "host" in kept else ()


def read_address(home: CoordinatorHome) -> str:
    """The address that invitations name: the one kept, or this machine's."""
    kept = read_json(home.address_file) or {"host": "127.0.0.1", "port": DEFAULT_PORT}
    return format_server(str(kept["host"]), int(kept["port"]))


def make_invitation(
    home: CoordinatorHome, name: str, domain: str, *, days: float, server: str
) -> Invitation:
    """The coordinator's side: make an invitation to a cooperative.

    Args:
        home: The coordinator's home.
        name: Name its user will have.
        domain: Domain its user will train on.
        days: For how long it may be used.
        server: "HOST:PORT" by which its user reaches the server.

    Raises:
        CharterError: If there is no cooperative in the folder.
        ConfigError: If a name is malformed or taken, or the charter asks for other domains.
        StorageError: On I/O errors.
    """
    charter = load_charter(home.charter)
    wanted = charter.amendment.domains
    if wanted and domain not in wanted:
        raise ConfigError(
            f"Cannot invite '{name}': expected one of the charter's domains {', '.join(wanted)}, "
            f"got '{domain}'. Choose another with --domain, or amend the charter."
        )
    make_home(home.root)
    key = load_or_make_key(home.key)
    secret, expires = Members(home.members).invite(name, domain, days=days)
    authority = ServerCertificate(home.root).prepare_authority()
    return Invitation(
        server=server,
        authority=authority,
        charter=charter.identity_hash,
        coordinator=key_fingerprint(build_public_pem(key)),
        secret=secret,
        name=name,
        domain=domain,
        expires=expires,
    )


def parse_invitation(text: str) -> Invitation:
    """Read an invitation.

    Raises:
        ConfigError: If it is incomplete or malformed.
    """
    wrong = ConfigError(
        "Cannot read the invitation: expected the whole line that `molora coop invite` printed, "
        "got another. Copy it again, from 'molora1.' to its end."
    )
    text = "".join(text[: 2 * _MAX_CHARACTERS].split())
    prefix, _, rest = text.partition(".")
    payload, _, check = rest.partition(".")
    if prefix != _PREFIX or len(text) > _MAX_CHARACTERS:
        raise wrong
    if hash_bytes(payload.encode())[:8] != check:
        raise wrong
    try:
        raw = base64.b64decode(payload + "=" * (-len(payload) % 4), b"-_", validate=True)
        value = parse_json(raw, max_bytes=_MAX_CHARACTERS, max_depth=1)
        if not isinstance(value, dict) or set(value) != {
            field.name for field in fields(Invitation)
        }:
            raise ValueError("other keys")
        for field in fields(Invitation):
            if type(value[field.name]) is not field.type:
                raise ValueError(field.name)
        invitation = Invitation(**value)
        for known in (invitation.authority, invitation.charter, invitation.coordinator):
            if len(known) != 64 or not set(known) <= set("0123456789abcdef"):
                raise ValueError("a hash")
        if not _SERVER.fullmatch(invitation.server):
            raise ValueError("a server")
        check_name("name", invitation.name)
        check_name("domain", invitation.domain)
    except (ValueError, binascii.Error) as error:
        raise wrong from error
    return invitation


def answer_redemption(
    body: bytes, members: Members, home: CoordinatorHome, authority: str
) -> dict[str, Any]:
    """The server's side: make a member of whoever holds an invitation.

    An empty object asks for the authority's certificate alone, which is no secret; its hash is in
    the invitation.

    Args:
        body: JSON of a `Redemption`, or `{}`.
        members: The cooperative's members.
        home: The coordinator's home.
        authority: The authority's certificate, PEM.

    Raises:
        Refusal: If it is malformed, or the invitation cannot be used.
    """
    try:
        value = parse_json(body, max_bytes=INVITATION_BYTES, max_depth=2)
        if value == {}:
            return {"authority": authority}
        redemption = Redemption.model_validate(value)
    except (ValidationError, ValueError) as error:
        raise Refusal(422, "Expected an invitation's secret, two keys and a signature") from error
    try:
        charter = open_letter(home.outbox / "charter.json", CharterLetter)
        if charter is None:
            raise Refusal(503, "The server is still starting")
        member = members.redeem(redemption)
    except StorageError as error:
        raise Refusal(503, "The server cannot write its members") from error
    except MoloraError as error:
        raise Refusal(403, clean(error, 400)) from error
    return {"charter": charter.to_json(), "name": member.name, "domain": member.domain}
