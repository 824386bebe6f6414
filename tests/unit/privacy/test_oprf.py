"""The oblivious function: what goes over the curve is right, and says nothing without the key."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molora_fed.privacy.oprf import ELEMENT_BYTES, Key, compute_tags, derive_bytes

# P-256 written out (FIPS 186-5, SP 800-186), apart from the library that is used.
P = 2**256 - 2**224 + 2**192 + 2**96 - 1
N = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
B = 0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B
G = (
    0x6B17D1F2E12C4247F8BCE6E563A440F277037D812DEB33A0F4A13945D898C296,
    0x4FE342E2FE1A7F9B8EE7EB4A7C0F9E162BCE33576B315ECECBB6406837BF51F5,
)
SECRET, OTHER = b"s" * 32, b"t" * 32


def add(left, right):
    if left is None or right is None:
        return left or right
    (x1, y1), (x2, y2) = left, right
    if x1 == x2 and (y1 + y2) % P == 0:
        return None
    slope = (
        (3 * x1 * x1 - 3) * pow(2 * y1, -1, P) if left == right else (y2 - y1) * pow(x2 - x1, -1, P)
    )
    x3 = (slope * slope - x1 - x2) % P
    return x3, (slope * (x1 - x3) - y1) % P


def multiply(scalar, point):
    total = None
    while scalar:
        if scalar & 1:
            total = add(total, point)
        point, scalar = add(point, point), scalar >> 1
    return total


def square(x):
    return (x**3 - 3 * x + B) % P


def encode(x):
    return x.to_bytes(ELEMENT_BYTES, "big")


def decode(element):
    x = int.from_bytes(element, "big")
    y = pow(square(x), (P + 1) // 4, P)
    assert y * y % P == square(x)
    return x, y


@settings(max_examples=20)
@given(scalar=st.integers(1, N - 1), seed=st.integers(1, N - 1))
def test_an_element_is_multiplied_as_the_curve_says_whatever_its_sign(scalar, seed):
    x, y = multiply(seed, G)
    expected = encode(multiply(scalar, (x, y))[0])
    assert encode(multiply(scalar, (x, P - y))[0]) == expected
    assert Key(scalar).multiply([encode(x)]) == [expected]


def test_the_smallest_and_the_largest_key_leave_an_element_as_it_is():
    element = encode(G[0])
    assert Key(1).multiply([element]) == Key(N - 1).multiply([element]) == [element]


@settings(max_examples=20)
@given(items=st.lists(st.binary(min_size=8, max_size=8), max_size=5), seed=st.integers(0, 9))
def test_blinded_answered_and_opened_is_what_the_sender_computes_alone(items, seed):
    blind, key = Key.derive(SECRET, bytes([seed])), Key.derive(OTHER, bytes([seed]))
    answered = key.multiply(blind.multiply_hashed(items))
    assert blind.invert().multiply(answered) == key.multiply_hashed(items)


def test_items_are_hashed_to_points_that_differ():
    items = [number.to_bytes(8, "little") for number in range(200)]
    elements = Key(1).multiply_hashed(items)
    assert all(decode(element) for element in elements)
    assert len(set(elements)) == 200


def test_tags_are_the_stated_hash():
    [element] = Key.derive(SECRET).multiply_hashed([b"8 bytes "])
    digest = hashlib.sha256(b"molora-fed 8-gram overlap 1: tag" + element + b"8 bytes ").digest()
    [tag] = compute_tags([b"8 bytes "], [element])
    assert tag == int.from_bytes(digest[:8], "little")
    assert compute_tags([], []).dtype == np.uint64
    assert compute_tags([b"8 byteS "], [element])[0] != tag


@pytest.mark.parametrize(
    "bad", [encode(P), encode(P + 1), b"\xff" * 32, b"", encode(G[0])[:31], encode(G[0]) + b"\0"]
)
def test_what_is_no_point_is_refused_by_number(bad):
    with pytest.raises(ValueError, match=r"^element 1 is no point of P-256$"):
        Key(5).multiply([encode(G[0]), bad])


def test_an_x_off_the_curve_is_refused():
    off = next(x for x in range(2, 100) if pow(square(x), (P - 1) // 2, P) != 1)
    with pytest.raises(ValueError, match="element 0"):
        Key(5).multiply([encode(off)])


def test_what_is_derived_depends_on_secret_and_on_every_part():
    made = {
        derive_bytes(16, secret, *context)
        for secret in (SECRET, OTHER)
        for context in ((), (b"",), (b"a", b"bc"), (b"ab", b"c"), (b"abc",), (b"abc", b""))
    }
    assert len(made) == 12
    assert derive_bytes(16, SECRET, b"a") == derive_bytes(16, SECRET, b"a")
    with pytest.raises(ValueError, match="31 bytes"):
        derive_bytes(16, b"s" * 31, b"a")
