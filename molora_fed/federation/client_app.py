"""The Flower ClientApp: a mailbox. Every message is answered in seconds from files on disk.

A new process starts for each message, so this module imports neither torch nor transformers.
Training runs beside it (`worker`); a stalled ClientApp would lose its message for good.
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
