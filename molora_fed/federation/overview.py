"""What a server's or a contributor's home says of itself, while it runs and when it does not.

Read from the home's files alone, so that it needs no running process and disturbs none. Imports
neither torch nor flwr.
"""

import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from molora_fed.charter import load_charter
from molora_fed.errors import CharterError, ConfigError, FederationError, MoloraError
from molora_fed.federation.acceptance import read_connection
from molora_fed.federation.consent import (
    has_consent,
)
from molora_fed.federation.envelopes import read_letter
from molora_fed.federation.homes import ContributorHome, ContributorMailbox, CoordinatorHome
from molora_fed.federation.invitations import read_address
from molora_fed.federation.kept import Offer
from molora_fed.federation.letters import Acknowledgement, Refusal, ShownState
from molora_fed.federation.members import Members
from molora_fed.federation.status import FederationEvent
from molora_fed.federation.supervise import parse_answer
from molora_fed.federation.traffic import SERVER, Seen, read_traffic
from molora_fed.storage.locks import is_held
from molora_fed.storage.untrusted import clean

__all__ = [
    "NOT_RUNNING",
    "ContributorOverview",
    "MemberRow",
    "ServerOverview",
    "describe_contributor",
    "open_home",
    "read_contributor",
    "read_server",
]

NOT_RUNNING = "the server is not running"
HERE_SECONDS = 90.0
"""Who was heard of so lately is connected: a message comes at least every minute."""
PULSE_SECONDS = 30.0
_DECIDED = ("ADMITTED", "WITHDRAWN", "REJECTED", "QUARANTINED")


@dataclass(frozen=True)
class MemberRow:
    """One contributor as the server knows it.

    Attributes:
        name: Its name.
        domain: Its domain, empty if it never said.
        standing: "member", "invited", "revoked", or "open" on a server without invitations.
        event: What its last message said, and what the ledger says.
        seen: When it was last heard of, and the bytes of files that went each way.
        until: Of an invitation: until when it can be used, seconds since 1970.
        key: Fingerprint of its key; empty before it showed one.
    """

    name: str
    domain: str
    standing: str
    event: FederationEvent | None = None
    seen: Seen = field(default_factory=lambda: Seen(last=0.0))
    until: int = 0
    key: str = ""

    def is_connected(self, now: float) -> bool:
        """Whether it was heard of within the last minute or so."""
        return now - self.seen.last < HERE_SECONDS

    @property
    def is_awaited(self) -> bool:
        """Whether its contribution may still come, and has not."""
        state = "" if self.event is None else self.event.state
        return self.standing != "revoked" and state not in _DECIDED


@dataclass(frozen=True)
class ServerOverview:
    """A coordinator's home.

    Attributes:
        name: The cooperative's.
        identity: Its charter's identity.
        amendment: Number of the amendment that counts.
        privacy: What leaves contributors beside adapters, in a few words.
        address: By which members reach it.
        is_running: Whether `molora serve` holds the home.
        is_carrying: Whether mail was carried in the last half minute.
        nodes: Nodes that are connected.
        state: Phase, progress and message of the coordinator's worker.
        problem: What is wrong on this disk; empty if nothing is.
        members: Members, who was turned away, and open invitations.
        free_bytes: Free space where the home lies.
    """

    name: str
    identity: str
    amendment: int
    privacy: str
    address: str
    is_running: bool
    is_carrying: bool
    nodes: int
    state: FederationEvent
    problem: str
    members: tuple[MemberRow, ...]
    free_bytes: int

    @property
    def problems(self) -> tuple[str, ...]:
        """Why it does not do its work; empty if it does."""
        found = []
        if not self.is_running:
            found.append(NOT_RUNNING)
        elif not self.is_carrying:
            found.append("no mail is carried")
        return (*found, *([self.problem] if self.problem else []))

    def list_awaited(self) -> list[str]:
        """For what the cooperative waits now, one line each; empty while it works or is done."""
        if not self.is_running:
            is_done = self.state.phase == "PUBLISHED"
            return [] if is_done else ["the server: start it with `molora serve`"]
        if self.state.phase in ("PUBLISHED", "FUSING", "GROWING") or self.state.step is not None:
            return []
        return [_describe_awaited(row) for row in self.members if row.is_awaited]


