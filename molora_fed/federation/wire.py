"""Envelopes as Flower records: letters as canonical JSON, parts as raw arrays."""

import json
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from molora_fed.errors import FederationError
from molora_fed.federation.messages import (
    MAX_BATCH_BYTES,
    MAX_LETTERS_BYTES,
    Envelope,
    Part,
    parse_letters,
    parse_part_names,
)
from molora_fed.storage.files import canonical_json

__all__ = ["FORMAT_VERSION", "pack_envelope", "unpack_envelope"]

FORMAT_VERSION = 1


def pack_envelope(envelope: Envelope) -> Any:
    """Turn an envelope into a Flower `RecordDict`.

    Raises:
        FederationError: If the letters or the parts are too large to be sent at once. A reply
            that Flower cannot serialise would block its SuperNode for good, so this is checked
            here and not there.
    """
    letters = canonical_json(
        [{"kind": letter.kind, "body": dict(letter.body)} for letter in envelope.letters]
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


def unpack_envelope(content: Any) -> Envelope:
    """Read an envelope that came from outside.

    Raises:
        FederationError: If it is of another version, malformed, or larger than allowed.
    """
    try:
        head = content["letters"]
        version, text = head["version"], head["json"]
        if version != FORMAT_VERSION:
            raise FederationError(
                f"Cannot read a message: expected format {FORMAT_VERSION}, got {version}. "
                "Run the same molora-fed version on both sides."
            )
        if not isinstance(text, str) or len(text) > MAX_LETTERS_BYTES:
            raise ValueError("too many letters")
        letters = parse_letters(json.loads(text))
        arrays = content.get("parts", {})
        parts = []
        for key, array in arrays.items():
            (name,) = parse_part_names([key])
            if len(array.data) != name.length:
                raise ValueError(f"part {key} with {len(array.data)} bytes")
            parts.append(Part(name, array.data))
        if sum(len(part.data) for part in parts) > MAX_BATCH_BYTES:
            raise ValueError("too many bytes of parts")
    except FederationError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise FederationError(
            f"Cannot read a message: expected letters and parts, got {error!s:.120}. "
            "Run the same molora-fed version on both sides."
        ) from error
    return Envelope(letters, tuple(parts))
