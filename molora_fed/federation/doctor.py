"""What can be wrong on a machine that serves or joins: one line a problem, with what to do.

Looks and changes nothing. Imports neither torch nor flwr.
"""

import datetime
import email.utils
import http.client
import socket
import ssl
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from molora_fed.charter import load_charter
from molora_fed.cooperative.pins import check_pins
from molora_fed.errors import FederationError, MoloraError, PluginError
from molora_fed.federation.acceptance import read_connection
from molora_fed.federation.certificates import RENEW_DAYS, ServerCertificate
from molora_fed.federation.confine import describe_confinement
from molora_fed.federation.homes import ContributorHome, CoordinatorHome
from molora_fed.federation.invitations import read_address
from molora_fed.federation.mailbox import read_json
from molora_fed.federation.overview import NOT_RUNNING, read_contributor, read_server
from molora_fed.federation.supervise import is_running
from molora_fed.plugins import Plugins
from molora_fed.serving.addresses import parse_server
from molora_fed.storage.locks import is_held
from molora_fed.storage.untrusted import clean

__all__ = ["Finding", "examine"]

MAX_SKEW_SECONDS = 60.0
"""Flower takes requests that were signed within five minutes of its own clock."""
LEAST_FREE_BYTES = 2**30
BASES = 4
"""Free space, as a multiple of the base's files: bank, results and their temporary copies."""
ANSWER_SECONDS = 5.0
_SECRETS = ("key.pem", "node.pem", "keys/coordinator.pem", "keys/authority.pem", "tls/server.key")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        subject: What.
        message: What was found; of a problem also what to do.
        is_problem: Whether something has to be done.
    """

    subject: str
    message: str
    is_problem: bool = False


def examine(home: CoordinatorHome | ContributorHome | None, plugins: Plugins) -> Iterator[Finding]:
    """Look at this installation, and at a home if there is one.

    Args:
        home: The coordinator's or the contributor's; None looks at the installation alone.
        plugins: What is registered here.

    Yields:
        What was found; a look that fails itself is a problem, and the others go on.
    """
    looks: list[Callable[[], Iterator[Finding]]] = [
        _look_at_versions,
        lambda: _look_at_plugins(plugins),
        _look_at_system,
    ]
    if home is not None:
        looks += [lambda: _look_at_disk(home), lambda: _look_at_rights(home)]
        looks.append(lambda: _look_at_pins(home, plugins))
        looks.append(lambda: _look_at_what_is_left(home))
        looks.append(lambda: _look_at_privacy(home))
    if isinstance(home, CoordinatorHome):
        looks += [lambda: _look_at_server(home), lambda: _look_at_certificate(home)]
    elif isinstance(home, ContributorHome):
        looks.append(lambda: _look_at_contributor(home))
    for look in looks:
        try:
            yield from look()
        except (MoloraError, OSError, ValueError, KeyError, TypeError) as error:
            yield Finding("looking", clean(error, 500), is_problem=True)


def _look_at_versions() -> Iterator[Finding]:
    wrong = []
    for line in metadata.requires("molora-fed") or ():
        with suppress(InvalidRequirement):
            needed = Requirement(line)
            if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
                continue
            try:
                installed = metadata.version(needed.name)
            except metadata.PackageNotFoundError:
                wrong.append(f"{needed.name}{needed.specifier} (got none)")
                continue
            if not needed.specifier.contains(installed, prereleases=True):
                wrong.append(f"{needed.name}{needed.specifier} (got {installed})")
    python = ".".join(map(str, sys.version_info[:3]))
    own = metadata.version("molora-fed")
    if wrong:
        text = f"expected {', '.join(wrong)}. Install molora-fed again."
        yield Finding("versions", text, is_problem=True)
    else:
        flower = metadata.version("flwr")
        yield Finding("versions", f"molora-fed {own}, Python {python}, flwr {flower}")


def _look_at_plugins(plugins: Plugins) -> Iterator[Finding]:
    for failure in plugins.failures:
        yield Finding("plugins", clean(failure, 500), is_problem=True)


def _look_at_pins(home: CoordinatorHome | ContributorHome, plugins: Plugins) -> Iterator[Finding]:
    """Whether the plugins that a home's charter pins are here."""
    if not isinstance(home, CoordinatorHome) and not home.charter.is_dir():
        return  # the first join
    charter = load_charter(home.charter)
    try:
        check_pins(charter, plugins)
    except PluginError as error:
        yield Finding("pinned plugins", clean(error, 1_000), is_problem=True)
        return
    if charter.amendment.plugins:
        names = ", ".join(pin.title for pin in charter.amendment.plugins)
        yield Finding("pinned plugins", names)