@dataclass(frozen=True)
class ContributorOverview:
    """A contributor's home.

    Attributes:
        name: Name it goes by.
        domain: Its domain.
        cooperative: Name of the cooperative; empty before the charter is here.
        privacy: What leaves contributors beside adapters; empty likewise.
        server: "HOST:PORT"; empty if it joined without an invitation.
        is_running: Whether `molora join` holds the home.
        state: Phase, progress and message of its worker, and the ledger's state.
        contribution: Id of its contribution in the ledger; empty before.
        problem: What is wrong on this disk, or why it was refused; empty if nothing is.
        warnings: What to know of chat templates and their tokens; work goes on.
        refusals: The last questions that were not answered: when, and why.
        seen: When the server was last heard of, and the bytes of files that went each way.
        has_consented: Whether what the charter asks for may be sent.
        result: Folder of the fused or evolved model; None before it is here.
        free_bytes: Free space where the home lies.
    """

    name: str
    domain: str
    cooperative: str
    privacy: str
    server: str
    is_running: bool
    state: FederationEvent
    contribution: str
    problem: str
    warnings: tuple[str, ...]
    refusals: tuple[str, ...]
    seen: Seen
    has_consented: bool
    result: Path | None
    free_bytes: int

    @property
    def problems(self) -> tuple[str, ...]:
        """Why it does not go on; empty if it does."""
        return (self.problem,) if self.problem else ()

    def list_awaited(self) -> list[str]:
        """For what it waits now; empty while it works or is done."""
        if self.result is not None and not self.is_running:
            return []
        if not self.is_running:
            return ["this side: go on with `molora join`"]
        if self.cooperative and not self.has_consented:
            return ["your consent, asked where `molora join` runs"]
        waits = {
            "JOINING": "the server's charter, base and task",
            "SUBMITTING": "the server to fetch the contribution",
            "SUBMITTED": "the coordinator's decision",
            "ADMITTED": "the other contributors, and the fused model",
        }
        known = waits.get(self.state.phase)
        return [] if known is None else [known]


def open_home(folder: Path) -> CoordinatorHome | ContributorHome:
    """The home in a folder, of whichever side.

    Raises:
        ConfigError: If it is neither's.
    """
    coordinator, contributor = CoordinatorHome(folder), ContributorHome(folder)
    if coordinator.charter.exists():
        return coordinator
    if contributor.settings_file.exists() or contributor.connection_file.exists():
        return contributor
    raise ConfigError(
        f"Cannot look into '{folder}': expected a folder of `molora coop create` or `molora join`, "
        "got another. Give the folder of a cooperative, or of a contributor."
    )


def read_server(home: CoordinatorHome) -> ServerOverview:
    """Look into a coordinator's home; what cannot be read is left out.

    Raises:
        CharterError: If there is no cooperative in the folder.
    """
    charter = load_charter(home.charter)
    pulse = parse_answer(home.pulse.read())
    is_running = is_held(home.root / "serve.lock")
    return ServerOverview(
        name=charter.identity.name,
        identity=charter.identity_hash,
        amendment=charter.amendment.number,
        privacy=charter.privacy,
        address=_read_address(home),
        is_running=is_running,
        is_carrying=is_running and time.time() - float(pulse.get("time", 0.0)) < PULSE_SECONDS,
        nodes=int(pulse.get("nodes", 0)) if is_running else 0,
        state=_read_state(home.read_state(), "CREATED"),
        problem=home.board.read() or home.worker_board.read(),
        members=tuple(_list_members(home)),
        free_bytes=shutil.disk_usage(home.root).free,
    )


