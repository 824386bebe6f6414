"""The mail relay: a mailbox. It moves letters and decides nothing about contributions.

One message at a time is under way per node, and whatever is lost is sent again as a fresh message.
A server of members runs it beside the fleet's interface (`flower.link`); a simulation runs it as
its Flower ServerApp.
"""

import json
import os
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message
from flwr.serverapp import ServerApp

from molora_fed.errors import FederationError, MoloraError, StorageError
from molora_fed.federation.envelopes import Envelope
from molora_fed.federation.homes import (
    COORDINATOR_HOME,
    CoordinatorHome,
    hold_seconds,
    home_from_environment,
    message_bytes,
)
from molora_fed.federation.letters import Fetch, Hello, Wait
from molora_fed.federation.logs import log
from molora_fed.federation.mailbox import hold_lock
from molora_fed.federation.members import Member, Members
from molora_fed.federation.server_dialogue import RemoteContributor, ServerDialogue
from molora_fed.federation.traffic import Traffic
from molora_fed.federation.wire import pack_envelope, unpack_envelope
from molora_fed.storage.keys import key_fingerprint
from molora_fed.storage.untrusted import clean

__all__ = ["MailRelay", "app", "carry_mail"]

LOOP_SECONDS = 0.3
PULSE_SECONDS = 1.0
REPLY_SECONDS = 300.0
PAUSE_SECONDS = 2.0
MAX_PAUSE_SECONDS = 60.0
QUIET_SECONDS = 5.0
MESSAGE_TTL_SECONDS = 3_600.0
MAX_BYTES_UNDER_WAY = 256 * 2**20
MAX_FAILURES = 20

app = ServerApp()


@app.main()
def main(grid: Any, context: Any) -> None:
    """Carry the mail of simulated nodes until the supervisor writes the stop file."""
    carry_mail(
        CoordinatorHome(home_from_environment(COORDINATOR_HOME)), grid, run_id=context.run_id
    )


