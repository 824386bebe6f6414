"""The contributor's side of an invitation: used once, what it pins is kept in the home."""

import json
import ssl
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

import httpx

from molora_fed.errors import ConfigError, FederationError, ServerUnreachableError
from molora_fed.federation.certificates import hash_certificate
from molora_fed.federation.envelopes import parse_letter
from molora_fed.federation.gateway import INVITATION_PATH
from molora_fed.federation.homes import ContributorHome
from molora_fed.federation.invitations import Invitation
from molora_fed.federation.letters import CharterLetter
from molora_fed.federation.mailbox import read_json
from molora_fed.federation.members import Redemption, build_redemption_bytes
from molora_fed.federation.signing import open_charter
from molora_fed.serving.addresses import format_server, parse_server
from molora_fed.storage.files import make_home, replace_folder, write_bytes, write_json
from molora_fed.storage.keys import (
    build_public_pem,
    key_fingerprint,
    load_or_make_key,
    sign,
)
from molora_fed.storage.untrusted import clean, parse_json

__all__ = ["Connection", "accept_invitation", "follow_server", "read_connection"]

_ANSWER_BYTES = 2 * 2**20
_SECONDS = 30.0
_START_SECONDS = 20.0
"""How long a server that does not answer, or is only starting, is asked again."""
_PAUSE_SECONDS = 2.0  # the gateway lets a stranger ask once a second


_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class Connection:
    """What an accepted invitation left in a contributor's home.

    Attributes:
        server: "HOST:PORT".
        invitation: Hash of the invitation's secret.
        name: The member's name.
        domain: The domain it trains on.
    """

    server: str
    invitation: str
    name: str
    domain: str


def read_connection(home: ContributorHome) -> Connection | None:
    """The connection of a home; None if no invitation was accepted there.

    Raises:
        FederationError: If its file is malformed.
    """
    kept = read_json(home.connection_file)
    if kept is None:
        return None
    try:
        return Connection(**{field.name: str(kept[field.name]) for field in fields(Connection)})
    except (KeyError, TypeError) as error:
        raise FederationError(
            f"Cannot read '{home.connection_file}': expected an accepted invitation, got {error}. "
            "Ask the coordinator for a new one, and use another --home."
        ) from error


def follow_server(home: ContributorHome, address: str) -> Connection:
    """Keep another address of the server; it has to show the same authority's certificate there.

    Args:
        home: A home in which an invitation was accepted.
        address: "HOST" or "HOST:PORT"; a port that is left out stays what it is.

    Raises:
        ConfigError: If the address is malformed, or no invitation was accepted in the home.
        FederationError: If the connection's file is malformed.
        StorageError: On I/O errors.
    """
    kept = read_connection(home)
    if kept is None:
        raise ConfigError(
            f"Cannot follow the server to {clean(address, 80)}: expected a home in which an "
            f"invitation was accepted, got '{home.root}'. Join with the invitation first."
        )
    _, port = parse_server(kept.server)
    moved = replace(kept, server=format_server(*parse_server(address, port)))
    write_json(home.connection_file, asdict(moved))
    return moved


