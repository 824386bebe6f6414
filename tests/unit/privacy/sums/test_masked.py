"""Masked sums are exact, go on without those who drop out, and resume to the same bytes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from sums_helpers import (
    PHASES,
    add_words,
    begin,
    build_terms,
    find_key,
    find_secret,
    go_to,
    list_names,
)

from molora_fed.errors import SumError
from molora_fed.privacy.sums.coordinator import Coordinator
from molora_fed.privacy.sums.fixed_point import FixedPoint
from molora_fed.privacy.sums.local import LocalMaskedSum, run_masked_sum
from molora_fed.privacy.sums.member import Member
from molora_fed.privacy.sums.member_state import MemberState
from molora_fed.privacy.sums.messages import Terms, compute_threshold
from molora_fed.privacy.sums.vectors import Part, VectorLayout


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 5), min_size=3, max_size=7),
    st.integers(1, 40),
    st.sampled_from([8, 16, 32, 64]),
    st.integers(0, 2**32),
)
def test_the_total_is_that_of_the_survivors_to_the_bit_or_there_is_none(leave, length, bits, seed):
    """Each member leaves before it sends what belongs to a phase; 5 stays to the end."""
    coordinator, members, vectors = begin(len(leave), length=length, bits=bits, seed=seed)
    leaves = dict(zip(members, leave, strict=True))

    def deliver(name, phase, data):
        return data if PHASES.index(phase) < leaves[name] else None

    counts = [sum(left > number for left in leave) for number in range(5)]
    if min(counts) < compute_threshold(len(leave)):
        needed = compute_threshold(len(leave))
        phase = next(p for p, n in zip(PHASES, counts, strict=True) if n < needed)
        with pytest.raises(SumError, match=f"after phase '{phase}'"):
            run_masked_sum(coordinator, list(members.values()), deliver=deliver)
        return
    survivors, total = run_masked_sum(coordinator, list(members.values()), deliver=deliver)
    assert survivors == tuple(name for name, left in leaves.items() if left > 2)
    assert total.tobytes() == add_words(vectors, survivors).tobytes()


@pytest.mark.parametrize(("count", "gone"), [(20, 6), (12, 3)])
def test_many_members_may_leave_as_long_as_the_threshold_holds(count, gone):
    coordinator, members, vectors = begin(count, length=100)
    left = list_names(count)[:gone]
    survivors, total = run_masked_sum(
        coordinator,
        list(members.values()),
        deliver=lambda name, phase, data: None if phase == "masked" and name in left else data,
    )
    assert len(survivors) == count - gone and not set(left) & set(survivors)
    assert (total == add_words(vectors, survivors)).all()


def test_who_revealed_late_or_never_agreed_changes_nothing():
    coordinator, members, vectors = begin(6)
    answers = go_to(coordinator, members, "agreement")
    late = {name: answers.pop(name) for name in ["member-02"]}
    for name, answer in answers.items():
        coordinator.receive(name, answer)
    asked = coordinator.advance()
    for name, answer in late.items():
        with pytest.raises(SumError, match=r"'member-02'.*'agreement'.*too late"):
            coordinator.receive(name, answer)
    for name in ("member-00", "member-02", "member-03", "member-04"):
        coordinator.receive(name, members[name].answer(asked[name]))
    with pytest.raises(
        SumError, match="expected 5 members or more, got 4; missing are member-01, member-05"
    ):
        coordinator.open_total()
    coordinator.receive("member-01", members["member-01"].answer(asked["member-01"]))
    assert (coordinator.open_total() == add_words(vectors, list_names(6))).all()


@st.composite
def draw_vectors(draw):
    count, length = draw(st.integers(3, 5)), draw(st.integers(1, 6))
    value = st.floats(-5.0, 5.0)
    return [[draw(value) for _ in range(length)] for _ in range(count)]


@settings(max_examples=20)
@given(draw_vectors(), st.sampled_from([32, 64]))
def test_a_masked_sum_of_tensors_is_the_clipped_sum_in_fixed_point(vectors, bits):
    layout = VectorLayout((Part("a", (len(vectors[0]),), 2.0),))
    answers = {
        f"m-{n}": (lambda question, own=own: {"a": torch.tensor(own, dtype=torch.float64)})
        for n, own in enumerate(vectors)
    }
    total = LocalMaskedSum(answers, bits=bits)(layout, {"state": torch.zeros(2)})
    encoding = FixedPoint(layout, len(vectors), bits)
    clipped = np.clip(np.array(vectors), -2.0, 2.0)
    plain = np.sum([encoding.encode(own) for own in clipped], axis=0, dtype=total.encoded.dtype)
    assert total.encoded.tobytes() == plain.tobytes()
    found = total.parts["a"].numpy()
    assert found.tobytes() == encoding.decode(plain, len(vectors)).tobytes()
    limit = encoding.max_error(layout.parts[0], len(vectors))
    assert np.abs(found - clipped.sum(axis=0)).max() <= limit + 1e-14
    beyond = sum((np.abs(own) > 2).any() for own in np.array(vectors))
    assert len(total.notes) == beyond


def test_members_answer_a_question_and_the_total_is_of_all():
    layout = VectorLayout((Part("w", (3,), 10.0), Part("count", (), 100.0)))
    answers = {
        f"m-{n}": lambda question, n=n: {
            "w": question["w"] * n,
            "count": torch.tensor(float(n)),
        }
        for n in range(1, 5)
    }
    question = {"w": torch.tensor([0.5, -1.0, 0.25], dtype=torch.float64)}
    total = LocalMaskedSum(answers)(layout, question)
    assert total.members == tuple(answers)
    assert total.parts["w"].tolist() == [5.0, -10.0, 2.5] and total.parts["count"] == 10.0


class Restarting:
    """A run in which every process ends after every step, before or after keeping its state."""

    def __init__(self, kept_first):
        self.kept_first = kept_first
        self.sent = []
        self.coordinator, self.members, self.vectors = begin(5)

    def member(self, name, call):
        member = self.members[name]
        kept = member.state.to_bytes()
        answer = call(member)
        if self.kept_first:
            kept = member.state.to_bytes()
        else:  # killed before anything was kept: asked again
            again = self.restore(name, kept)
            assert call(again) == answer
            kept = again.state.to_bytes()
        self.members[name] = self.restore(name, kept)
        assert self.members[name].state == MemberState.from_bytes(kept)
        self.sent.append(answer)
        return answer

    def restore(self, name, kept):
        return Member(
            name,
            MemberState.from_bytes(kept),
            self.vectors[name].copy(),
            secret=find_secret(name),
            key=find_key(name),
        )

    def restart(self):
        kept = self.coordinator.to_bytes()
        self.coordinator = Coordinator.from_bytes(kept)
        assert self.coordinator.to_bytes() == kept

    def run(self):
        answers = {name: self.member(name, Member.send_keys) for name in list(self.members)}
        while True:
            for name, answer in answers.items():
                if (self.coordinator.state.phase, name) != ("masked", "member-03"):
                    self.coordinator.receive(name, answer)
                    self.restart()
                    self.coordinator.receive(name, answer)  # sent again: nothing changes
            if self.coordinator.state.phase == "revealed":
                return self.coordinator.open_total()
            asked = self.coordinator.advance()
            self.restart()
            assert self.coordinator.outgoing() == asked
            self.sent += asked.values()
            answers = {
                name: self.member(name, lambda member, data=data: member.answer(data))
                for name, data in asked.items()
            }


@pytest.mark.parametrize("kept_first", [True, False])
def test_a_sum_killed_between_any_two_steps_sends_the_same_bytes(kept_first):
    undisturbed, members, vectors = begin(5)
    sent = []
    answers = {name: member.send_keys() for name, member in members.items()}
    sent += answers.values()
    while undisturbed.state.phase != "revealed":
        for name, answer in answers.items():
            if (undisturbed.state.phase, name) != ("masked", "member-03"):
                undisturbed.receive(name, answer)
        asked = undisturbed.advance()
        answers = {name: members[name].answer(data) for name, data in asked.items()}
        sent += [*asked.values(), *answers.values()]
    for name, answer in answers.items():
        undisturbed.receive(name, answer)
    killed = Restarting(kept_first)
    total = killed.run()
    assert killed.sent == sent
    assert total.tobytes() == undisturbed.open_total().tobytes()
    others = [name for name in vectors if name != "member-03"]
    assert (total == add_words(vectors, others)).all()


def test_every_earlier_message_gets_its_first_answer_again():
    coordinator, members, _ = begin(4)
    member, log = members["member-01"], []
    answers = {name: each.send_keys() for name, each in members.items()}
    while coordinator.state.phase != "revealed":
        for name, answer in answers.items():
            coordinator.receive(name, answer)
        asked = coordinator.advance()
        answers = {name: members[name].answer(data) for name, data in asked.items()}
        log.append((asked["member-01"], answers["member-01"]))
    state = member.state
    for data, answer in log:
        assert member.answer(data) == answer
    assert member.state == state


def test_two_vectors_share_no_key_and_no_mask_even_without_a_state():
    one, two = [begin(4, seed=seed) for seed in (1, 2)]
    sent = []
    for coordinator, members, vectors in (one, two):
        answers = go_to(coordinator, members, "masked")
        words = np.frombuffer(answers["member-00"].partition(b"\n")[2], dtype="<u8")
        sent.append((members["member-00"].send_keys(), words - vectors["member-00"]))
    assert sent[0][0] != sent[1][0]
    assert (sent[0][1] != sent[1][1]).all()


def test_another_attempt_or_other_participants_are_other_masks():
    masks = []
    for without, changed in (([], {}), (["member-04"], {}), ([], {"attempt": 1})):
        coordinator, members, vectors = begin(5, **changed)
        for name, member in members.items():
            coordinator.receive(name, member.send_keys())
        for name, data in coordinator.advance().items():
            if name not in without:
                coordinator.receive(name, members[name].answer(data))
        data = coordinator.advance()["member-00"]
        words = members["member-00"].answer(data).partition(b"\n")[2]
        masks.append(np.frombuffer(words, dtype="<u8") - vectors["member-00"])
    for one, two in ((0, 1), (0, 2), (1, 2)):
        assert (masks[one] != masks[two]).all()


def test_terms_are_refused_where_they_cannot_hold():
    names = list_names(3)
    layout = VectorLayout((Part("sums", (4,), 1.0),))
    with pytest.raises(SumError, match="expected 3 to 3 members, got 2"):
        build_terms(names[:2])
    with pytest.raises(SumError, match="expected 3 to 2 members, got 3"):
        Terms.build(
            dict.fromkeys(names, ""), FixedPoint(layout, 2), identity="a", fusion="f", question="q"
        )
    good = build_terms(list_names(9)).model_dump()
    changes = [
        {"threshold": 6},
        {"threshold": 10},
        {"members": good["members"][::-1]},
        {"members": [good["members"][0]] * 9},
        {"members": good["members"][:2]},
        {"members": [{**member, "public_key": "x"} for member in good["members"]]},
        {"members": [{**good["members"][0], "name": name} for name in list_names(9)]},
        {"length": 0},
        {"length": 2**40},
        {"bits": 33},
        {"identity": "A" * 64},
        {"extra": 1},
    ]
    for change in changes:
        with pytest.raises(ValidationError):
            Terms.model_validate({**good, **change})
    assert [compute_threshold(n) for n in (3, 4, 5, 6, 9, 20)] == [3, 3, 4, 5, 7, 14]


def test_kept_states_that_are_something_else_are_one_line():
    coordinator, members, _ = begin(3)
    kept = coordinator.to_bytes(), members["member-00"].state.to_bytes()
    for data in (b"", b"{}", kept[1][:-1], b"[]", kept[0], b'{"terms": NaN}'):
        with pytest.raises(SumError, match="the state that was kept") as caught:
            MemberState.from_bytes(data)
        assert "\n" not in str(caught.value)
    for data in (b"", b"{}\n", kept[0][:-8], kept[0] + b"x", kept[1]):
        with pytest.raises(SumError, match="the state that was kept") as caught:
            Coordinator.from_bytes(data)
        assert "\n" not in str(caught.value)
