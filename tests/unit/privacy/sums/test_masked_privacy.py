"""What a coordinator and members short of the threshold see of an honest member's vector."""

import json
from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import chisquare
from sums_helpers import add_words, begin, find_key, find_secret, go_to, list_names

from molora_fed.errors import SumError
from molora_fed.privacy.sums import masks
from molora_fed.privacy.sums import member as module
from molora_fed.privacy.sums.coordinator import Coordinator
from molora_fed.privacy.sums.masks import add_own_mask, add_pairwise_mask, hash_names
from molora_fed.privacy.sums.messages import Deliver, Keys
from molora_fed.privacy.sums.primitives import agree_secret, combine_shares

COUNT, LENGTH = 5, 60_000  # the threshold is four
TARGET = "member-00"


def read_words(answer, dtype):
    return np.frombuffer(answer.partition(b"\n")[2], dtype=dtype)


def take_off(words, members, names, terms, *, secrets):
    """A masked vector of the target less what colluders can compute of its pairwise masks."""
    rest = words.copy()
    target = Keys.model_validate_json(members[TARGET].send_keys())
    for name in names:
        secret = agree_secret(secrets[name], bytes.fromhex(target.mask_key))
        digest = hash_names(sorted(members))
        add_pairwise_mask(rest, secret, terms.context, digest, owner=TARGET, other=name, sign=-1)
    return rest


