"""The coordinator's end of Flower's message store: what the mail relay pushes to and pulls from.

Unlike Flower's own grids it takes a reply only once all of it is there, whether or not its node is
still connected, and never waits: one node's half-sent or malformed reply is nobody else's trouble.
"""

from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Error, Message, Metadata
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import NOOP_FLWR_AID, SUPERLINK_NODE_ID, ErrorCode
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager

from molora_fed.storage.untrusted import clean

__all__ = ["LinkGrid", "build_state_factory"]


def build_state_factory() -> Any:
    """Flower's tables, in memory: they are transport, not truth."""
    return LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory())


class LinkGrid:
    """One run's messages to nodes and their replies; at most one message is under way to a node.

    Args:
        state: Flower's link state, which the fleet's interface serves.
        is_member: Whether a node with this public key (PEM) may be talked to.
    """

    def __init__(self, state: Any, is_member: Callable[[str], bool]) -> None:
        self._state = state
        self._is_member = is_member
        self._under_way: dict[int, str] = {}
        self.run_id = self._start_run()

    def _start_run(self) -> int:
        """Make a run that lives as long as this process."""
        run_id = int(
            self._state.create_run(
                "molora/molora-fed", "", "", {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID,
                TaskType.SERVER_APP,
            )
        )  # fmt: skip
        task_id = self._state.run_ids[run_id].run.primary_task_id
        token = self._state.claim_task(task_id)
        self._state.activate_task(task_id)
        # Without a token the run needs no heartbeat, and nobody can act in its name.
        del self._state.task_token_store[task_id], self._state.task_token_to_task_id[token]
        TaskIdentity.task_id, TaskIdentity.run_id = task_id, run_id
        TaskIdentity.node_id = SUPERLINK_NODE_ID
        return run_id

    def get_nodes(self) -> list[Any]:
        """The members' nodes that are online; what was under way to others is forgotten."""
        online = self._state.get_node_info(node_ids=list(self._state.get_nodes(self.run_id)))
        nodes = [node for node in online if self._is_member(node.public_key.decode())]
        for node_id in set(self._under_way) - {node.node_id for node in nodes}:
            self._forget(node_id)
        return nodes

    def push_messages(self, messages: Iterable[Any]) -> list[str]:
        """Store messages for their nodes; what was under way to them before is dropped.

        Returns:
            The messages' ids; empty for a node that is not there any more.
        """
        return [self._push(message) for message in messages]

    def _push(self, message: Any) -> str:
        node_id = message.metadata.dst_node_id
        self._forget(node_id)
        with no_object_id_recompute():
            message.metadata.__dict__["_message_id"] = message.object_id
            objects = get_all_nested_objects(message)
            tree = get_object_tree(message)
            message_id = str(message.metadata.message_id)
            session = self._state.start_session(self.run_id)
            stored, missing = self._state.store_message_and_object_tree(
                remove_content_from_message(message), tree, session
            )
            if not stored:
                return ""
            for object_id in missing:
                self._state.store_object(
                    self.run_id, session, object_id, objects[object_id].deflate()
                )
        self._under_way[node_id] = message_id
        return message_id

    def pull_messages(self, message_ids: Iterable[str]) -> list[Any]:
        """Take the replies that have arrived as a whole.

        A malformed one becomes an error, and so does a message that Flower has dropped: its time,
        or that of its half-sent reply, was over, or seemed so to a clock that was set.
        """
        found = (self._pull(message_id) for message_id in message_ids)
        return [reply for reply in found if reply is not None]

    def _pull(self, message_id: str) -> Any | None:
        reply_id = self._state.message_ins_id_to_message_res_id.get(message_id)
        if reply_id is None:
            is_awaited = message_id in self._under_way.values()
            if message_id in self._state.message_ins_store or not is_awaited:
                return None
            self._delete(message_id, "")
            return _build_error(self.run_id, message_id, "dropped before it was replied to")
        try:
            tree = self._state.object_store.get_object_tree(reply_id)
            contents = {}
            for branch in iterate_object_tree(tree):
                content = self._state.get_object(self.run_id, branch.object_id)
                if not content:
                    return None  # not all of it is here yet; Flower drops what stays half sent
                contents[branch.object_id] = content
            reply = inflate_object_from_contents(reply_id, contents)
            if not isinstance(reply, Message):
                raise TypeError(f"a {type(reply).__name__} instead of a message")
            # What it says of itself was not checked; what was stored with it was.
            reply.metadata.__dict__["_reply_to_message_id"] = message_id
        except Exception as error:  # bytes of a stranger, read by Flower's many parsers
            reply = _build_error(self.run_id, message_id, f"{type(error).__name__}: {error}")
        self._delete(message_id, reply_id)
        return reply

    def _forget(self, node_id: int) -> None:
        """Drop what is under way to a node, and its reply."""
        message_id = self._under_way.pop(node_id, "")
        if message_id:
            reply_id = self._state.message_ins_id_to_message_res_id.get(message_id, "")
            self._delete(message_id, reply_id)

    def _delete(self, message_id: str, reply_id: str) -> None:
        self._under_way = {n: m for n, m in self._under_way.items() if m != message_id}
        self._state.delete_messages({message_id})
        for object_id in (message_id, reply_id):
            self._state.object_store.delete(object_id)


def _build_error(run_id: int, message_id: str, reason: str) -> Any:
    metadata = Metadata(
        run_id=run_id,
        message_id="",
        src_node_id=SUPERLINK_NODE_ID,
        dst_node_id=SUPERLINK_NODE_ID,
        reply_to_message_id=message_id,
        group_id="",
        created_at=0.0,
        ttl=0.0,
        message_type="query",
    )
    error = Error(code=ErrorCode.MESSAGE_UNAVAILABLE, reason=clean(reason))
    return make_message(metadata, error=error)
