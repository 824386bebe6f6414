"""Shares, keys and masks of masked sums."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from molora_fed.errors import SumError
from molora_fed.privacy.sums import primitives
from molora_fed.privacy.sums.fixed_point import word_type
from molora_fed.privacy.sums.primitives import (
    add_stream,
    agree_secret,
    combine_shares,
    compute_public,
    derive_key,
    open_sealed,
    seal,
    split_secret,
)

CONTEXT = "c" * 64


@given(st.binary(min_size=32, max_size=32), st.integers(2, 9), st.integers(0, 5), st.randoms())
def test_any_threshold_of_shares_give_the_secret(secret, threshold, more, chance):
    places = chance.sample(range(1, 1025), threshold + more)
    shares = split_secret(secret, places, threshold, key=b"k" * 32, context=CONTEXT)
    chosen = chance.sample(places, threshold)
    assert combine_shares({place: shares[place] for place in chosen}) == secret


def test_fewer_shares_give_something_else():
    shares = split_secret(b"s" * 32, range(1, 6), 4, key=b"k" * 32, context=CONTEXT)
    with pytest.raises(SumError, match="expected those of a secret of 32 bytes"):
        combine_shares({place: shares[place] for place in (1, 2, 3)})


def test_fewer_shares_are_distributed_alike_for_every_secret(monkeypatch):
    """All polynomials over a field of eleven: exact, not sampled."""
    monkeypatch.setattr(primitives, "PRIME", 11)
    monkeypatch.setattr(primitives, "SHARE_BYTES", 1)
    drawn = {}
    monkeypatch.setattr(
        primitives,
        "derive_key",
        lambda key, context, label, power, length: bytes([drawn[int(power)]]),
    )
    seen = {}
    for secret in range(11):
        found = Counter()
        for drawn[1], drawn[2] in itertools.product(range(11), repeat=2):
            shares = split_secret(bytes([secret]), (1, 2, 5), 3, key=b"", context=CONTEXT)
            found[shares[1], shares[5]] += 1  # two of three
        seen[secret] = found
    assert all(found == seen[0] for found in seen.values())
    assert set(seen[0].values()) == {1} and len(seen[0]) == 121


def test_the_prime_is_prime():
    # Lucas and Lehmer's test of the Mersenne number 2^521 - 1.
    value = 4
    for _ in range(519):
        value = (value * value - 2) % primitives.PRIME
    assert value == 0


def test_keys_are_bound_to_secret_context_and_every_label():
    keys = [
        derive_key(b"a" * 32, CONTEXT, "x", "y"),
        derive_key(b"b" * 32, CONTEXT, "x", "y"),
        derive_key(b"a" * 32, "d" * 64, "x", "y"),
        derive_key(b"a" * 32, CONTEXT, "x", "z"),
        derive_key(b"a" * 32, CONTEXT, "xy"),
        derive_key(b"a" * 32, CONTEXT, "xy", ""),
    ]
    assert len(set(keys)) == len(keys)


def test_both_sides_agree_and_low_order_keys_do_not():
    one, two = b"1" * 32, b"2" * 32
    assert agree_secret(one, compute_public(two)) == agree_secret(two, compute_public(one))
    for public in (bytes(32), b"\x01" + bytes(31)):
        with pytest.raises(ValueError, match="shared key"):
            agree_secret(one, public)


def test_what_was_sealed_opens_whole_or_not_at_all():
    sealed = seal(b"k" * 32, b"two shares")
    assert open_sealed(b"k" * 32, sealed) == b"two shares"
    for wrong in (sealed[:-1], bytes([sealed[0] ^ 1]) + sealed[1:], b""):
        with pytest.raises(ValueError, match="does not open"):
            open_sealed(b"k" * 32, wrong)
    with pytest.raises(ValueError, match="does not open"):
        open_sealed(b"l" * 32, sealed)


@pytest.mark.parametrize("bits", [8, 16, 32, 64])
def test_a_mask_is_one_stream_whatever_the_length_and_goes_away_again(bits):
    length = 2**18 // (bits // 8) * 2 + 17  # two pieces and a bit
    words = np.arange(length).astype(word_type(bits))
    masked = words.copy()
    add_stream(masked, b"k" * 32, sign=1)
    short = words[:100].copy()
    add_stream(short, b"k" * 32, sign=1)
    assert (short == masked[:100]).all() and (masked != words).mean() > 0.98
    mask = masked - words
    assert len(np.unique(mask[:200].reshape(2, 100), axis=0)) == 2
    add_stream(masked, b"k" * 32, sign=-1)
    assert (masked == words).all()


def test_a_stream_is_aes_in_counter_mode():
    # The first block is AES-256 of a block of zeros under a key of zeros.
    words = np.zeros(2, dtype="<u8")
    add_stream(words, bytes(32), sign=1)
    assert words.tobytes().hex() == "dc95c078a2408989ad48a21492842087"
