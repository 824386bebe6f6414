"""Envelopes between the process on the network and the one that reads and writes letters.

    python -P -m molora_fed.federation.pipes HOME

The first holds the node's key and can open nothing else of the contributor's; the second reads the
contributor's home, changes the mail alone, and has no network. It imports neither torch nor flwr,
and answers one envelope after the other on its standard input and output.
"""

import os
import struct
import sys
import traceback
from pathlib import Path
from typing import Any, BinaryIO

from molora_fed.errors import FederationError, MoloraError
from molora_fed.federation.client_dialogue import answer
from molora_fed.federation.confine import confine
from molora_fed.federation.envelopes import Envelope, Sender, parse_letters
from molora_fed.federation.homes import ContributorHome
from molora_fed.federation.logs import log, start_logging
from molora_fed.federation.mailbox import Board
from molora_fed.federation.messages import (
    MAX_BATCH_BYTES,
    MAX_LETTERS_BYTES,
    Part,
    parse_part_name,
)
from molora_fed.federation.traffic import SERVER, Traffic
from molora_fed.storage.files import canonical_json
from molora_fed.storage.untrusted import parse_json

__all__ = ["REFUSED", "read_envelope", "write_envelope", "write_sent"]

_HEAD = struct.Struct(">II")  # bytes of letters, number of parts
_PART = struct.Struct(">II")  # bytes of the name, bytes of the data
_MAX_NAME_BYTES = 200
_MAX_PARTS = 10_000
_SENT = _HEAD.pack(0, 0)
"""Says that the last answer has left this machine."""
REFUSED = "refused"
"""Written instead of letters where an envelope could not be answered."""


def write_envelope(stream: BinaryIO, envelope: Envelope | None) -> None:
    """Write an envelope; None says that there is no answer to the last one.

    Raises:
        FederationError: If it is too large; nothing was written then.
    """
    if envelope is None:
        letters = canonical_json(REFUSED)
        envelope = Envelope()
    else:
        letters = canonical_json(
            [{"kind": letter.kind, "body": letter.to_json()} for letter in envelope.letters]
        )
    is_long = len(letters) > MAX_LETTERS_BYTES or len(envelope.parts) > _MAX_PARTS
    if is_long or envelope.num_bytes > MAX_BATCH_BYTES:
        raise _too_large()
    stream.write(_HEAD.pack(len(letters), len(envelope.parts)) + letters)
    for part in envelope.parts:
        name = str(part.name).encode()
        stream.write(_PART.pack(len(name), len(part.data)) + name)
        stream.write(part.data)
    stream.flush()


def write_sent(stream: BinaryIO) -> None:
    """Tell the other side that its last answer has left."""
    stream.write(_SENT)
    stream.flush()


def read_envelope(stream: BinaryIO, *, sender: Sender) -> Envelope | None:
    """Read an envelope; None if there was no answer, or one has left.

    Args:
        stream: Where the other side writes.
        sender: Who made the envelope.

    Raises:
        EOFError: If the other side is gone.
        FederationError: If it is malformed or too large.
    """
    num_letters, num_parts = _HEAD.unpack(_read(stream, _HEAD.size))
    if num_letters == 0:
        return None
    if num_letters > MAX_LETTERS_BYTES or num_parts > _MAX_PARTS:
        raise _too_large()
    letters = _read_letters(_read(stream, num_letters))
    parts: list[Part] = []
    left = MAX_BATCH_BYTES
    for _ in range(num_parts):
        num_name, num_data = _PART.unpack(_read(stream, _PART.size))
        left -= num_data
        if num_name > _MAX_NAME_BYTES or left < 0:
            raise _too_large()
        name = parse_part_name(_read(stream, num_name).decode("ascii", "replace"))
        parts.append(Part(name, _read(stream, num_data)))
    if letters == REFUSED:
        return None
    return Envelope(parse_letters(letters, sender=sender), tuple(parts))


def _read_letters(data: bytes) -> Any:
    try:
        return parse_json(data, max_bytes=MAX_LETTERS_BYTES)
    except ValueError as error:
        raise FederationError(
            f"Cannot pass a message on: expected letters in JSON, got {error}. "
            "Please report this; it is an error in molora-fed."
        ) from error


def _read(stream: BinaryIO, num_bytes: int) -> bytes:
    data = stream.read(num_bytes)
    if len(data) != num_bytes:
        raise EOFError
    return data


def _too_large() -> FederationError:
    return FederationError(
        "Cannot pass a message on: expected one within its limits, got a larger one. "
        "Please report this; it is an error in molora-fed."
    )


def _answer_all(home: ContributorHome, busy: Board) -> None:
    """Answer envelopes until the other side is gone."""
    parent = os.getppid()
    traffic = Traffic(home.traffic_file)
    asked, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints does not get between the answers
    while True:
        try:
            envelope = read_envelope(asked, sender="server")
        except EOFError:
            traffic.write()
            return
        if envelope is None:
            busy.post("")
            continue
        busy.post("answering")
        traffic.note(SERVER, received=envelope.num_bytes)
        try:
            reply = answer(home, envelope, is_orphan=lambda: os.getppid() != parent)
            write_envelope(answers, reply)
            traffic.note(SERVER, sent=0 if reply is None else reply.num_bytes)
        except MoloraError as error:
            log("message not answered", "warning", reason=error)
            write_envelope(answers, None)
        except Exception:  # one letter must not silence the others
            log("message not answered", "error", trace=traceback.format_exc())
            write_envelope(answers, None)


if __name__ == "__main__":
    own = ContributorHome(Path(sys.argv[1]))
    start_logging("letters")
    # Its files change place with every write, and rules are of places: so the home as a whole. The
    # texts it was made from lie elsewhere.
    problem = confine(read=[own.root], write=[own.mail], network=False)
    if problem:
        log("not confined", "warning", to=sys.stderr, reason=problem)
    _answer_all(own, own.busy)
