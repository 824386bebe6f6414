"""Turns a contributor's node into a hostile one: every other reply is not what it should be.

Found through PYTHONPATH by the processes of one node; the others are left as they are.
"""

import itertools
import os

REPLIES = (
    '[{"kind": "state", "body": {"phase": "TRAINING", "loss": 1' + "0" * 400 + "}}]",
    '[{"kind": "state", "body": {"phase": "TRAINING", "loss": NaN}}]',
    '[{"kind": "state", "body": {"phase": "TRAINING", "message": "\\ud800"}}]',
    '[{"kind": "state", "body": {"phase": "TRAINING", "step": 1' + "0" * 5_000 + "}}]",
    '[{"kind": "state", "body": {"phase": "[/x]\\u001b[2J", "message": "[/x]\\u001b[2J"}}]',
    '[{"kind": "state", "body": {"tasks": ' + "[" * 50_000,
)

if os.environ.get("MOLORA_TEST_HOSTILE"):
    from molora_fed.federation import wire

    pack_as_it_should_be = wire.pack_envelope
    numbers = itertools.count()

    def pack_envelope(envelope):
        number, content = next(numbers), pack_as_it_should_be(envelope)
        if number % 2:
            from flwr.app import ConfigRecord

            text = REPLIES[number // 2 % len(REPLIES)]
            content["letters"] = ConfigRecord({"version": 1, "json": text})
        return content

    wire.pack_envelope = pack_envelope
