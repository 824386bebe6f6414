"""The contributor's process on the network: fetches messages, has them answered, sends replies.

    python -P -m molora_fed.federation.flower.node HOME SERVER NODE_KEY [--authority PEM]

It is Flower's client of the fleet's interface without what Flower runs behind it: no app is
fetched, unpacked or started, whatever the server names, and no port is opened. Letters are answered
by a process of their own (`pipes`); this one can open its key and the authority's certificate
alone.
"""

import argparse
import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import httpx
from flwr.app import Error, Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from molora_fed.errors import FederationError
from molora_fed.federation.confine import confine
from molora_fed.federation.envelopes import Envelope
from molora_fed.federation.fleet import NOT_A_MEMBER, WRONG_CLOCK
from molora_fed.federation.logs import log, start_logging
from molora_fed.federation.messages import MAX_BATCH_BYTES
from molora_fed.federation.pipes import read_envelope, write_envelope, write_sent
from molora_fed.federation.wire import pack_envelope, unpack_envelope
from molora_fed.storage.keys import build_public_pem, load_key

__all__ = ["FleetNode"]

HEARTBEAT_SECONDS = 10.0
SHORTEST_PAUSE_SECONDS = 0.3
LONGEST_PAUSE_SECONDS = 3.0
LONGEST_RETRY_SECONDS = 10.0
MAX_OBJECTS = 10_000
MAX_PUSHES = 5
MAX_MESSAGE_BYTES = MAX_BATCH_BYTES + 16 * 2**20
_PASSING = frozenset({408, 429, 500, 502, 503, 504})

Found = TypeVar("Found")


class FleetNode:
    """One node of the fleet.

    Args:
        client: Flower's client of the server, signing with the node's key.
        public_key: The node's public key, PEM.
        ask: Answers an envelope; None if it could not.
        stop: Ends waiting and trying again once it is set.
    """

    def __init__(
        self,
        client: Any,
        public_key: str,
        ask: Callable[[Envelope], Envelope | None],
        stop: threading.Event,
    ) -> None:
        self._client = client
        self._public_key = public_key.encode()
        self._ask = ask
        self._stop = stop
        self._node = Node()

    def activate(self) -> None:
        """Come online; again, if the server has lost its tables."""
        asked = ActivateNodeRequest(
            public_key=self._public_key, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
        )
        answer = self._insist(lambda: self._client.ActivateNode(asked))
        self._node = Node(node_id=answer.node_id)
        log("online", node=answer.node_id)

    def deactivate(self) -> None:
        """Go offline, if the server still listens."""
        with contextlib.suppress(httpx.HTTPError, RuntimeError):
            self._client.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))

    def keep_alive(self) -> None:
        """Send heartbeats until stopped; run it in a thread."""
        while not self._stop.wait(HEARTBEAT_SECONDS):
            asked = SendNodeHeartbeatRequest(
                node=self._node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
            )
            try:
                self._client.SendNodeHeartbeat(asked)
            except (httpx.HTTPError, RuntimeError, ValueError):
                continue  # the loop of messages meets the same trouble and deals with it

    def answer_one(self) -> bool:
        """Fetch, answer and bring back one message.

        Returns:
            Whether there was one.

        Raises:
            httpx.HTTPStatusError: If the server refuses.
        """
        pulled = self._insist(
            lambda: self._client.PullMessages(PullMessagesRequest(node=self._node))
        )
        if not pulled.messages_list:
            return False
        message = message_from_proto(pulled.messages_list[0])
        reply = self._answer(message, pulled.message_object_trees[0])
        self._push(reply)
        return True

    def _answer(self, message: Any, tree: Any) -> Any:
        run_id, message_id = message.metadata.run_id, message.metadata.message_id
        try:
            envelope = unpack_envelope(
                self._pull_content(run_id, message_id, tree), sender="server"
            )
        except (FederationError, ValueError, TypeError, KeyError) as error:
            log("message not understood", "warning", reason=error)
            return _refuse(message)
        confirmed = ConfirmMessageReceivedRequest(
            node=self._node, run_id=run_id, message_object_id=message_id
        )
        self._insist(lambda: self._client.ConfirmMessageReceived(confirmed))
        reply = self._ask(envelope)
        return (
            _refuse(message) if reply is None else Message(pack_envelope(reply), reply_to=message)
        )

    def _pull_content(self, run_id: int, message_id: str, tree: Any) -> Any:
        """A message's content.

        Raises:
            ValueError: If there is more than a message of ours can have, or not all of it.
        """
        contents: dict[str, bytes] = {}
        left = MAX_MESSAGE_BYTES
        for count, branch in enumerate(iterate_object_tree(tree)):
            if count > MAX_OBJECTS:
                raise ValueError("too many objects")
            object_id = branch.object_id
            if object_id in contents:
                continue
            asked = PullObjectRequest(node=self._node, run_id=run_id, object_id=object_id)
            pulled = self._insist(partial(self._client.PullObject, asked))
            left -= len(pulled.object_content)
            if left < 0 or not pulled.object_available:
                raise ValueError("too many bytes" if left < 0 else "an object that is missing")
            contents[object_id] = pulled.object_content
        whole = inflate_object_from_contents(message_id, contents)
        if not isinstance(whole, Message):
            raise TypeError("no message")
        return whole.content

    def _push(self, reply: Any) -> None:
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            objects, tree = get_all_nested_objects(reply), get_object_tree(reply)
            run_id = reply.metadata.run_id
            asked = PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[tree],
                clientapp_runtime_list=[0.0],
            )
            for _ in range(MAX_PUSHES):
                pushed = self._insist(lambda: self._client.PushMessages(asked))
                pieces = (
                    PushObjectRequest(
                        node=self._node,
                        run_id=run_id,
                        object_id=object_id,
                        object_content=objects[object_id].deflate(),
                        session_id=pushed.session_id,
                    )
                    for object_id in pushed.objects_to_push
                )
                # One that is not stored was of a session that is over: begun anew, with the rest.
                if all(self._insist(partial(self._client.PushObject, p)).stored for p in pieces):
                    return

    def _insist(self, call: Callable[[], Found]) -> Found:
        """Try again while the server is away or busy.

        Raises:
            httpx.HTTPStatusError: If the server refuses.
            KeyboardInterrupt: If it was stopped meanwhile.
        """
        pause = SHORTEST_PAUSE_SECONDS
        while True:
            try:
                return call()
            except httpx.HTTPStatusError as error:
                if error.response.status_code not in _PASSING:
                    raise
            except httpx.TransportError as error:
                log("server does not answer", "warning", reason=error)
            if self._stop.wait(pause):
                raise KeyboardInterrupt
            pause = min(2 * pause, LONGEST_RETRY_SECONDS)


