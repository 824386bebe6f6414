"""What members refuse a coordinator, and a coordinator its members: one line, named, whole sums."""

import re
from collections import Counter

import numpy as np
import pytest
from sums_helpers import (
    add_words,
    begin,
    build_terms,
    find_key,
    find_secret,
    go_to,
    list_names,
)

from molora_fed.errors import SumError, SumRefusedError
from molora_fed.privacy.sums import member as module
from molora_fed.privacy.sums import messages
from molora_fed.privacy.sums.division import check_division, divide
from molora_fed.privacy.sums.local import run_masked_sum
from molora_fed.privacy.sums.member import Member
from molora_fed.privacy.sums.messages import Agreement, Deliver, KeysList, Opening, Survivors


def refuse(match, call, *values, kind=SumRefusedError):
    with pytest.raises(kind, match=match) as caught:
        call(*values)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def ask(phase, *, count=6, without=(), **changed):
    """A coordinator, members that wait for what it sends next, and that, before it is sent."""
    coordinator, members, vectors = begin(count, **changed)
    answers = go_to(coordinator, members, phase, without=without)
    for name, answer in answers.items():
        if phase != "masked" or name not in without:
            coordinator.receive(name, answer)
    return coordinator, members, vectors, coordinator.advance()


# What a coordinator asks.


def test_a_member_takes_part_only_under_its_own_name_and_key():
    terms = build_terms(list_names(3))
    vector = np.zeros(4, dtype="<u8")
    for name, key in (("stranger", "member-00"), ("member-00", "stranger")):
        with pytest.raises(SumRefusedError, match="this name with this contributor's key"):
            Member.begin(name, terms, vector, secret=b"s" * 32, key=find_key(key))
    for wrong in (vector[:3], vector.astype("<u4")):
        with pytest.raises(SumError, match="expected 4 words of 64 bits"):
            Member.begin(
                "member-00", terms, wrong, secret=find_secret("x"), key=find_key("member-00")
            )
    begun = Member.begin("member-00", terms, vector, secret=b"s" * 32, key=find_key("member-00"))
    with pytest.raises(SumError, match="the vector that was begun with"):
        Member("member-00", begun.state, vector + 1, secret=b"s" * 32, key=find_key("member-00"))


def test_lists_of_keys_that_are_not_as_the_members_signed_them():
    _, members, _, asked = ask("keys", count=4)
    member, other = members["member-00"], members["member-01"]
    keys = KeysList.model_validate_json(asked["member-00"]).keys

    def send(changed):
        return member.answer(KeysList(keys=changed).to_bytes())

    forged = keys[1].model_copy(update={"mask_key": "1" * 64})
    stranger = keys[1].model_copy(update={"member": "stranger"})
    zero = keys[1].model_copy(update={"mask_key": "0" * 64})
    twice = keys[1].model_copy(update={"mask_key": keys[2].mask_key})
    zero = zero.signed(member.state.terms.context, other.key)
    twice = twice.signed(member.state.terms.context, other.key)
    refuse("'member-01'.*'keys'.*signature", send, [keys[0], forged, *keys[2:]], kind=SumError)
    refuse("'stranger'.*got another", send, [*keys, stranger], kind=SumError)
    refuse("one of 'member-01' that does not", send, [keys[0], zero, *keys[2:]])
    refuse("no key twice", send, [keys[0], twice, *keys[2:]])
    refuse("own keys", send, keys[1:])
    refuse("at least 3 members, sorted by name, got 2", send, keys[:2])
    refuse("sorted by name", send, keys[::-1])
    refuse("sorted by name", send, [keys[0], *keys])
    assert member.state.accepted == []
    _, _, _, other_asked = ask("keys", count=4, attempt=1)
    refuse("signature over this sum", member.answer, other_asked["member-00"], kind=SumError)
    assert member.answer(asked["member-00"]) == member.answer(asked["member-00"])
    refuse("answered before, got another", send, keys[:3])


def test_phases_come_in_their_order():
    _, _, _, asked = ask("masked")
    fresh = begin(6)[1]["member-00"]
    refuse("expected phase 'keys-list'", fresh.answer, asked["member-00"], kind=SumError)
    refuse("expected JSON", fresh.answer, b"\xff\x00", kind=SumError)
    refuse("expected phase 'keys-list'", fresh.answer, b'["x"]', kind=SumError)


def test_sealed_shares_of_strangers_of_few_or_twice():
    _, members, _, asked = ask("shares", count=5)
    member = members["member-00"]
    sealed = Deliver.model_validate_json(asked["member-00"]).sealed
    stranger = sealed[0].model_copy(update={"member": "stranger"})
    own = sealed[0].model_copy(update={"member": "member-00"})
    for match, changed, kind in (
        ("got 6 .stranger", [*sealed, stranger], SumRefusedError),
        ("at least 4 participants", sealed[:2], SumRefusedError),
        ("once and sorted", [*sealed, sealed[0]], SumError),
        ("once and sorted", [own, *sealed], SumError),
    ):
        refuse(match, member.answer, Deliver(sealed=changed).to_bytes(), kind=kind)


