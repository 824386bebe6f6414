"""The Flower ClientApp of simulated nodes: every message is answered from files on disk.

It imports neither torch nor transformers; training runs beside it (`pool_worker`). Contributors'
own nodes are not Flower's (`flower.node`).
"""

import os
from typing import Any

from flwr.app import Message
from flwr.clientapp import ClientApp

from molora_fed.federation.client_dialogue import answer
from molora_fed.federation.envelopes import Envelope
from molora_fed.federation.fleet import find_own_home
from molora_fed.federation.homes import ContributorHome
from molora_fed.federation.wire import pack_envelope, unpack_envelope

__all__ = ["app"]

app = ClientApp()


@app.query()
def correspond(message: Any, context: Any) -> Any:
    """Answer one envelope of the server."""
    home, parent = find_own_home(context.node_config), os.getppid()
    reply = (
        Envelope()  # nobody is here yet
        if home is None
        else answer(
            ContributorHome(home),
            unpack_envelope(message.content, sender="server"),
            is_orphan=lambda: os.getppid() != parent,
        )
    )
    return Message(pack_envelope(reply), reply_to=message)
