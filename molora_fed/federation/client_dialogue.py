"""The contributor's side of the dialogue: answers letters from files on disk, in seconds.

Imports neither torch nor flwr, and does no heavy work: a new process starts for every message.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from molora_fed.errors import FederationError, StorageError
from molora_fed.federation.homes import ContributorHome
from molora_fed.federation.mailbox import read_json, read_parts, take_batch
from molora_fed.federation.messages import (
    MAX_BATCH_BYTES,
    Envelope,
    Letter,
    Part,
    Shipment,
    parse_part_names,
    parse_shipment,
    plan_parts,
)
from molora_fed.storage.files import canonical_json, write_json
from molora_fed.storage.keys import build_public_pem, load_key, sign

__all__ = ["answer", "build_hello_bytes"]

MAX_WAIT_SECONDS = 30.0
_LOOK_SECONDS = 0.2


def build_hello_bytes(nonce: str) -> bytes:
    """What a contributor signs to show that it holds its key."""
    return canonical_json({"purpose": "molora-hello-1", "nonce": nonce})


def answer(
    home: ContributorHome,
    envelope: Envelope,
    *,
    is_orphan: Callable[[], bool] = lambda: False,
) -> Envelope:
    """Answer one envelope of the server; answering it twice changes nothing.

    Args:
        home: The contributor's home.
        envelope: What the server sent.
        is_orphan: True once nobody is left to take the answer; ends waiting.

    Returns:
        The reply: always the state, and whatever was asked for.

    Raises:
        FederationError: If a letter is malformed.
    """
    letters: list[Letter] = []
    parts: list[Part] = []
    try:
        _store(home, envelope)
        home.board.post("")
    except StorageError as error:
        home.board.post(str(error))
    for letter in envelope.letters:
        if letter.kind == "hello":
            letters.append(_build_hello(home, str(letter.body.get("nonce", ""))))
        elif letter.kind == "fetch":
            parts += _collect(home, letter.body)
        elif letter.kind == "wait":
            _wait(home, letter.body, is_orphan)
            parts += _collect_early(home, letter.body)
    offer = read_json(home.offer_file)
    if offer is not None:
        letters.append(Letter("manifest", {"files": offer["files"]}))
    answered = _find_answer(home)
    if answered is not None:
        letters.append(Letter("answer", answered))
    letters.append(Letter("state", _build_state(home)))
    return Envelope(tuple(letters), tuple(parts))


def _store(home: ContributorHome, envelope: Envelope) -> None:
    """Put letters and parts into the inbox, where the worker finds them."""
    for part in envelope.parts:
        home.parts.put(part)
    for letter in envelope.letters:
        if letter.kind == "charter":
            write_json(home.charter_letter, dict(letter.body))
        elif letter.kind == "task":
            home.keep_task(str(letter.body.get("id", "")), letter.body)
        elif letter.kind == "acknowledgement":
            write_json(home.acknowledgement_letter, dict(letter.body))
        elif letter.kind == "result":
            write_json(home.result_letter, dict(letter.body))
        elif letter.kind == "question":
            write_json(home.question_letter, dict(letter.body))
        elif letter.kind == "refusal":
            write_json(home.refusal_letter, dict(letter.body))


def _build_hello(home: ContributorHome, nonce: str) -> Letter:
    settings = home.read_settings()
    key = load_key(home.key)
    return Letter(
        "hello",
        {
            "public_key": build_public_pem(key),
            "signature": sign(key, build_hello_bytes(nonce)),
            "name": settings.name,
            "domain": settings.domain,
        },
    )


def _build_state(home: ContributorHome) -> dict[str, Any]:
    """Where the contributor stands: what it holds, and what its worker last reported."""
    charter = read_json(home.charter_letter) or {}
    acknowledgement = read_json(home.acknowledgement_letter) or {}
    received = (
        sorted(path.name for path in home.shipments.iterdir()) if home.shipments.is_dir() else []
    )
    return {
        **home.read_state(),
        "charter": str(charter.get("id", "")),
        "tasks": sorted(home.list_tasks()),
        "acknowledged": str(acknowledgement.get("shipment", "")),
        "refused": home.refusal_letter.exists(),
        "question": str((read_json(home.question_letter) or {}).get("id", "")),
        "result": str((read_json(home.result_letter) or {}).get("id", "")),
        "received": received,
        "held": sorted(str(name) for name in home.parts.held()),
        "problem": home.board.read(),
    }


def _find_answer(home: ContributorHome) -> dict[str, Any] | None:
    """The answer to the last question that arrived, if the worker has made it."""
    asked = read_json(home.question_letter)
    answered = read_json(home.answer_file)
    if asked is None or answered is None or answered.get("question") != asked.get("id"):
        return None
    return dict(answered)


def _list_offered(home: ContributorHome) -> list[tuple[Path, Shipment]]:
    """What may be fetched: contribution, and answer to the last question."""
    offered = []
    offer, answered = read_json(home.offer_file), _find_answer(home)
    if offer is not None:
        offered.append((home.contribution, parse_shipment(offer["files"])))
    if answered is not None:
        folder = home.answer_folder(answered["question"])
        offered.append((folder, parse_shipment(answered["files"])))
    return offered


def _collect(home: ContributorHome, body: Any) -> list[Part]:
    """Read the parts that are asked for, as far as they are still offered."""
    names = parse_part_names(body.get("names", []))
    parts: list[Part] = []
    for folder, shipment in _list_offered(home):
        known = {entry.sha256 for entry in shipment.files}
        wanted = [name for name in names if name.sha256 in known]
        names = [name for name in names if name.sha256 not in known]
        parts += read_parts(folder, shipment, take_batch(wanted))
    return parts


def _collect_early(home: ContributorHome, body: Any) -> list[Part]:
    """The first parts of what was waited for, sent before they are asked for: saves a round."""
    size = min(int(body.get("parts_bytes", 0)), MAX_BATCH_BYTES)
    if size <= 0 or not _has_news(home, body):
        return []
    folder, shipment = _list_offered(home)[-1 if body.get("question") else 0]
    batch = take_batch(plan_parts(shipment, part_bytes=size), max_bytes=size)
    return read_parts(folder, shipment, batch)


def _has_news(home: ContributorHome, body: Any) -> bool:
    """Whether there is what a wait letter waits for: a contribution, or an answer."""
    question = body.get("question")
    if not question:
        return home.offer_file.exists()
    answered = _find_answer(home)
    return answered is not None and answered["question"] == question


def _wait(home: ContributorHome, body: Any, is_orphan: Callable[[], bool]) -> None:
    """Wait until the worker has what is waited for, or time is up."""
    seconds = body.get("seconds", 0)
    if not isinstance(seconds, int | float) or not 0 <= seconds <= MAX_WAIT_SECONDS:
        raise FederationError(
            f"Cannot wait: expected 0 to {MAX_WAIT_SECONDS} seconds, got {seconds!r}. "
            "Run the same molora-fed version on both sides."
        )
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not is_orphan() and not _has_news(home, body):
        time.sleep(_LOOK_SECONDS)
