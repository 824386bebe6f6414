"""Robust sums: trimmed mean times n, clipped, and plain where members are too few."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import trim_mean

from molora_fed.errors import SumError
from molora_fed.privacy.sums.robust import count_trimmed, sum_by_group
from molora_fed.privacy.sums.vectors import Part, VectorLayout

LAYOUT = VectorLayout((Part("a", (2, 2), 10.0), Part("b", (), 3.0)))


def draw(members, seed=0):
    generator = np.random.default_rng(seed)
    return {f"m-{n}": generator.uniform(-3, 3, LAYOUT.length) for n in range(members)}


def add(vectors, layout, *, trim_share):
    """Members of one group with as much text each."""
    alike, sizes = dict.fromkeys(vectors, "group"), dict.fromkeys(vectors, 1.0)
    return sum_by_group(vectors, layout, alike, sizes, trim_share=trim_share, exact=())


def read(total):
    return np.concatenate([value.reshape(-1).numpy() for value in total.parts.values()])


@given(st.integers(1, 25), st.floats(0.01, 0.4), st.integers(0, 1000))
def test_it_is_the_trimmed_mean_times_the_members(members, share, seed):
    vectors = draw(members, seed)
    total = add(vectors, LAYOUT, trim_share=share)
    # What is cut, and a little: a share just below a whole member counts as that member.
    cut = count_trimmed(members, share) / members + 1e-9
    expected = trim_mean(np.stack(list(vectors.values())), cut, axis=0) * members
    np.testing.assert_allclose(read(total), expected, rtol=1e-12, atol=1e-12)
    assert bool(total.notes) == (count_trimmed(members, share) == 0)


def test_the_members_order_changes_no_bit():
    vectors = draw(11)
    total = add(vectors, LAYOUT, trim_share=0.1)
    other = add(dict(reversed(vectors.items())), LAYOUT, trim_share=0.1)
    assert read(total).tobytes() == read(other).tobytes()
    assert total.members == other.members == tuple(sorted(vectors))


@pytest.mark.parametrize("value", [1e300, -1e300, 9.9])
def test_fewer_liars_than_are_cut_move_a_coordinate_no_further_than_the_honest(value):
    honest = draw(8)
    vectors = {**honest, "liar-0": np.full(5, value), "liar-1": np.full(5, value)}
    mean = read(add(vectors, LAYOUT, trim_share=0.2)) / 10
    stacked = np.stack(list(honest.values()))
    assert (mean >= stacked.min(axis=0)).all() and (mean <= stacked.max(axis=0)).all()


def test_too_few_members_are_summed_plainly_and_clipped_and_it_says_so():
    vectors = {"a-1": np.array([99.0, 0, 0, 0, -99.0]), "a-2": np.ones(5)}
    total = add(vectors, LAYOUT, trim_share=0.1)
    assert read(total).tolist() == [11.0, 1.0, 1.0, 1.0, -2.0]
    assert "2 entries of 'a-1'" in total.notes[0]
    assert total.notes[1] == "Nothing was trimmed among 2 members of 'group'."


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_vector_that_is_not_finite_is_refused_with_its_member(bad):
    vectors = draw(12)
    vectors["m-7"][2] = bad
    with pytest.raises(SumError, match="'m-7'"):
        add(vectors, LAYOUT, trim_share=0.1)


def test_no_members_and_shares_out_of_range_are_refused():
    with pytest.raises(SumError, match="at least one"):
        add({}, LAYOUT, trim_share=0.1)
    for share in (0.0, -0.1, 0.41, float("nan")):
        with pytest.raises(SumError, match="share"):
            add(draw(3), LAYOUT, trim_share=share)
    assert count_trimmed(10, 0.3) == 3 and count_trimmed(9, 0.1) == 0


def test_long_vectors_are_cut_piece_by_piece_to_the_same_bits():
    layout = VectorLayout((Part("a", (70_000,), 10.0),))
    generator = np.random.default_rng(0)
    vectors = {f"m-{n}": generator.uniform(-3, 3, 70_000) for n in range(5)}
    total = add(vectors, layout, trim_share=0.2).parts["a"].numpy()
    kept = np.sort(np.stack(list(vectors.values())), axis=0)[1:-1]
    assert (total == kept.mean(axis=0) * 5).all()


def test_members_of_one_group_are_trimmed_among_themselves_by_unit_of_size():
    rate = np.array([1.0, 1.5, 0.5, 1.2, 0.3])  # what a unit of text gives in group "a"
    sizes = {"a-0": 1.0, "a-1": 2.0, "a-2": 1.5, "a-3": 0.5, "a-4": 1.0, "z": 2.0}
    vectors = {name: rate * sizes[name] for name in sizes}
    vectors["a-4"] = np.full(5, -9.9)  # lies, within the bounds it is clipped to
    vectors["z"] = np.full(5, 2.0)  # alone in a group of another kind: never cut away
    groups = {name: name[0] for name in sizes}
    settings = {"trim_share": 0.2, "exact": {"b"}}
    total = sum_by_group(vectors, LAYOUT, groups, sizes, **settings)
    units = sum(size for name, size in sizes.items() if name != "z")
    expected = rate * units + 2.0
    expected[4] = sum(vectors[name][4] for name in vectors if name != "a-4") - 3.0  # clipped, plain
    np.testing.assert_allclose(read(total), expected)
    assert any("'z'" in note for note in total.notes) and any("a-4" in n for n in total.notes)
    turned = sum_by_group(dict(reversed(vectors.items())), LAYOUT, groups, sizes, **settings)
    assert read(turned).tobytes() == read(total).tobytes()
    with pytest.raises(SumError, match="at least one member"):
        sum_by_group({}, LAYOUT, {}, {}, **settings)
