"""A coordinator's mail relay without Flower, and nodes that answer it with whatever they like.

Nodes speak raw JSON, as a stranger's program would, and not through the product's own parsers.
"""

import functools
import itertools
import json
from types import SimpleNamespace

from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from molora_fed.charter import Amendment, BaseIdentity, Charter, Identity, write_charter
from molora_fed.federation import server_app
from molora_fed.federation.coordinator_mail import publish_charter
from molora_fed.federation.homes import CoordinatorHome
from molora_fed.storage.files import canonical_json
from molora_fed.storage.keys import build_public_pem, key_fingerprint, load_or_make_key, sign

PART_BYTES = 4_096
HASH = "a" * 64


@functools.cache
def make_key(number):
    return ec.derive_private_key(1_000 + number, ec.SECP384R1())


def build_charter(name="test", **amendment):
    base = BaseIdentity(id="tiny", weights="0" * 64, tokenizer="1" * 64)
    return Charter(identity=Identity(name=name, base=base), amendment=Amendment(**amendment))


def open_coordinator(root, name="test", **amendment):
    """A coordinator's home whose charter is published."""
    home = CoordinatorHome(root)
    home.base.mkdir(parents=True)
    (home.base / "model.safetensors").write_bytes(b"x" * 10)
    charter = build_charter(name, **amendment)
    write_charter(charter, home.charter)
    publish_charter(home, charter, load_or_make_key(home.key), part_bytes=PART_BYTES)
    return home


class Node:
    """Says hello as it should, and then what `speak` returns: letters or text, and parts."""

    def __init__(self, number, speak, name=None):
        self.key, self.name = make_key(number), name or f"node-{number}"
        self.fingerprint = key_fingerprint(build_public_pem(self.key))
        self.speak = speak
        self.heard = []

    def answer(self, text):
        letters = json.loads(text)
        self.heard += letters
        greeting = next((one["body"] for one in letters if one["kind"] == "hello"), None)
        if greeting is None:
            said = self.speak(letters)
            said, parts = said if isinstance(said, tuple) else (said, {})
            return said if isinstance(said, str) else json.dumps(said), parts
        return json.dumps([self.hello(greeting), {"kind": "state", "body": {}}]), {}

    def hello(self, greeting):
        purpose = "molora-hello-2" if "identity" in greeting else "molora-hello-1"
        signed = {"purpose": purpose, **greeting}
        body = {"name": self.name, "domain": "python"}
        if purpose == "molora-hello-2":
            signed |= body
            body["purpose"] = purpose
        body |= {"public_key": build_public_pem(self.key)}
        body["signature"] = sign(self.key, canonical_json(signed))
        return {"kind": "hello", "body": body}


def state(**fields):
    return [{"kind": "state", "body": fields}]


def count_rounds():
    """What a good contributor says: one step more in every message."""
    steps = itertools.count(1)
    return lambda letters: state(phase="TRAINING", step=next(steps), total=1_000, loss=2.0)


class Grid:
    """What Flower does: takes messages, gives answers back."""

    def __init__(self, nodes):
        self.nodes = nodes
        self._answers = {}
        self._ids = itertools.count()

    def get_nodes(self):
        return [SimpleNamespace(node_id=number, last_activated_at="") for number in self.nodes]

    def push_messages(self, messages):
        ids = []
        for message in messages:
            ids.append(f"m{next(self._ids)}")
            node = self.nodes[message.metadata.dst_node_id]
            text, parts = node.answer(message.content["letters"]["json"])
            content = RecordDict({"letters": ConfigRecord({"version": 1, "json": text})})
            if parts:
                arrays = {
                    name: Array("bytes", (len(data),), "molora.part", data)
                    for name, data in parts.items()
                }
                content["parts"] = ArrayRecord(arrays)
            self._answers[ids[-1]] = content
        return ids

    def pull_messages(self, ids):
        return [
            SimpleNamespace(
                metadata=SimpleNamespace(reply_to_message_id=one),
                content=self._answers.pop(one),
                has_error=lambda: False,
            )
            for one in ids
            if one in self._answers
        ]


def relay(home, *nodes):
    """A coordinator's relay with these nodes online."""
    carrier = server_app.MailRelay(home, Grid(dict(enumerate(nodes, start=1))), run_id=1)
    carrier._quiet_seconds = 0.0
    return carrier


def read_step(home, node):
    """The step of a contributor's state that the server last filed."""
    return json.loads(home.contributor(node.fingerprint).state_file.read_bytes())["step"]