@pytest.mark.parametrize("vector", ["zeros", "at the bound", "ramp"])
@pytest.mark.parametrize("colluders", [0, 1, 2, 3])
def test_a_masked_vector_less_what_colluders_know_is_uniform(vector, colluders):
    own = {"zeros": 0, "at the bound": 31, "ramp": np.arange(LENGTH) % 32}[vector]
    words = np.zeros((COUNT, LENGTH), dtype="<u1")
    words[0] = own
    coordinator, members, _ = begin(COUNT, length=LENGTH, bits=8, words=words)
    masked = read_words(go_to(coordinator, members, "masked")[TARGET], words.dtype)
    names = list_names(COUNT)[1 : 1 + colluders]
    secrets = {name: members[name]._mask_key for name in names}
    rest = take_off(masked, members, names, coordinator.state.terms, secrets=secrets)
    assert chisquare(np.bincount(rest, minlength=256)).pvalue > 1e-4
    # Neighbouring entries, and the vector against what lies over it, are independent, too.
    pairs = rest[::2].astype(int) // 16 * 16 + rest[1::2] // 16
    assert chisquare(np.bincount(pairs, minlength=256)).pvalue > 1e-4
    halves = np.bincount(words[0].astype(int) % 2 * 16 + rest // 16, minlength=32)
    for half in (halves[:16], halves[16:]):
        assert half.sum() == 0 or chisquare(half).pvalue > 1e-4


def test_the_same_test_finds_a_vector_whose_masks_are_known():
    """Positive control: with all secrets of the others and its own seed the vector lies open."""
    words = np.zeros((COUNT, LENGTH), dtype="<u1")
    words[0] = np.arange(LENGTH) % 32
    coordinator, members, _ = begin(COUNT, length=LENGTH, bits=8, words=words)
    masked = read_words(go_to(coordinator, members, "masked")[TARGET], words.dtype)
    names = list_names(COUNT)[1:]
    secrets = {name: members[name]._mask_key for name in names}
    terms = coordinator.state.terms
    rest = take_off(masked, members, names, terms, secrets=secrets)
    assert chisquare(np.bincount(rest, minlength=256)).pvalue > 1e-4  # its own mask is left
    digest = hash_names(sorted(members))
    add_own_mask(rest, members[TARGET]._seed, terms.context, digest, owner=TARGET, sign=-1)
    assert (rest == words[0]).all()
    assert chisquare(np.bincount(rest, minlength=256)).pvalue < 1e-100


def test_what_threshold_less_one_members_hold_gives_neither_secret():
    """That fewer shares say nothing at all is shown exactly in test_primitives."""
    coordinator, members, _ = begin(COUNT)
    go_to(coordinator, members, "masked")
    held = {}
    for name in list_names(COUNT)[1:]:
        delivered = Deliver.model_validate_json(members[name].state.accepted[1])
        shares = members[name]._open_shares(delivered)
        held[coordinator.state.terms.places[name]] = shares[TARGET]
    for number, secret in ((0, members[TARGET]._mask_key), (1, members[TARGET]._seed)):
        own = {place: shares[number] for place, shares in held.items()}
        assert combine_shares(own) == secret
        for left_out in own:
            with pytest.raises(SumError, match="got others"):
                combine_shares({p: share for p, share in own.items() if p != left_out})


def run_recorded(words):
    """All bytes that the coordinator sees, and its total."""
    coordinator, members, _ = begin(COUNT, words=words)
    seen = []
    answers = {name: member.send_keys() for name, member in members.items()}
    while True:
        for name, answer in answers.items():
            if coordinator.state.phase == "masked" and name == "member-04":
                continue
            seen.append(answer)
            coordinator.receive(name, answer)
        if coordinator.state.phase == "revealed":
            return seen, coordinator.open_total()
        asked = coordinator.advance()
        answers = {name: members[name].answer(data) for name, data in asked.items()}


def test_totals_alike_give_transcripts_alike(monkeypatch):
    """What one member has more and another has less is a shift of the mask that both share.

    To whoever does not know that mask every value of it is as likely, so that both transcripts are
    as likely: here the shifted mask gives the very same bytes. One member drops out meanwhile.
    """
    # Secrets are derived from the vector, too; that they are random to others is not at stake.
    derive = module.derive_key

    def derive_alike(secret, context, *labels, length=32):
        labels = labels[:2] if labels[0] == "root" else labels
        return derive(secret, context, *labels, length=length)

    monkeypatch.setattr(module, "derive_key", derive_alike)
    generator = np.random.default_rng(0)
    words = generator.integers(0, 2**64, (COUNT, 4), dtype=np.uint64).astype("<u8")
    shift = generator.integers(0, 2**64, 4, dtype=np.uint64).astype("<u8")
    seen, total = run_recorded(words)

    changed = words.copy()
    changed[1] += shift
    changed[2] -= shift
    different, same_total = run_recorded(changed)
    assert same_total.tobytes() == total.tobytes()
    assert [a == b for a, b in zip(seen, different, strict=True)].count(False) == 2

    honest = module.add_pairwise_mask

    def add_shifted(target, secret, context, digest, *, owner, other, sign=1):
        honest(target, secret, context, digest, owner=owner, other=other, sign=sign)
        if {owner, other} == {"member-01", "member-02"}:
            (np.subtract if owner == "member-01" else np.add)(target, shift, out=target)

    monkeypatch.setattr(module, "add_pairwise_mask", add_shifted)
    same, same_total = run_recorded(changed)
    assert same == seen and same_total.tobytes() == total.tobytes()


def test_what_is_kept_and_sent_holds_no_secret_and_no_vector():
    coordinator, members, vectors = begin(COUNT, length=64)
    seen, _ = run_recorded(np.stack([vectors[n] for n in list_names(COUNT)])[:, :4].copy())
    for answer in go_to(coordinator, members, "revealed").values():
        seen.append(answer)
    for name, member in members.items():
        secrets = [member._mask_key, member._share_key, member._seed, find_secret(name)]
        secrets += [vectors[name].tobytes()[:32]]
        for place in [*seen, member.state.to_bytes(), coordinator.to_bytes()]:
            for secret in secrets:
                assert secret not in place and secret.hex().encode() not in place


def test_one_members_two_secrets_are_never_both_in_what_was_revealed():
    coordinator, members, _ = begin(COUNT)
    answers = go_to(coordinator, members, "revealed", without=["member-03"])
    for answer in answers.values():
        told = json.loads(answer)
        assert set(told["mask_shares"]) == {"member-03"}
        assert set(told["self_shares"]) == set(list_names(COUNT)) - {"member-03"}
    assert all(one != two for one, two in pairwise(sorted(answers.values())))


def test_who_drops_out_after_all_keeps_its_own_mask():
    """A vector that arrives after its member was called dropped stays under its own mask."""
    words = np.zeros((COUNT, LENGTH), dtype="<u1")
    coordinator, members, vectors = begin(COUNT, length=LENGTH, bits=8, words=words)
    late = {}
    answers = {name: member.send_keys() for name, member in members.items()}
    while coordinator.state.phase != "revealed":
        for name, answer in answers.items():
            if (name, coordinator.state.phase) == (TARGET, "masked"):
                late[name] = answer
            else:
                coordinator.receive(name, answer)
        asked = coordinator.advance()
        answers = {name: members[name].answer(data) for name, data in asked.items()}
    for name, answer in answers.items():
        coordinator.receive(name, answer)
    survivors = list_names(COUNT)[1:]
    assert (coordinator.open_total() == add_words(vectors, survivors)).all()
    private = coordinator._combine(TARGET, "mask")
    assert private == members[TARGET]._mask_key
    rest = read_words(late[TARGET], words.dtype).copy()
    for name in survivors:
        keys = Keys.model_validate_json(members[name].send_keys())
        secret = agree_secret(private, bytes.fromhex(keys.mask_key))
        terms, digest = coordinator.state.terms, hash_names(sorted(members))
        masks.add_pairwise_mask(
            rest, secret, terms.context, digest, owner=TARGET, other=name, sign=-1
        )
    assert chisquare(np.bincount(rest, minlength=256)).pvalue > 1e-4
    again = Coordinator.from_bytes(coordinator.to_bytes())
    assert (again.open_total() == coordinator.open_total()).all()
    assert find_key(TARGET) is members[TARGET].key
