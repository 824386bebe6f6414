"""Masked sums for tests: keys, terms, members that have begun, and runs message by message."""

from functools import cache

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec

from molora_fed.privacy.sums.coordinator import Coordinator
from molora_fed.privacy.sums.fixed_point import FixedPoint, word_type
from molora_fed.privacy.sums.member import Member
from molora_fed.privacy.sums.messages import Terms
from molora_fed.privacy.sums.vectors import Part, VectorLayout
from molora_fed.storage.keys import build_public_pem

PHASES = ("keys", "shares", "masked", "agreement", "revealed")


@cache
def find_key(name):
    return ec.generate_private_key(ec.SECP384R1())


def list_names(count):
    return [f"member-{number:02}" for number in range(count)]


def find_secret(name):
    return name.encode().ljust(32, b".")


def build_terms(names, *, length=4, bits=64, **changed):
    layout = VectorLayout((Part("sums", (length,), 1.0),))
    encoding = FixedPoint(layout, max(len(names), 3), bits)
    public = {name: build_public_pem(find_key(name)) for name in names}
    settings = {"identity": "a" * 64, "fusion": "f-1", "question": "b" * 64, **changed}
    return Terms.build(public, encoding, **settings)


def draw_words(count, length, bits, seed=0):
    generator = np.random.default_rng(seed)
    raw = generator.bytes(count * length * bits // 8)
    return np.frombuffer(raw, dtype=word_type(bits)).reshape(count, length)


def begin(count, *, length=4, bits=64, seed=0, words=None, **changed):
    """Coordinator, members by name, and their vectors by name."""
    names = list_names(count)
    terms = build_terms(names, length=length, bits=bits, **changed)
    words = draw_words(count, length, bits, seed) if words is None else words
    vectors = dict(zip(names, words, strict=True))
    members = {
        name: Member.begin(name, terms, own, secret=find_secret(name), key=find_key(name))
        for name, own in vectors.items()
    }
    return Coordinator.begin(terms), members, vectors


def go_to(coordinator, members, phase, *, without=()):
    """Run until the coordinator waits for a phase; returns what it was sent then, by member.

    Args:
        without: Members whose masked vectors get lost.
    """
    answers = {name: member.send_keys() for name, member in members.items()}
    while coordinator.state.phase != phase:
        for name, answer in answers.items():
            if coordinator.state.phase != "masked" or name not in without:
                coordinator.receive(name, answer)
        asked = coordinator.advance()
        answers = {name: members[name].answer(data) for name, data in asked.items()}
    return answers


def add_words(vectors, names):
    return np.sum(
        [vectors[name] for name in names], axis=0, dtype=next(iter(vectors.values())).dtype
    )