def accept_invitation(invitation: Invitation, home: ContributorHome) -> None:
    """The contributor's side: become a member; does nothing in a home that is one already.

    The authority's certificate, the charter and the coordinator's key are kept in the home, and
    hold there for ever after.

    Args:
        invitation: The invitation.
        home: The contributor's home; its keys are made if it has none.

    Raises:
        ConfigError: If the home belongs to another member.
        ServerUnreachableError: If the server does not answer.
        FederationError: If it is not the server of the invitation, or turns its user away.
        SignatureError: If the charter is not signed by the coordinator.
        StorageError: On I/O errors.
    """
    kept = read_connection(home)
    if kept is not None:
        if kept.invitation == invitation.id:
            return
        raise ConfigError(
            f"Cannot join in '{home.root}': expected an empty home for a new invitation, got that "
            f"of '{clean(kept.name, 80)}'. Use another --home."
        )
    make_home(home.root)
    key, node_key = load_or_make_key(home.key), load_or_make_key(home.node_key)
    authority = _insist(lambda: _fetch_authority(invitation))
    node_pem = build_public_pem(node_key)
    redemption = Redemption(
        secret=invitation.secret,
        node_key=node_pem,
        contributor_key=build_public_pem(key),
        signature=sign(key, build_redemption_bytes(invitation.secret, node_pem)),
    )
    context = ssl.create_default_context(cadata=authority)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    answer = _insist(lambda: _post(invitation, redemption.model_dump(), context))
    letter = parse_letter(CharterLetter, answer.get("charter"), what="the server's charter")
    charter = open_charter(letter)
    for what, expected, got in (
        ("coordinator's key", invitation.coordinator, key_fingerprint(letter.public_key)),
        ("charter", invitation.charter, charter.identity_hash),
    ):
        if expected != got:
            raise FederationError(
                f"Cannot join at {invitation.server}: expected the {what} {expected[:16]} of the "
                f"invitation, got {got[:16]}. Ask the coordinator for a new invitation."
            )
    with replace_folder(home.charter) as folder:
        write_bytes(folder / "coordinator.pem", letter.public_key.encode())
        write_bytes(folder / "cooperative.toml", letter.text.encode())
    write_bytes(home.authority_file, authority.encode())
    connection = Connection(invitation.server, invitation.id, invitation.name, invitation.domain)
    write_json(home.connection_file, asdict(connection))


def _insist(ask: Callable[[], _Answer]) -> _Answer:
    """Ask until the server is there; to use an invitation twice with the same keys changes nothing.

    Raises:
        ServerUnreachableError: If it is not there in time.
    """
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            return ask()
        except ServerUnreachableError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(_PAUSE_SECONDS)


def _fetch_authority(invitation: Invitation) -> str:
    """The authority's certificate, from whoever answers; its hash makes it the right one."""
    unverified = ssl.create_default_context()
    unverified.check_hostname = False
    unverified.verify_mode = ssl.CERT_NONE
    authority = str(_post(invitation, {}, unverified).get("authority", ""))
    found = hash_certificate(authority)
    if found != invitation.authority:
        raise FederationError(
            f"Cannot join at {invitation.server}: expected the certificate authority "
            f"{invitation.authority[:16]} of the invitation, got {found[:16]}. Somebody else "
            "answers there: check the address, and ask the coordinator for a new invitation."
        )
    return authority


def _post(invitation: Invitation, value: Any, context: ssl.SSLContext) -> dict[str, Any]:
    url = f"https://{invitation.server}{INVITATION_PATH}"
    try:
        with (
            httpx.Client(verify=context, timeout=_SECONDS, follow_redirects=False) as client,
            client.stream("POST", url, content=json.dumps(value)) as response,
        ):
            body = b""
            for piece in response.iter_bytes():
                body += piece
                if len(body) > _ANSWER_BYTES:
                    raise ValueError("too much")
            status = response.status_code
        answer = parse_json(body, max_bytes=_ANSWER_BYTES)
        if not isinstance(answer, dict):
            raise ValueError("no object")
    except (httpx.HTTPError, httpx.InvalidURL, ssl.SSLError) as error:
        raise ServerUnreachableError(
            f"Cannot join at {clean(invitation.server, 80)}: expected the invitation's server, got "
            f"{clean(error, 120) or type(error).__name__}. Check that it runs and can be reached, "
            "then run the same command again."
        ) from error
    except ValueError as error:
        raise FederationError(
            f"Cannot join at {clean(invitation.server, 80)}: expected an answer in JSON, got "
            f"{clean(error, 80)}. Run the same molora-fed version on both sides."
        ) from error
    if status == 503:
        raise ServerUnreachableError(
            f"Cannot join at {clean(invitation.server, 80)}: expected a server that has started, "
            f"got status 503, {clean(answer.get('detail'), 80)}. Try again in a minute."
        )
    if status != 200:
        raise FederationError(
            str(clean(answer.get("detail"), 400))
            if status == 403
            else f"Cannot join at {clean(invitation.server, 80)}: expected to be let in, got "
            f"status {status}, {clean(answer.get('detail'), 80)}. Try again in a minute."
        )
    return answer