def test_no_total_of_fewer_than_the_threshold_is_agreed_to_or_opened():
    _, members, _, _ = ask("masked", count=3)
    for survivors in (list_names(2), list_names(1), []):
        dropped = sorted(set(list_names(3)) - set(survivors))
        data = Survivors(survivors=survivors, dropped=dropped).to_bytes()
        refuse("total of at least 3 members|this member among", members["member-00"].answer, data)


def test_both_secrets_of_a_member_are_never_given():
    _, members, _, asked = ask("agreement")
    opening = Opening.model_validate_json(asked["member-00"])
    both = opening.model_copy(update={"dropped": ["member-03"]}).to_bytes()
    refuse("both secrets of member-03", members["member-00"].answer, both)
    survivors = Survivors(survivors=list_names(6), dropped=["member-02"]).to_bytes()
    member = ask("masked")[1]["member-00"]
    refuse("both secrets of member-02", member.answer, survivors)
    # Nor one after the other: what was agreed to stands.
    other = sorted(set(list_names(6)) - {"member-03"})
    again = opening.model_copy(update={"survivors": other, "dropped": ["member-03"]})
    refuse("that were agreed to, got others", members["member-00"].answer, again.to_bytes())
    members["member-00"].answer(asked["member-00"])
    refuse("answered before, got another", members["member-00"].answer, again.to_bytes())
    told = Survivors(survivors=other, dropped=["member-03"]).to_bytes()
    refuse("answered before, got another", members["member-00"].answer, told)


def test_survivors_are_all_participants_divided_and_the_member_is_one():
    _, members, _, _ = ask("masked")
    names = list_names(6)
    for survivors, dropped in (
        (names[:5], []),
        (names, ["stranger"]),
        (names[1:], names[:1]),
    ):
        data = Survivors(survivors=survivors, dropped=dropped).to_bytes()
        refuse("to be the 6 participants", members["member-00"].answer, data)


def test_shares_are_given_only_after_enough_survivors_agreed_to_the_same():
    _, members, _, asked = ask("agreement")
    member = members["member-00"]
    opening = Opening.model_validate_json(asked["member-00"])

    def send(agreements):
        return member.answer(opening.model_copy(update={"agreements": agreements}).to_bytes())

    good = opening.agreements
    context = member.state.terms.context
    told = Agreement(member="member-01", survivors="0" * 64)
    other = told.signed(context, members["member-01"].key)
    forged = good[1].model_copy(update={"member": "member-01", "signature": good[0].signature})
    stranger = good[1].model_copy(update={"member": "stranger"})
    refuse("5 survivors or more.*got 4", send, good[:4])
    refuse("got 6 .member-01", send, [good[0], other, *good[2:]])
    refuse("each once", send, [good[0]] * 6)
    refuse("got 7 .stranger", send, [*good, stranger])
    refuse("'member-01'.*signature", send, [good[0], forged, *good[2:]], kind=SumError)
    assert len(member.state.accepted) == 3
    send(good)


def test_the_same_vectors_are_summed_again_over_halves_only():
    """The same question again without one member: the difference would be its vector."""
    coordinator, members, vectors = begin(13)
    names = list_names(13)
    left = ("member-12",)
    survivors, _ = run_masked_sum(
        coordinator,
        list(members.values()),
        deliver=lambda name, phase, data: None if name in left and phase == "masked" else data,
    )
    whole = members["member-00"].state.find_whole()
    assert whole == names[:12] == list(survivors)
    assert members["member-12"].state.find_whole() == []

    def again(group):
        terms = build_terms(group, attempt=1)
        begun = [
            Member.begin(n, terms, vectors[n], secret=b"t" * 32, key=find_key(n), whole=whole)
            for n in group
        ]
        run_masked_sum(type(coordinator).begin(terms), begun)
        assert begun[0].state.find_whole() == whole

    for group in (names[:6], names[9:12]):
        again(group)
    for group in (names[:11], names[:5], names[2:5]):
        refuse("half of a half", again, group)


def test_whatever_is_opened_of_a_division_keeps_three_members_together():
    for count in range(3, 60):
        names = list_names(count)
        pending, groups = [tuple(names)], []
        while pending:
            group = pending.pop()
            groups.append(group)
            pending += divide(group) or ()
        told = Counter(tuple(name in group for group in groups) for name in names)
        assert min(told.values()) >= 3
        for group in groups:
            check_division(names, group)
        for other in (names[:-1], names[1:], names[:2], []):
            if tuple(other) not in groups:
                with pytest.raises(SumRefusedError, match="single members"):
                    check_division(names, other)


