"""Envelopes as Flower records: letters as canonical JSON, parts as raw arrays."""

from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from molora_fed.errors import FederationError
from molora_fed.federation.envelopes import Envelope, Sender, parse_letters
from molora_fed.federation.messages import (
    MAX_BATCH_BYTES,
    MAX_LETTERS_BYTES,
    Part,
    parse_part_name,
)
from molora_fed.storage.files import canonical_json
from molora_fed.storage.untrusted import clean, parse_json

__all__ = ["FORMAT_VERSION", "pack_envelope", "unpack_envelope"]

FORMAT_VERSION = 1
MAX_PARTS = 65_536
"""Parts in one envelope."""


def pack_envelope(envelope: Envelope) -> Any:
    """Turn an envelope into a Flower `RecordDict`.

    Raises:
        FederationError: If the letters or the parts are too large to be sent at once. A reply
            that Flower cannot serialise would block its node for good, so this is checked
            here and not there.
    """
    letters = canonical_json(
        [{"kind": letter.kind, "body": letter.to_json()} for letter in envelope.letters]
    )
    if len(letters) > MAX_LETTERS_BYTES or envelope.num_bytes > MAX_BATCH_BYTES:
        raise FederationError(
            f"Cannot send a message: expected at most {MAX_LETTERS_BYTES} bytes of letters and "
            f"{MAX_BATCH_BYTES} of parts, got {len(letters)} and {envelope.num_bytes}. "
            "Please report this; it is an error in molora-fed."
        )
    content = RecordDict(
        {"letters": ConfigRecord({"version": FORMAT_VERSION, "json": letters.decode()})}
    )
    if envelope.parts:
        content["parts"] = ArrayRecord(
            {
                str(part.name): Array(
                    dtype="bytes", shape=(len(part.data),), stype="molora.part", data=part.data
                )
                for part in envelope.parts
            }
        )
    return content


def unpack_envelope(content: Any, *, sender: Sender) -> Envelope:
    """Read an envelope that came from outside.

    Args:
        content: Flower `RecordDict`.
        sender: Who sent it.

    Raises:
        FederationError: If it is of another version, malformed, or larger than allowed; one short
            line says what, whatever it holds.
    """
    try:
        head = content["letters"]
        version, text = head["version"], head["json"]
        if version != FORMAT_VERSION:
            raise ValueError(f"format {clean(version, 40)}")
        if not isinstance(text, str):
            raise ValueError("no text")
        letters = parse_letters(parse_json(text, max_bytes=MAX_LETTERS_BYTES), sender=sender)
        arrays = content.get("parts", {})
        if len(arrays) > MAX_PARTS:
            raise ValueError(f"{len(arrays)} parts")
        parts = []
        for key, array in arrays.items():
            name = parse_part_name(key)
            if len(array.data) != name.length:
                raise ValueError(f"part {name} with {len(array.data)} bytes")
            parts.append(Part(name, array.data))
        if sum(len(part.data) for part in parts) > MAX_BATCH_BYTES:
            raise ValueError("too many bytes of parts")
    except FederationError:
        raise
    except Exception as error:  # whatever it is: one node's message must never end the other side
        raise FederationError(
            f"Cannot read a message: expected letters and parts of format {FORMAT_VERSION}, got "
            f"{clean(error) or type(error).__name__}. Run the same molora-fed version on both "
            "sides."
        ) from error
    return Envelope(tuple(letters), tuple(parts))
