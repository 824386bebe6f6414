"""Layouts of vectors: one flat form of named tensors, finite and within bounds."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from molora_fed.errors import SumError
from molora_fed.privacy.sums.vectors import Part, VectorLayout

LAYOUT = VectorLayout((Part("a", (2, 3), 2.0), Part("b", (), 0.5), Part("empty", (0, 4), 1.0)))


def build_values(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(2, 3, generator=generator, dtype=torch.float64),
        "b": torch.tensor(0.25),
        "empty": torch.zeros(0, 4),
    }


def test_tensors_come_back_as_they_were():
    values = build_values()
    vector = LAYOUT.flatten(values, who="x")
    assert vector.shape == (7,) and vector.dtype == np.float64
    found = LAYOUT.unflatten(vector)
    for name, value in values.items():
        assert found[name].dtype == torch.float64
        torch.testing.assert_close(found[name], value.double(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.pop("b"),
        lambda v: v.update(c=torch.zeros(1)),
        lambda v: v.update(a=torch.zeros(3, 2)),
    ],
)
def test_other_names_or_shapes_are_one_line_with_the_member(change):
    values = build_values()
    change(values)
    with pytest.raises(SumError, match=r"'legal-07'.*layout") as caught:
        LAYOUT.flatten(values, who="legal-07")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_with_member_and_part(bad):
    vector = np.zeros(7)
    vector[3] = bad
    with pytest.raises(SumError, match=r"'legal-07'.*1 in part 'a'"):
        LAYOUT.clip(vector, who="legal-07")


@pytest.mark.parametrize("vector", [np.zeros(6), np.zeros((7, 1)), np.zeros(7, dtype=np.float32)])
def test_another_length_or_dtype_is_refused(vector):
    with pytest.raises(SumError, match="expected 7 entries of float64"):
        LAYOUT.clip(vector, who="x")


def test_clipping_keeps_the_bounds_counts_and_leaves_the_vector():
    vector = np.array([3.0, -3.0, 2.0, -2.0, 0.1, 0.0, 0.7])
    before = vector.copy()
    clipped, beyond = LAYOUT.clip(vector, who="x")
    assert clipped.tolist() == [2.0, -2.0, 2.0, -2.0, 0.1, 0.0, 0.5] and beyond == 3
    assert (vector == before).all()


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=7, max_size=7))
def test_a_clipped_vector_is_not_clipped_again(values):
    clipped, _ = LAYOUT.clip(np.array(values), who="x")
    again, beyond = LAYOUT.clip(clipped, who="x")
    assert beyond == 0 and again.tobytes() == clipped.tobytes()


@pytest.mark.parametrize(
    "parts",
    [
        (),
        (Part("a", (0,), 1.0),),
        (Part("a", (1,), 1.0), Part("a", (2,), 1.0)),
        (Part("", (1,), 1.0),),
        (Part("a", (-1,), 1.0),),
        (Part("a", (1,), 0.0),),
        (Part("a", (1,), float("nan")),),
        (Part("a", (1,), float("inf")),),
        (Part("a", (2**28,), 1.0),),
    ],
)
def test_a_malformed_layout_is_refused(parts):
    with pytest.raises(SumError, match="Cannot lay out a vector"):
        VectorLayout(parts)


def test_digests_tell_layouts_apart():
    others = [
        VectorLayout((Part("a", (2, 3), 2.0),)),
        VectorLayout((Part("a", (3, 2), 2.0),)),
        VectorLayout((Part("b", (2, 3), 2.0),)),
        VectorLayout((Part("a", (2, 3), np.nextafter(2.0, 3.0)),)),
    ]
    assert len({layout.digest for layout in others}) == 4
    assert others[0].digest == VectorLayout((Part("a", (2, 3), 2.0),)).digest
