"""Changed messages on both sides of a masked sum: refused in one line, or without effect."""

import json
import random

import pytest
from fuzz_mutators import mutate_json
from sums_helpers import begin, go_to

from molora_fed.errors import SumError
from molora_fed.privacy.sums.coordinator import Coordinator
from molora_fed.privacy.sums.member import Member
from molora_fed.privacy.sums.member_state import MemberState

INPUTS = 350  # changed messages of each phase and side


def mutate(data, chance):
    """Another line of JSON, or other bytes; the words behind a line are changed, too."""
    line, newline, payload = data.partition(b"\n")
    kind = chance.randrange(8)
    if kind == 0:
        return data[: chance.randrange(len(data))]
    if kind == 1:
        place = chance.randrange(len(data))
        return data[:place] + bytes([data[place] ^ (1 << chance.randrange(8))]) + data[place + 1 :]
    if kind == 2:
        place = chance.randrange(len(data))
        return data[:place] + chance.randbytes(chance.randrange(1, 20)) + data[place:]
    return mutate_json(line, chance) + newline + payload


def check_error(error):
    text = str(error)
    assert "\n" not in text and len(text) < 800 and text.isprintable(), text


@pytest.mark.parametrize("phase", ["keys", "shares", "masked", "agreement", "revealed"])
def test_a_coordinator_meets_changed_messages(phase):
    coordinator, members, _ = begin(4)
    answers = go_to(coordinator, members, phase)
    kept, right = coordinator.to_bytes(), answers["member-01"]
    chance = random.Random(f"coordinator {phase}")
    refused = 0
    for _ in range(INPUTS):
        fresh = Coordinator.from_bytes(kept)
        data = mutate(right, chance)
        try:
            fresh.receive(chance.choice(("member-01",) * 9 + ("eve",)), data)
        except SumError as error:
            check_error(error)
            assert fresh.to_bytes() == kept
            refused += 1
        else:
            assert is_alike(data, right)
    assert refused > INPUTS * 0.9
    fresh = Coordinator.from_bytes(kept)
    fresh.receive("member-01", right)
    assert fresh.to_bytes() != kept


def is_alike(data, right):
    """Whether a message that was taken in says what was signed, written otherwise at most."""
    return json.loads(data.partition(b"\n")[0]) == json.loads(right.partition(b"\n")[0])


@pytest.mark.parametrize("phase", ["shares", "masked", "agreement", "revealed"])
def test_a_member_meets_changed_messages(phase):
    before = {"shares": "keys", "masked": "shares", "agreement": "masked", "revealed": "agreement"}
    coordinator, members, vectors = begin(4)
    for name, answer in go_to(coordinator, members, before[phase]).items():
        coordinator.receive(name, answer)
    right = coordinator.advance()["member-01"]
    begun = members["member-01"]
    kept = begun.state.to_bytes()
    chance = random.Random(f"member {phase}")
    refused = 0
    for _ in range(INPUTS):
        data = mutate(right, chance)
        fresh = Member.__new__(Member)
        fresh.__dict__.update(begun.__dict__, state=MemberState.from_bytes(kept))
        try:
            fresh.answer(data)
        except SumError as error:
            check_error(error)
            assert fresh.state.to_bytes() == kept
            refused += 1
    # Sealed shares that were changed are answered: their owner is called unusable.
    assert refused > INPUTS * (0.5 if phase == "masked" else 0.9)
    assert begun.answer(right) and len(vectors) == 4


@pytest.mark.parametrize("whose", ["coordinator", "member"])
def test_kept_states_that_were_changed(whose):
    coordinator, members, vectors = begin(4)
    go_to(coordinator, members, "agreement")
    member = members["member-01"]
    right = coordinator.to_bytes() if whose == "coordinator" else member.state.to_bytes()
    chance = random.Random(f"state {whose}")
    for _ in range(INPUTS):
        data = mutate(right, chance)
        try:
            if whose == "coordinator":
                Coordinator.from_bytes(data).outgoing()
            else:
                state = MemberState.from_bytes(data)
                Member(
                    "member-01", state, vectors["member-01"], secret=b"s" * 32, key=member.key
                ).answer(b"{}")
        except SumError as error:
            check_error(error)