# What members send.


def play(count, change, *, phase, name="member-02"):
    """A run in which one member's message is changed; returns errors, vectors and total."""
    coordinator, members, vectors = begin(count, length=16)
    errors = []

    def deliver(sender, now, data):
        if (sender, now) != (name, phase):
            return data
        try:
            coordinator.receive(sender, change(data, members))
        except SumError as error:
            errors.append(str(error))
        return None

    survivors, total = run_masked_sum(coordinator, list(members.values()), deliver=deliver)
    assert (total == add_words(vectors, survivors)).all()
    return errors, survivors


def resign(data, members, **changed):
    """The same message with other values, signed by its member."""
    line, newline, payload = data.partition(b"\n")
    kinds = (messages.Keys, messages.Shares, messages.Masked, Agreement, messages.Revealed)
    model = next(
        k for k in kinds if f'"phase":"{k.model_fields["phase"].default}"'.encode() in line
    )
    message = model.model_validate_json(line)
    member = members[message.member]
    values = {key: make(getattr(message, key)) for key, make in changed.items()}
    changed_message = message.model_copy(update=values)
    return changed_message.signed(member.state.terms.context, member.key).to_bytes() + (
        newline + payload
    )


def drop_first(value):
    return dict(list(value.items())[1:])


def alter_first(value):
    first = next(iter(value))
    return {**value, first: ("0" if value[first][0] != "0" else "1") + value[first][1:]}


FAULTS = [
    ("garbage", lambda data, _: b"\x00garbage", "known phase"),
    ("list", lambda data, _: b"[1]", "known phase"),
    ("another member", lambda data, _: data.replace(b"member-02", b"member-01"), "'member-02'"),
    (
        "unsigned",
        lambda data, _: data.replace(b'"signature":"', b'"signature":"00', 1),
        "signature",
    ),
    ("unknown key", lambda data, _: data.replace(b"{", b'{"more":1,', 1), "well-formed"),
    ("a stranger", lambda data, _: data.replace(b"member-02", b"member-99"), "'member-02'"),
]


@pytest.mark.parametrize("phase", ["keys", "shares", "masked", "agreement", "revealed"])
@pytest.mark.parametrize(("what", "change", "match"), FAULTS, ids=[each[0] for each in FAULTS])
def test_a_bad_message_is_refused_by_name_and_phase_and_the_sum_goes_on(phase, what, change, match):
    errors, survivors = play(6, change, phase=phase)
    (error,) = errors
    assert match in error and "'member-02'" in error and f"'{phase}'" in error
    assert "\n" not in error and len(error) < 600
    assert ("member-02" in survivors) == (phase in ("agreement", "revealed"))


def change(**changed):
    return lambda data, members: resign(data, members, **changed)


LIES = [
    ("keys", change(mask_key=lambda _: "0" * 64), "agree on a secret"),
    ("keys", change(mask_key=lambda _: "1" * 64, share_key=lambda _: "1" * 64), "new keys"),
    ("shares", change(keys=lambda _: "0" * 64), "others on the list of keys"),
    ("shares", change(sealed=drop_first), "others on the list of keys"),
    ("shares", change(sealed=lambda v: {**v, "member-02": v["member-01"]}), "list of keys"),
    ("shares", change(mask_commitments=drop_first), "commitment for each"),
    ("shares", change(self_commitments=drop_first), "commitment for each"),
    ("masked", change(participants=lambda _: "0" * 64), "between the 6 participants"),
    ("masked", change(unusable=lambda _: ["member-02"]), "between the 6 participants"),
    ("masked", lambda data, _: data[:-1], "bytes that were signed"),
    ("masked", lambda data, _: data + b"\n", "bytes that were signed"),
    ("masked", lambda data, _: data[:-1] + bytes([data[-1] ^ 1]), "bytes that were signed"),
    ("masked", lambda data, _: data.partition(b"\n")[0], "words after a masked vector only"),
    ("agreement", lambda data, _: data + b"\n", "words after a masked vector only"),
    ("agreement", change(survivors=lambda _: "0" * 64), "agreement to the 6 survivors"),
    ("revealed", change(self_shares=drop_first), "shares missing or too many .member-00"),
    ("revealed", change(self_shares=alter_first), "share of 'member-00'.*altered"),
    ("revealed", change(mask_shares=lambda _: {"member-01": "0" * 132}), "too many .member-01"),
]


