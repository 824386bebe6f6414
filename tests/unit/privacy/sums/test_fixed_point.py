"""Fixed point: exact sums, no overflow for the stated members, the stated rounding error."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from molora_fed.errors import SumError
from molora_fed.privacy.sums.fixed_point import FixedPoint
from molora_fed.privacy.sums.vectors import Part, VectorLayout

BOUNDS = st.floats(1e-200, 1e200)


def build(bound, members, bits=64, length=1):
    return FixedPoint(VectorLayout((Part("a", (length,), bound),)), members, bits)


@given(BOUNDS, st.integers(1, 60), st.sampled_from([16, 32, 64]), st.data())
def test_a_total_is_that_of_the_rounded_values_and_within_the_stated_error(
    bound, members, bits, data
):
    encoding = build(bound, members, bits)
    part = encoding.layout.parts[0]
    share = st.floats(-1.0, 1.0)
    values = [data.draw(share) * bound for _ in range(members)]
    encoded = [encoding.encode(np.array([value])) for value in values]
    total = np.sum(encoded, axis=0, dtype=encoded[0].dtype)
    step = Fraction(encoding.step(part))
    rounded = sum((round(Fraction(value) / step) for value in values), 0) * step
    found = Fraction(float(encoding.decode(total, members)[0]))
    assert found == Fraction(float(rounded))  # exact but for the one rounding to float64
    exact = sum(map(Fraction, values), Fraction(0))
    assert abs(found - exact) <= Fraction(encoding.max_error(part, members))


@given(BOUNDS, st.integers(1, 1024), st.sampled_from([16, 32, 64]), st.sampled_from([-1, 1]))
def test_nothing_overflows_where_all_members_are_at_their_bound(bound, members, bits, sign):
    encoding = build(bound, members, bits)
    one = encoding.encode(np.array([sign * bound]))
    total = np.sum([one] * members, axis=0, dtype=one.dtype)
    found = encoding.decode(total, members)[0]
    assert abs(found - sign * members * bound) <= encoding.max_error(
        encoding.layout.parts[0], members
    ) + np.spacing(members * bound)


def test_64_bits_for_twenty_members_keep_more_than_float64_does():
    encoding = build(1.0, 20)
    assert encoding.fraction_bits == 58
    assert encoding.step(encoding.layout.parts[0]) == 2.0**-58


def test_a_part_has_its_own_step():
    layout = VectorLayout((Part("small", (2,), 1e-6), Part("large", (1,), 1e6)))
    encoding = FixedPoint(layout, 4, 32)
    vector = np.array([1e-6, -3e-7, 7.0])
    found = encoding.decode(encoding.encode(vector), 1)
    for (part, place), error in zip(layout.places(), (1e-14, 1e-2), strict=True):
        assert np.abs(found[place] - vector[place]).max() <= encoding.max_error(part, 1) < error


def test_a_total_that_no_vectors_have_is_refused():
    encoding = build(1.0, 5)
    words = encoding.encode(np.array([1.0]))
    encoding.decode(words * np.uint64(2), 2)
    with pytest.raises(SumError, match="did not clip"):
        encoding.decode(words * np.uint64(2) + np.uint64(1), 2)
    with pytest.raises(SumError, match="did not clip"):
        encoding.decode(words * np.uint64(3), 2)


def test_unclipped_values_and_wrong_counts_are_refused():
    encoding = build(1.0, 5)
    for value in (1.0000001, np.nan, np.inf):
        with pytest.raises(SumError, match="Clip the vector first"):
            encoding.encode(np.array([value]))
    for members in (0, 6):
        with pytest.raises(SumError, match="expected 1 to 5 members"):
            encoding.decode(encoding.encode(np.array([0.0])), members)
    with pytest.raises(SumError, match="one bit"):
        build(1.0, 200, bits=8)
    assert build(1.0, 5).digest != build(1.0, 6).digest != build(1.0, 6, 32).digest