def _look_at_system() -> Iterator[Finding]:
    reason = describe_confinement()
    if reason:
        yield Finding(
            "confinement",
            f"processes on the network keep all rights of their user: {reason}. Run them as a user "
            "of their own.",
            is_problem=True,
        )
    else:
        yield Finding("confinement", "processes on the network are confined (Landlock)")


def _look_at_disk(home: CoordinatorHome | ContributorHome) -> Iterator[Finding]:
    overview = read_server(home) if isinstance(home, CoordinatorHome) else read_contributor(home)
    base = sum(path.stat().st_size for path in home.base.rglob("*") if path.is_file())
    needed = max(LEAST_FREE_BYTES, BASES * base)
    free, least = overview.free_bytes / 1e9, needed / 1e9
    text = f"{free:.1f} GB free, {least:.1f} GB wanted"
    if overview.free_bytes < needed:
        yield Finding("disk", f"{text} below '{home.root}'. Free some space.", is_problem=True)
    else:
        yield Finding("disk", text)
    for problem in overview.problems:
        if problem != NOT_RUNNING:  # `_look_at_server` says it
            yield Finding("state", problem, is_problem=True)


def _look_at_privacy(home: CoordinatorHome | ContributorHome) -> Iterator[Finding]:
    """What leaves contributors, and what the coordinator asked for beyond it."""
    if isinstance(home, CoordinatorHome):
        yield Finding("privacy", load_charter(home.charter).privacy)
        return
    known = read_contributor(home)
    if known.privacy:
        yield Finding("privacy", known.privacy)
    if known.refusals:
        text = f"a question was refused, {known.refusals[-1]} All are in '{home.refusals_log}'."
        yield Finding("questions", text, is_problem=True)


def _look_at_rights(home: CoordinatorHome | ContributorHome) -> Iterator[Finding]:
    found = False
    for path, most in [(home.root, 0o700), *((home.root / name, 0o600) for name in _SECRETS)]:
        with suppress(FileNotFoundError):
            mode = stat.S_IMODE(path.stat().st_mode)
            if mode & ~most:
                found = True
                text = f"expected mode {most:04o} of '{path}', got {mode:04o}. Run chmod {most:o}."
                yield Finding("rights", text, is_problem=True)
    if not found:
        yield Finding("rights", "home and keys are closed to other users")


def _look_at_what_is_left(home: CoordinatorHome | ContributorHome) -> Iterator[Finding]:
    """Errors, processes and letters that earlier runs left."""
    is_served = is_held(
        home.root / ("serve.lock" if isinstance(home, CoordinatorHome) else "join.lock")
    )
    error = read_json(home.error_file)
    if isinstance(error, dict) and not is_served:
        text = clean(error.get("message", "ended by an error"), 500)
        yield Finding("last run", text, is_problem=True)
    if not is_served:
        for entry in read_json(home.root / "processes.json") or []:
            if is_running(int(entry["pid"])):
                text = (
                    f"process {entry['pid']} of an earlier run is at work. Start again: it ends it."
                )
                yield Finding("processes", text, is_problem=True)
    aside = sorted(home.mail.rglob("*.malformed"))
    if aside:
        names = ", ".join(path.name.removesuffix(".malformed") for path in aside[:4])
        text = f"{len(aside)} letters were malformed and set aside ({names}). The logs say why."
        yield Finding("letters", text, is_problem=True)


