"""Masked sums with all members in this process: the whole protocol, message by message."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from numpy.typing import NDArray

from molora_fed.privacy.sums.coordinator import Coordinator
from molora_fed.privacy.sums.fixed_point import Bits, FixedPoint
from molora_fed.privacy.sums.member import Member
from molora_fed.privacy.sums.messages import Terms
from molora_fed.privacy.sums.vectors import Total, VectorLayout
from molora_fed.storage.files import hash_bytes
from molora_fed.storage.keys import build_public_pem

__all__ = ["LocalMaskedSum", "Measure", "run_masked_sum"]

Measure = Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]
"""A member's answer to a question: tensors of a layout's parts from tensors of the question."""


@dataclass(eq=False)
class LocalMaskedSum:
    """A `Summation` by masked sums over members in this process.

    Attributes:
        members: What each member answers with, by name.
        identity: The charter's identity, 64 hex digits.
        fusion: Which fusion.
        bits: k of the modulus 2^k.
    """

    members: Mapping[str, Measure]
    identity: str = "0" * 64
    fusion: str = "local"
    bits: Bits = 64
    _keys: dict[str, ec.EllipticCurvePrivateKey] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._keys = {name: ec.generate_private_key(ec.SECP384R1()) for name in self.members}

    def __call__(self, layout: VectorLayout, question: Mapping[str, torch.Tensor]) -> Total:
        """Sum; see `Summation`."""
        encoding = FixedPoint(layout, len(self.members), self.bits)
        terms = Terms.build(
            {name: build_public_pem(key) for name, key in self._keys.items()},
            encoding,
            identity=self.identity,
            fusion=self.fusion,
            question=_hash_tensors(question),
        )
        members, notes = [], []
        for name, measure in sorted(self.members.items()):
            vector, beyond = layout.clip(layout.flatten(measure(question), who=name), who=name)
            if beyond:
                notes.append(f"{beyond:,} entries of '{name}' lay beyond their bound.")
            secret = secrets.token_bytes(32)
            words = encoding.encode(vector)
            members.append(Member.begin(name, terms, words, secret=secret, key=self._keys[name]))
        names, encoded = run_masked_sum(Coordinator.begin(terms), members)
        parts = layout.unflatten(encoding.decode(encoded, len(names)))
        return Total(parts, names, tuple(notes), encoded)


def run_masked_sum(
    coordinator: Coordinator,
    members: Sequence[Member],
    *,
    deliver: Callable[[str, str, bytes], bytes | None] = lambda name, phase, data: data,
) -> tuple[tuple[str, ...], NDArray[np.unsignedinteger]]:
    """Run a sum from its beginning to its total.

    Args:
        coordinator: That has begun.
        members: That have begun.
        deliver: Called with the member, the phase and what it sends; returns what arrives, or
            None where nothing does. The network, for tests.

    Returns:
        The survivors, and the total of their encoded vectors, (N,).

    Raises:
        SumError: If fewer members than the threshold go through a phase.
    """
    by_name = {member.name: member for member in members}
    answers = {name: member.send_keys() for name, member in by_name.items()}
    while True:
        for name, answer in answers.items():
            arrived = deliver(name, coordinator.state.phase, answer)
            if arrived is not None:
                coordinator.receive(name, arrived)
        if coordinator.state.phase == "revealed":
            return tuple(coordinator.survivors), coordinator.open_total()
        asked = coordinator.advance()
        answers = {name: by_name[name].answer(data) for name, data in asked.items()}


def _hash_tensors(question: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes."""
    digests = []
    for name, tensor in sorted(question.items()):
        value = tensor.detach().cpu().contiguous()
        head = f"{name} {value.dtype} {tuple(value.shape)}"
        data = value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        digests.append(f"{head} {hash_bytes(data)}")
    return hash_bytes("\n".join(digests).encode())
