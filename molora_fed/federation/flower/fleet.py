"""Flower's fleet interface by itself: nodes fetch messages and bring replies, nothing else."""

import base64
import binascii
import time
from collections import OrderedDict
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from flwr.common.constant import (
    HEARTBEAT_DEFAULT_INTERVAL,
    NOOP_ACCOUNT_NAME,
    NOOP_FLWR_AID,
    TIMESTAMP_HEADER,
    TIMESTAMP_TOLERANCE,
)
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
from flwr.supercore.error import http_error_translator
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
from flwr.superlink.routers.fleet import node_auth
from flwr.superlink.routers.fleet.router import router
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.responses import Response

__all__ = ["FLEET_BODIES", "build_fleet_app", "read_node_key"]

_CHUNK_BYTES = 6 * 2**20  # Flower's pieces have 5 MiB, and a head
FLEET_BODIES: Mapping[str, int] = {
    "/v1/fleet/activate-node": 4_096,
    "/v1/fleet/deactivate-node": 4_096,
    "/v1/fleet/send-node-heartbeat": 4_096,
    "/v1/fleet/pull-messages": 4_096,
    "/v1/fleet/pull-object": 4_096,
    "/v1/fleet/confirm-message-received": 4_096,
    "/v1/fleet/push-messages": 2**20,
    "/v1/fleet/push-object": _CHUNK_BYTES,
}
"""Paths that are served, and the largest body of each, bytes. Nodes register by invitation, not
here, and nobody is sent an app."""
MAX_NODES = 4_096
MAX_OBJECTS = 10_000
"""Objects of one reply; a part of a file is two or more."""
AHEAD_SECONDS = 120
"""How far a node's clock may be ahead; Flower's 5 seconds turn whoever has no time server away."""
node_auth.SYSTEM_TIME_TOLERANCE = AHEAD_SECONDS
GOOD_SECONDS = TIMESTAMP_TOLERANCE + 2 * AHEAD_SECONDS
"""How long a signature is good, counted from when it may first come."""


def read_node_key(headers: Mapping[str, str]) -> str:
    """The public key (PEM) a request claims; empty if there is none. The signature comes later."""
    claimed = headers.get(FLEET_HTTP_PUBLIC_KEY_HEADER, "")
    try:
        return base64.b64decode(claimed[:2_048], validate=True).decode("ascii")
    except (binascii.Error, ValueError):
        return ""


def build_fleet_app(state_factory: Any) -> FastAPI:
    """The fleet's interface over Flower's tables; every request is signed by its node's key.

    It checks neither membership nor sizes: that is the gateway's, which stands before it.

    Args:
        state_factory: As `build_state_factory` makes it.
    """
    app = FastAPI(
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        middleware=[
            Middleware(BaseHTTPMiddleware, dispatch=http_error_translator),
            Middleware(ProtobufTranslationMiddleware),
            Middleware(node_auth.NodeAuthMiddleware),
            Middleware(_Checks, state=state_factory.state()),
        ],
    )
    app.state.linkstate_factory = state_factory
    app.state.enable_supernode_auth = True
    app.include_router(router)
    return app


class _Once:
    """Refuses a signature that was used: Flower's is of the time alone, and good for minutes."""

    _MOST = 200_000  # more than this process can answer while a signature is good

    def __init__(self) -> None:
        self._used: OrderedDict[int, float] = OrderedDict()

    def use(self, key: str, signed_time: str) -> None:
        """Use the signature of a time.

        Raises:
            HTTPException: If it was used.
        """
        now = time.monotonic()
        while self._used and (
            len(self._used) >= self._MOST or next(iter(self._used.values())) < now - GOOD_SECONDS
        ):
            self._used.popitem(last=False)
        # Not the signature, of which there are two forms; nor the text, of which there are many.
        used = hash((key, datetime.fromisoformat(signed_time)))
        if used in self._used:
            raise HTTPException(401, "A signature is good once")
        self._used[used] = now


class _Checks(BaseHTTPMiddleware):
    """What Flower leaves out: known nodes come back at once, and speak for themselves only."""

    def __init__(self, app: Any, state: Any) -> None:
        super().__init__(app)
        self._state = state
        self._once = _Once()

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        """Check a request that its node has signed."""
        asked = getattr(request.state, "protobuf_request", None)
        if asked is not None:  # whatever else comes is not signed, and gets no further
            self._once.use(read_node_key(request.headers), request.headers[TIMESTAMP_HEADER])
        if isinstance(asked, ActivateNodeRequest):
            self._welcome(asked.public_key)
            asked.heartbeat_interval = HEARTBEAT_DEFAULT_INTERVAL
        elif isinstance(asked, PushMessagesRequest):
            _check_reply(asked)
        elif isinstance(asked, PullMessagesRequest):
            self._give_again(asked.node.node_id)
        return await call_next(request)

    def _welcome(self, public_key: bytes) -> None:
        """Register a node at its first request; take one that was lost for gone.

        Flower would turn a node that was killed away until its lease has run out.
        """
        node_id = self._state.get_node_id_by_public_key(public_key)
        if node_id is not None:
            self._state.deactivate_node(node_id)
        elif len(self._state.nodes) >= MAX_NODES:
            raise HTTPException(503, "Too many nodes")
        else:
            self._state.create_node(
                NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, public_key, HEARTBEAT_DEFAULT_INTERVAL
            )

    def _give_again(self, node_id: int) -> None:
        """Let a node that asks have the message it was given and has not replied to.

        It answers one after the other, so the answer that carried it was lost; Flower would give it
        out once, and the relay wait for a reply until it gives up.
        """
        with self._state.lock:
            replied = self._state.message_ins_id_to_message_res_id
            for message_id, message in self._state.message_ins_store.items():
                if message.metadata.dst_node_id == node_id and message_id not in replied:
                    message.metadata.delivered_at = ""


def _check_reply(asked: PushMessagesRequest) -> None:
    """Refuse replies in another node's name, and trees too large to walk.

    Raises:
        HTTPException: If it is one.
    """
    if len(asked.messages_list) != 1 or len(asked.message_object_trees) != 1:
        raise HTTPException(422, "Expected one message")
    if asked.messages_list[0].metadata.src_node_id != asked.node.node_id:
        raise HTTPException(403, "Expected a reply of the node itself")
    tree = asked.message_object_trees[0]
    for count, _ in enumerate(iterate_object_tree(tree)):
        if count > MAX_OBJECTS:
            raise HTTPException(413, "Too many objects")