def _look_at_server(home: CoordinatorHome) -> Iterator[Finding]:
    if not is_held(home.root / "serve.lock"):
        yield Finding(
            "server", f"it is not running. Start `molora serve {home.root}`.", is_problem=True
        )
        return
    certificate = ServerCertificate(home.root).authority_file
    authority = certificate if certificate.exists() else None
    yield from _look_at_answer("address", read_address(home), authority)


def _look_at_certificate(home: CoordinatorHome) -> Iterator[Finding]:
    expires = ServerCertificate(home.root).expires
    if expires is None:
        return
    days = (expires - datetime.datetime.now(datetime.UTC)) / datetime.timedelta(days=1)
    if days < RENEW_DAYS - 1:  # `molora serve` renews it before
        text = f"ends in {days:.0f} days" if days > 0 else f"ended {-days:.0f} days ago"
        fix = "Start `molora serve` again: it makes a new one."
        yield Finding("certificate", f"{text}. {fix}", is_problem=True)
    else:
        yield Finding("certificate", f"valid for {days:.0f} days")


def _look_at_contributor(home: ContributorHome) -> Iterator[Finding]:
    connection = read_connection(home)
    if connection is None:
        yield Finding("server", "no invitation was accepted here; nothing to reach")
        return
    yield from _look_at_answer("server", connection.server, home.authority_file)
    if not is_held(home.root / "join.lock") and not home.result.is_dir():
        text = f"it is not running. Go on with `molora join --home {home.root}`."
        yield Finding("contributor", text, is_problem=True)


def _look_at_answer(subject: str, server: str, authority: Path | None) -> Iterator[Finding]:
    """Whether a server can be reached, is who it should be, and has this machine's time."""
    host, port = parse_server(server)
    try:
        date = _ask_health(host, port, authority)
    except socket.gaierror:
        text = f"the name '{host}' is not known. Check it, and this machine's name service."
        yield Finding(subject, text, is_problem=True)
        return
    except ssl.SSLCertVerificationError as error:
        text = f"{server} shows another certificate: {error.verify_message}. Ask the coordinator."
        yield Finding(subject, text, is_problem=True)
        return
    except (OSError, http.client.HTTPException, FederationError) as error:
        text = f"{server} does not answer: {error}. Check address, port, firewall and server."
        yield Finding(subject, clean(text, 500), is_problem=True)
        return
    yield Finding(subject, f"{server} answers")
    if date is None:
        return
    ahead = time.time() - date
    if abs(ahead) > MAX_SKEW_SECONDS:
        way = "ahead of" if ahead > 0 else "behind"
        text = f"this machine's is {abs(ahead):.0f} s {way} the server's. Set it by NTP."
        yield Finding("clock", text, is_problem=True)
    else:
        yield Finding("clock", f"within {MAX_SKEW_SECONDS:.0f} s of the server's")


def _ask_health(host: str, port: int, authority: Path | None) -> float | None:
    """Ask a server for its health.

    Returns:
        Its time, seconds since 1970; None if it does not say.

    Raises:
        FederationError: If it answers something else.
        OSError: If it does not answer, or TLS fails.
        http.client.HTTPException: If it speaks something else.
    """
    if authority is None:
        connection = http.client.HTTPConnection(host, port, timeout=ANSWER_SECONDS)
    else:
        context = ssl.create_default_context(cafile=str(authority))
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        connection = http.client.HTTPSConnection(
            host, port, timeout=ANSWER_SECONDS, context=context
        )
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        if answer.status != 200:
            raise FederationError(f"status {answer.status}")
        date = email.utils.parsedate_to_datetime(answer.getheader("date", ""))
    except (TypeError, ValueError):
        return None
    finally:
        connection.close()
    return date.timestamp()