def carry_mail(
    home: CoordinatorHome, grid: Any, *, run_id: int, members: Members | None = None
) -> None:
    """Carry mail until the supervisor writes the stop file.

    Args:
        home: The coordinator's home.
        grid: Flower's grid.
        run_id: Flower's run.
        members: Whose nodes they are; None takes everybody's word.

    Raises:
        MoloraError: If another process carries mail and does not end.
    """
    _end_with_parent()
    deadline = time.monotonic() + 60
    while True:
        try:
            with hold_lock(home.mail / "postman.lock", what="the mail relay"):
                MailRelay(home, grid, run_id=run_id, members=members).carry()
            return
        except MoloraError:
            # The carrier of an earlier run may still be ending.
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def _end_with_parent() -> None:
    """End this process when its parent dies; Flower leaves a ServerApp that is pulling behind."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@dataclass
class _Node:
    """One connected node and the message under way to it.

    Attributes:
        remote: Who it is and where it stands.
        member: Which member's node it is; None if that is not known.
        since: When it came, as Flower has it; another time is another process of the same node.
        message_id: Message under way, or empty.
        sent: When it was sent, monotonic seconds.
        num_bytes: Bytes of parts that it carries or asks for.
        awaits: What it asks news of: the id of a question, or "" for a contribution; None if it
            asks for more.
        not_before: No message before this time, monotonic seconds; set after a failure.
        faults: Messages skipped in a row.
    """

    remote: RemoteContributor = field(default_factory=RemoteContributor)
    member: Member | None = None
    since: str = ""
    message_id: str = ""
    sent: float = 0.0
    num_bytes: int = 0
    awaits: str | None = None
    not_before: float = 0.0
    faults: int = 0


class MailRelay:
    """Carries letters between the coordinator's folders and the connected nodes."""

    def __init__(
        self, home: CoordinatorHome, grid: Any, *, run_id: int, members: Members | None = None
    ) -> None:
        self._home = home
        self._members = members
        self._grid = grid
        self._run_id = run_id
        self._message_bytes = message_bytes()
        hold = hold_seconds()
        self._quiet_seconds = max(0.0, QUIET_SECONDS - hold)
        self._dialogue = ServerDialogue(home, message_bytes=self._message_bytes, wait_seconds=hold)
        self._nodes: dict[int, _Node] = {}
        self._traffic = Traffic(home.traffic_file)
        self._pulse = 0.0

    def carry(self) -> None:
        """Loop until the stop file is there."""
        failures = 0
        while not self._home.stop_file.exists():
            try:
                self._round()
                failures = 0
            except Exception as error:
                # Flower reports its transport's failures as many types; the run ends only if
                # they go on, and is then submitted again by the supervisor. What one node does
                # is caught where that node is dealt with, and never gets here.
                failures += 1
                log("round failed", "error", type=type(error).__name__, reason=error)
                if failures >= MAX_FAILURES:
                    raise
                time.sleep(1.0)
            time.sleep(LOOP_SECONDS)
        self._traffic.write()

    def _round(self) -> None:
        self._collect()
        online = {node.node_id: node for node in self._grid.get_nodes()}
        for node_id in set(self._nodes) - set(online):
            del self._nodes[node_id]
            self._traffic.write()  # nothing may be noted of anybody for a long time now
        for node_id, info in online.items():
            since = info.last_activated_at or ""
            if node_id not in self._nodes or self._nodes[node_id].since != since:
                self._nodes[node_id] = _Node(since=since, member=self._find_member(info))
        for node_id, node in self._nodes.items():
            if not node.message_id and time.monotonic() >= node.not_before:
                self._send(node_id, node)
            self._note(node)
            self._beat()  # with many nodes a round takes long
        self._beat()

    def _find_member(self, info: Any) -> Member | None:
        return None if self._members is None else self._members.find(info.public_key.decode())

    def _collect(self) -> None:
        """Take the answers that are there, and give up those that do not come."""
        under_way = {n.message_id: n for n in self._nodes.values() if n.message_id}
        if not under_way:
            return
        for message in self._pull(under_way):
            node = under_way.get(message.metadata.reply_to_message_id)
            if node is None:
                continue
            node.message_id = ""
            self._accept(node, message)
            self._beat()
        for node in under_way.values():
            if node.message_id and time.monotonic() - node.sent > REPLY_SECONDS:
                node.message_id = ""

    def _pull(self, under_way: dict[str, _Node]) -> list[Any]:
        """The answers that are there; one that Flower cannot read hides no other."""
        try:
            return list(self._grid.pull_messages(list(under_way)))
        except Exception as error:
            log("not pulled together", "warning", type=type(error).__name__, reason=error)
        found: list[Any] = []
        failed: list[tuple[_Node, Exception]] = []
        for message_id, node in under_way.items():
            try:
                found += self._grid.pull_messages([message_id])
            except Exception as error:
                failed.append((node, error))
        if len(failed) == len(under_way) > 1:
            raise failed[0][1]  # nobody's fault: the transport's
        for node, reason in failed:
            node.message_id = ""
            self._skip(node, reason)
        return found

    def _accept(self, node: _Node, message: Any) -> None:
        """File one node's answer; whatever it does here concerns nobody else."""
        try:
            if message.has_error():
                node.not_before = time.monotonic() + PAUSE_SECONDS
                log("no answer", "warning", code=message.error.code, reason=message.error.reason)
                return
            envelope = unpack_envelope(message.content, sender="contributor")
            if self._members is not None:
                _check_member(node.member, envelope)
            self._dialogue.accept(node.remote, envelope)
            self._note(node, received=envelope.num_bytes)
            self._home.board.post("")
            node.faults = 0
            remote = node.remote
            is_silent = not remote.fingerprint and not remote.refusal
            if is_silent or remote.state.problem:
                node.not_before = time.monotonic() + PAUSE_SECONDS
            elif node.awaits is not None and not _has_news(node):
                node.not_before = time.monotonic() + self._quiet_seconds
        except StorageError as error:
            self._home.board.post(str(error))
            node.not_before = time.monotonic() + PAUSE_SECONDS
        except Exception as error:
            self._skip(node, error)

    def _skip(self, node: _Node, error: Exception) -> None:
        """Skip one node's message: say whose it was and why, and ask again, ever more rarely."""
        node.faults += 1
        pause = min(PAUSE_SECONDS * 2 ** min(node.faults - 1, 10), MAX_PAUSE_SECONDS)
        node.not_before = time.monotonic() + pause
        who = "a contributor"
        try:
            who = self._dialogue.note_fault(node.remote, error)
        except Exception as other:
            log("not noted", "warning", reason=other)
        log("message skipped", "warning", contributor=who, type=type(error).__name__, reason=error)

    def _send(self, node_id: int, node: _Node) -> None:
        try:
            envelope = self._dialogue.next_envelope(node.remote)
            if envelope is None:
                return
            fetch, wait = envelope.find(Fetch), envelope.find(Wait)
            node.awaits = None if wait is None else wait.question or ""
            node.num_bytes = envelope.num_bytes + (self._message_bytes if fetch else 0)
            under_way = sum(n.num_bytes for n in self._nodes.values() if n.message_id)
            if under_way and under_way + node.num_bytes > MAX_BYTES_UNDER_WAY:
                return
            message = Message(
                pack_envelope(envelope),
                dst_node_id=node_id,
                message_type="query",
                ttl=MESSAGE_TTL_SECONDS,
            )
            (node.message_id,) = self._grid.push_messages([message])
        except Exception as error:
            # A file changed while it was read, such as a result that a newer one replaces; or the
            # node has just gone. If it is the transport, the next round says so.
            node.not_before = time.monotonic() + PAUSE_SECONDS
            log("not sent", "warning", type=type(error).__name__, reason=error)
            return
        node.sent = time.monotonic()
        self._note(node, sent=envelope.num_bytes)

    def _note(self, node: _Node, *, received: int = 0, sent: int = 0) -> None:
        """Note for whoever looks that a contributor is there."""
        if node.remote.fingerprint:
            self._traffic.note(node.remote.fingerprint, received=received, sent=sent)

    def _beat(self) -> None:
        """Tell the supervisor that mail is being carried, and by which process."""
        now = time.monotonic()
        if self._pulse and now - self._pulse < PULSE_SECONDS:
            return
        self._pulse = now
        pulse = {"pid": os.getpid(), "run_id": str(self._run_id), "nodes": len(self._nodes)}
        # A board, not a file written whole: a pulse must neither wear nor wait for the disk.
        self._home.pulse.post(json.dumps({**pulse, "time": time.time()}))


def _has_news(node: _Node) -> bool:
    """Whether what was waited for has come."""
    remote = node.remote
    return remote.answered == node.awaits if node.awaits else remote.has_offer


def _check_member(member: Member | None, reply: Envelope) -> None:
    """Refuse a hello that is not the one its node was invited for.

    Raises:
        FederationError: If key, name or domain are others.
        SignatureError: If its key is malformed.
    """
    hello = reply.find(Hello)
    if hello is None:
        return
    if member is None:
        raise FederationError(
            "Cannot take a hello: expected a member's node, got another. Invite it first."
        )
    claimed = key_fingerprint(hello.public_key)
    for what, expected, got in (
        ("key", member.contributor, claimed),
        ("name", member.name, hello.name),
        ("domain", member.domain, hello.domain),
    ):
        if got != expected:
            raise FederationError(
                f"Cannot take a hello of member '{member.name}': expected the {what} "
                f"{expected[:63]} it was invited with, got {clean(got, 80)}. Join with the "
                "invitation's own home and settings."
            )