def read_contributor(home: ContributorHome) -> ContributorOverview:
    """Look into a contributor's home; what cannot be read is left out.

    Raises:
        FederationError: If its own settings are malformed.
    """
    connection = read_connection(home)
    settings = home.read_settings() if home.settings_file.exists() else None
    charter = None
    with suppress(CharterError):  # not here yet
        charter = load_charter(home.charter)
    acknowledgement = home.read_acknowledgement()
    problem = home.board.read()
    try:
        home.check_refusal()
    except FederationError as refusal:
        problem = str(refusal)
    results = [home.result / name for name in ("fused", "evolved")]
    state = "" if acknowledgement is None else acknowledgement.state
    return ContributorOverview(
        name=settings.name if settings is not None else connection.name if connection else "",
        domain=settings.domain if settings is not None else connection.domain if connection else "",
        cooperative="" if charter is None else charter.identity.name,
        privacy="" if charter is None else charter.privacy,
        server="" if connection is None else connection.server,
        is_running=is_held(home.root / "join.lock"),
        state=replace(_read_state(home.read_state(), "JOINING"), state=state),
        contribution="" if acknowledgement is None else acknowledgement.contribution_id,
        problem=problem,
        warnings=home.read_warnings(),
        refusals=home.read_refusals(),
        seen=read_traffic(home.traffic_file).get(SERVER, Seen(last=0.0)),
        has_consented=charter is not None and has_consent(home, charter),
        result=next((folder for folder in results if folder.is_dir()), None),
        free_bytes=shutil.disk_usage(home.root).free,
    )


def describe_contributor(mailbox: ContributorMailbox) -> FederationEvent:
    """One contributor as the server sees it; what cannot be shown is said, and ends nothing."""
    try:
        return _describe_letters(mailbox)
    except Exception as error:  # whoever goes on with the letter sets it aside
        return FederationEvent(
            "JOINING", contributor=mailbox.name, message=clean(error, 500), problem=True
        )


def _describe_letters(mailbox: ContributorMailbox) -> FederationEvent:
    state = read_letter(mailbox.state_file, ShownState) or ShownState()
    refusal = read_letter(mailbox.refusal_file, Refusal)
    fault = read_letter(mailbox.fault_file, Refusal)
    offer = read_letter(mailbox.offer_file, Offer)
    ledger_state = ""
    if offer is not None:
        path = mailbox.acknowledgement_file(offer.id)
        acknowledgement = read_letter(path, Acknowledgement)
        ledger_state = "" if acknowledgement is None else acknowledgement.state
    event = FederationEvent(
        **{
            **state.known,
            "phase": "DONE" if mailbox.delivered_file.exists() else state.phase,
            "contributor": mailbox.name,
            "state": ledger_state,
        }
    )
    for bad_news in (state.problem, refusal and refusal.reason, fault and fault.reason):
        if bad_news:
            return replace(event, message=bad_news, problem=True)
    return event


def _read_address(home: CoordinatorHome) -> str:
    try:
        return read_address(home)
    except (MoloraError, KeyError, ValueError):
        return ""


def _read_state(known: Mapping[str, Any], phase: str) -> FederationEvent:
    return FederationEvent(**{"phase": phase, **known})


def _list_members(home: CoordinatorHome) -> list[MemberRow]:
    seen = read_traffic(home.traffic_file)
    boxes = {one.fingerprint: one for one in home.contributors()}
    members = Members(home.members)
    rows = []
    for member in members.list_members():
        box = boxes.pop(member.contributor, None)
        rows.append(
            MemberRow(
                member.name,
                member.domain,
                "revoked" if member.revoked else "member",
                None if box is None else describe_contributor(box),
                seen.get(member.contributor, Seen(last=0.0)),
                key=member.contributor,
            )
        )
    for fingerprint, box in boxes.items():
        event = describe_contributor(box)
        known = seen.get(fingerprint, Seen(last=0.0))
        rows.append(MemberRow(event.contributor, box.domain, "open", event, known, key=fingerprint))
    for invitation in members.list_invitations():
        rows.append(
            MemberRow(invitation.name, invitation.domain, "invited", until=invitation.expires)
        )
    return sorted(rows, key=lambda row: (row.name, row.standing))


def _describe_awaited(row: MemberRow) -> str:
    if row.standing == "invited":
        return f"{row.name}, who has not used the invitation"
    if row.event is None:
        return f"{row.name}, who has not said hello"
    if row.event.problem:
        return f"{row.name}: {row.event.message}"
    done = "" if row.event.step is None else f" {row.event.step}/{row.event.total}"
    return f"{row.name} ({row.event.phase.lower()}{done})"