@pytest.mark.parametrize(("phase", "lie", "match"), LIES)
def test_a_signed_lie_is_refused_by_name_and_phase_and_the_sum_goes_on(phase, lie, match):
    errors, survivors = play(6, lie, phase=phase)
    (error,) = errors
    assert re.search(match, error) and f"'member-02' sent in phase '{phase}'" in error
    assert len(survivors) == (6 if phase in ("agreement", "revealed") else 5)


def test_a_second_other_message_is_refused_and_the_first_counts():
    coordinator, members, vectors = begin(4)
    answers = go_to(coordinator, members, "masked")
    for name, answer in answers.items():
        coordinator.receive(name, answer)
    line, _, payload = answers["member-01"].partition(b"\n")
    zeros = bytes(len(payload))
    refuse(
        "'member-01'.*'masked'.*The first counts",
        coordinator.receive,
        "member-01",
        resign(answers["member-01"], members, unusable=lambda _: ["member-00"]),
        kind=SumError,
    )
    coordinator.receive("member-01", line + b"\n" + zeros)  # the same line: nothing is added
    answers = {n: members[n].answer(data) for n, data in coordinator.advance().items()}
    for name, answer in answers.items():
        coordinator.receive(name, answer)
    for name, data in coordinator.advance().items():
        coordinator.receive(name, members[name].answer(data))
    assert (coordinator.open_total() == add_words(vectors, vectors)).all()


def test_an_extra_member_and_messages_of_other_phases_are_refused():
    coordinator, members, _ = begin(4)
    refuse("'eve'", coordinator.receive, "eve", members["member-00"].send_keys(), kind=SumError)
    refuse("known phase", coordinator.receive, "e\x1b[31m\n", b"{}", kind=SumError)
    answers = go_to(coordinator, members, "masked")
    fresh = begin(4)[0]
    refuse("too early or too late", fresh.receive, "member-00", answers["member-00"], kind=SumError)


def test_shares_that_cannot_be_opened_are_named_and_do_not_end_the_sum():
    """A member seals nonsense for one other, who says so and gives no share of it later."""
    coordinator, members, vectors = begin(6)
    answers = go_to(coordinator, members, "shares")
    answers["member-02"] = resign(answers["member-02"], members, sealed=alter_first)
    for name, answer in answers.items():
        coordinator.receive(name, answer)
    answers = {n: members[n].answer(data) for n, data in coordinator.advance().items()}
    assert b'"unusable":["member-02"]' in answers["member-00"]
    assert b'"unusable":[]' in answers["member-01"]
    for phase in ("masked", "agreement"):
        for name, answer in answers.items():
            coordinator.receive(name, answer)
        assert coordinator.state.phase == phase
        answers = {n: members[n].answer(data) for n, data in coordinator.advance().items()}
    for name, answer in answers.items():
        coordinator.receive(name, answer)
    assert (coordinator.open_total() == add_words(vectors, vectors)).all()


@pytest.mark.parametrize("gone", [False, True])
def test_shares_that_do_not_give_the_secret_refuse_the_total_and_name_the_member(gone, monkeypatch):
    honest = module.split_secret

    def split(secret, places, threshold, *, key, context):
        return honest(bytes(32), places, threshold, key=key, context=context)

    coordinator, members, _ = begin(6)
    answers = {name: member.send_keys() for name, member in members.items()}
    while True:
        for name, answer in answers.items():
            if not (gone and (name, coordinator.state.phase) == ("member-02", "masked")):
                coordinator.receive(name, answer)
        if coordinator.state.phase == "revealed":
            break
        asked = coordinator.advance()
        answers = {}
        for name, data in asked.items():
            with monkeypatch.context() as patch:
                if name == "member-02":
                    patch.setattr(module, "split_secret", split)
                answers[name] = members[name].answer(data)
    refuse(
        "member 'member-02' shared its secrets.*without that member",
        coordinator.open_total,
        kind=SumError,
    )


def test_a_total_is_opened_in_the_last_phase_only():
    coordinator, members, _ = begin(3)
    refuse("expected phase 'revealed'", coordinator.open_total, kind=SumError)
    refuse("missing are member-00, member-01, member-02", coordinator.advance, kind=SumError)
    for name, answer in go_to(coordinator, members, "revealed").items():
        coordinator.receive(name, answer)
    refuse("a phase after 'revealed'", coordinator.advance, kind=SumError)


def test_a_share_that_is_not_the_one_committed_to_is_called_unusable():
    _, members, _, asked = ask("shares", count=3)
    sealed = Deliver.model_validate_json(asked["member-00"]).sealed
    changed = [sealed[0].model_copy(update={"self_commitment": "0" * 64}), sealed[1]]
    answer = members["member-00"].answer(Deliver(sealed=changed).to_bytes())
    assert b'"unusable":["member-01"]' in answer.partition(b"\n")[0]