def _find_status(refusal: httpx.Response) -> int:
    """The exit status of a node that is refused when it comes online."""
    if refusal.status_code != 401:
        return 1
    # The gateway knows keys; behind it only the signature is looked at, and it is of a time.
    return NOT_A_MEMBER if "Not a member" in refusal.text else WRONG_CLOCK


def _refuse(message: Any) -> Any:
    """A reply that says no more than that there is none."""
    error = Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason="not answered")
    return Message(error, reply_to=message)


def _run(home: Path, server: str, key_file: Path, authority: Path | None) -> int:
    """Answer messages until told to end.

    Returns:
        The exit status.
    """
    letters = subprocess.Popen(
        [sys.executable, "-P", "-m", "molora_fed.federation.pipes", str(home)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert letters.stdin is not None and letters.stdout is not None
    to_letters, from_letters = cast(BinaryIO, letters.stdin), cast(BinaryIO, letters.stdout)
    problem = confine(
        read=[key_file, *([] if authority is None else [authority])], write=[], network=True
    )
    if problem:
        log("not confined", "warning", reason=problem)
    key = load_key(key_file)

    def ask(envelope: Envelope) -> Envelope | None:
        write_envelope(to_letters, envelope)
        return read_envelope(from_letters, sender="contributor")

    client = FleetHttpClient.from_server_address(
        server,
        authority is None,
        None if authority is None else authority.read_bytes(),
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperNode"),
            NodeAuthHttpInterceptor(key, key.public_key()),
        ],
    )
    stop = threading.Event()
    node = FleetNode(client, build_public_pem(key), ask, stop)
    try:
        node.activate()
        threading.Thread(target=node.keep_alive, daemon=True).start()
        pause = SHORTEST_PAUSE_SECONDS
        while True:
            try:
                found = node.answer_one()
            except httpx.HTTPStatusError as error:
                # The run it answers to has ended; the server may have been started anew.
                log("refused by the server", "warning", status=error.response.status_code)
                found = False
                if error.response.status_code == 401:
                    node.activate()
            if found:
                write_sent(to_letters)
            pause = SHORTEST_PAUSE_SECONDS if found else min(1.5 * pause, LONGEST_PAUSE_SECONDS)
            time.sleep(pause)
    except httpx.HTTPStatusError as error:
        log("refused by the server", "warning", status=error.response.status_code)
        return _find_status(error.response)
    except (EOFError, BrokenPipeError):
        log("the process that answers letters ended", "error")
        return 1
    except KeyboardInterrupt:
        with contextlib.suppress(KeyboardInterrupt):  # told again: the server does not listen
            node.deactivate()
        return 0
    finally:
        stop.set()
        with contextlib.suppress(BrokenPipeError):  # what it could not be told any more
            letters.stdin.close()


if __name__ == "__main__":
    from molora_fed.federation.supervise import sigterm_as_interrupt

    parser = argparse.ArgumentParser()
    parser.add_argument("home", type=Path)
    parser.add_argument("server")
    parser.add_argument("node_key", type=Path)
    parser.add_argument("--authority", type=Path, default=None)
    given = parser.parse_args()
    start_logging("node")
    with sigterm_as_interrupt():
        sys.exit(_run(given.home, given.server, given.node_key, given.authority))
