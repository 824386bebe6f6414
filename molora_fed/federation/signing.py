"""What is signed of the letters: each form has a purpose of its own, so none stands for another.

All of them name the cooperative, or files that do, so that no signature is good elsewhere.
"""

from collections.abc import Mapping
from typing import Any

from molora_fed.charter import Charter, parse_charter
from molora_fed.errors import FederationError
from molora_fed.federation.letters import CharterLetter, Summary
from molora_fed.storage.files import canonical_json, hash_bytes
from molora_fed.storage.keys import verify

__all__ = [
    "build_acknowledgement_bytes",
    "build_answer_bytes",
    "build_charter_bytes",
    "build_hello_bytes",
    "build_question_bytes",
    "build_result_bytes",
    "build_set_bytes",
    "hash_charter_letter",
    "open_charter",
]


def build_hello_bytes(
    purpose: str,
    *,
    nonce: str,
    identity: str,
    coordinator: str,
    name: str,
    domain: str,
    node_key: str | None = None,
) -> bytes:
    """What a contributor signs to show that it holds its key, and whom it wants to join.

    Args:
        purpose: Form of what is signed, of the hello.
        nonce: The server's.
        identity: The charter's identity.
        coordinator: Fingerprint of the coordinator's key.
        name: Name it goes by.
        domain: Domain it joins with.
        node_key: Public key of its node; left out where the transport knows none.
    """
    content = {"purpose": purpose, "nonce": nonce, "identity": identity, "name": name}
    content |= {"coordinator": coordinator, "domain": domain}
    return canonical_json(content if node_key is None else {**content, "node_key": node_key})


def hash_charter_letter(letter: Mapping[str, Any]) -> str:
    """The id of a charter's letter: the hash of all that it says."""
    outside = ("id", "public_key", "signature")
    return hash_bytes(canonical_json({k: v for k, v in letter.items() if k not in outside}))


def build_charter_bytes(identity: str, amendment: int, letter: str) -> bytes:
    """What the coordinator signs of a charter: the cooperative, its amendment, the whole letter."""
    content = {"purpose": "molora-charter-2", "identity": identity, "letter": letter}
    return canonical_json({**content, "amendment": amendment})


def open_charter(letter: CharterLetter) -> Charter:
    """The charter in a letter, signed by the key in it; whose key that is, is not judged here.

    Raises:
        SignatureError: If it is not signed by that key.
        CharterError: If it is malformed.
        FederationError: If it is not the charter that its letter says.
    """
    signed = build_charter_bytes(
        letter.identity, letter.amendment, hash_charter_letter(letter.to_json())
    )
    verify(letter.public_key, signed, letter.signature, what="charter")
    charter = parse_charter(letter.text, where="charter of the server")
    stated = (charter.identity_hash, charter.amendment.number)
    if stated != (letter.identity, letter.amendment):
        raise FederationError(
            f"Cannot use charter: expected identity {letter.identity[:16]} and amendment "
            f"{letter.amendment} as its letter says, got {stated[0][:16]} and {stated[1]}. "
            "Ask the coordinator."
        )
    return charter


def build_acknowledgement_bytes(body: Mapping[str, Any]) -> bytes:
    """What the coordinator signs of an acknowledgement."""
    unsigned = {name: value for name, value in body.items() if name != "signature"}
    return canonical_json({"purpose": "molora-acknowledgement-1", **unsigned})


def build_result_bytes(identity: str, shipment: str, summary: Summary) -> bytes:
    """What the coordinator signs of a result: the cooperative, the files, of what they are made."""
    content = {"purpose": "molora-result-1", "identity": identity, "result": shipment}
    made = hash_bytes(canonical_json(summary.model_dump(mode="json")))
    return canonical_json({**content, "amendment": summary.amendment, "summary": made})


def build_question_bytes(identity: str, amendment: int, question: str) -> bytes:
    """What the coordinator signs of a question: the cooperative, its amendment, and the files."""
    content = {"purpose": "molora-question-1", "identity": identity, "question": question}
    return canonical_json({**content, "amendment": amendment})


def build_set_bytes(identity: str, fusion: str, tags: str) -> bytes:
    """What a contributor signs of its set of tags: the cooperative, the fusion, the set's hash.

    Other members get it through the coordinator, who could put in another.
    """
    content = {"purpose": "molora-overlap-set-1", "identity": identity, "fusion": fusion}
    return canonical_json({**content, "set": tags})


def build_answer_bytes(identity: str, question: str, answer: str) -> bytes:
    """What a contributor signs of an answer: the cooperative, what was asked, and the files."""
    content = {"purpose": "molora-answer-1", "identity": identity, "question": question}
    return canonical_json({**content, "answer": answer})
