"""Good messages and invitations, and the functions that read them."""

import base64
import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from fuzz_folders import Run

from molora_fed.errors import ConfigError
from molora_fed.federation.envelopes import Sender
from molora_fed.federation.invitations import Invitation, parse_invitation
from molora_fed.federation.wire import unpack_envelope
from molora_fed.storage.files import hash_bytes

__all__ = ["FROM_CONTRIBUTOR", "FROM_SERVER", "prepare_invitations", "prepare_mail"]

_HASH = "a" * 64
_FILES = [
    {"name": "a/b.bin", "sha256": _HASH, "num_bytes": 3},
    {"name": "c.bin", "sha256": _HASH, "num_bytes": 2**40 - 3},
]
_SIGNED = {"public_key": "PEM", "signature": "ab" * 50}
FROM_CONTRIBUTOR: dict[str, dict[str, object]] = {
    "hello": {"purpose": "molora-hello-2", "name": "alice", "domain": "legal", **_SIGNED},
    "state": {
        "phase": "TRAINING", "step": 3, "total": 9, "loss": 2.5, "eta_seconds": 1.0,
        "message": "text", "problem": "", "charter": _HASH, "tasks": ["train-0"], "question": "",
        "acknowledged": "", "refused": False, "result": "", "received": [_HASH],
        "held": [f"{_HASH}-0-3"],
    },
    "manifest": {"files": _FILES},
    "answer": {"question": _HASH, "files": _FILES, "signature": "ab"},
}  # fmt: skip
FROM_SERVER: dict[str, dict[str, object]] = {
    "hello": {"nonce": _HASH, "identity": _HASH, "coordinator": _HASH},
    "refusal": {"reason": "text"},
    "charter": {
        "id": _HASH, "text": "", "identity": _HASH, "amendment": 0, "base": _FILES,
        "tasks": [{"id": "train-0", "kind": "train"}], "part_bytes": 9, **_SIGNED,
    },
    "task": {"id": "train-0", "kind": "train"},
    "wait": {"seconds": 1.0, "parts_bytes": 9, "question": _HASH},
    "fetch": {"names": [f"{_HASH}-0-3"]},
    "acknowledgement": {
        "shipment": _HASH, "contribution_id": "", "state": "ADMITTED", "findings": ["text"],
        "signature": "ab",
    },
    "result": {
        "id": _HASH, "files": _FILES, "part_bytes": 9, "identity": _HASH, "signature": "ab",
        "summary": {"amendment": 0, "contributions": ["a"], "gain_percent": {"r": {"x": 1.0}}},
    },
    "question": {
        "id": _HASH, "files": _FILES, "part_bytes": 9, "answer_bytes": 9, "amendment": 0,
        "signature": "ab",
    },
}  # fmt: skip


def _build_content(data: bytes) -> RecordDict:
    """A message's content: of its version, letters and parts, or of bytes instead of letters.

    A part is hash, offset and length as its name has them, and perhaps how many bytes it brings.
    """
    text, version, parts = data.decode("utf-8", "surrogateescape"), 1, []
    with contextlib.suppress(ValueError, RecursionError):
        whole = json.loads(text)
        if isinstance(whole, dict) and "letters" in whole:
            letters, version, parts = (whole.get(k) for k in ("letters", "version", "parts"))
            is_number = isinstance(letters, int) and abs(letters) < 2**31
            text = letters if is_number else json.dumps(letters)
    version = version if isinstance(version, int | float | str) else 1
    content = RecordDict({"letters": ConfigRecord({"version": version, "json": text})})
    arrays = {}
    for part in parts if isinstance(parts, list) else ():
        if isinstance(part, list) and part:
            size = part[-1] if isinstance(part[-1], int) and 0 <= part[-1] <= 2**26 else 0
            arrays["-".join(str(each)[:400] for each in part[:3])] = _make_zeros(size)
    if arrays:
        content["parts"] = ArrayRecord(
            {
                name: Array(dtype="bytes", shape=(len(each),), stype="molora.part", data=each)
                for name, each in arrays.items()
            }
        )
    return content


@lru_cache(maxsize=4)
def _make_zeros(size: int) -> bytes:
    return bytes(size)


def prepare_mail(sender: Sender, letters: Mapping[str, dict[str, object]]):
    def prepare(folder: Path) -> tuple[Sequence[bytes], Run]:
        def run(data: bytes) -> None:
            unpack_envelope(_build_content(data), sender=sender)

        every = [{"kind": kind, "body": body} for kind, body in letters.items()]
        parts = [[_HASH, 0, 3], [_HASH, 3, 100, 100]]
        large = [[_HASH, 0, 2**25], [_HASH, 2**25, 2**25]]  # as much as one message may bring
        some = [
            {"version": 1, "letters": every, "parts": parts},
            {"version": 1, "letters": [], "parts": large},
            *([one] for one in every),
        ]
        return [json.dumps(each).encode() for each in some], run

    return prepare


def prepare_invitations(folder: Path) -> tuple[Sequence[bytes], Run]:
    invitation = Invitation(
        server="fed.example:8080", authority=_HASH, charter=_HASH, coordinator=_HASH,
        secret="s3cret-s3cret", name="alice", domain="legal", expires=1_800_000_000,
    )  # fmt: skip

    def run(data: bytes) -> None:
        payload = base64.urlsafe_b64encode(data).decode().rstrip("=")
        sealed = f"molora1.{payload}.{hash_bytes(payload.encode())[:8]}"
        for line in (data.decode("utf-8", "replace"), sealed):
            try:
                parse_invitation(line)
            except ConfigError as error:
                fault = error
                continue
            return
        raise fault

    return [json.dumps(asdict(invitation)).encode()], run
