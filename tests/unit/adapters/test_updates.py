import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from molora_fed.adapters.updates import LinearUpdate, decompose, decompose_update
from molora_fed.errors import AdapterError

SIZES = st.integers(1, 9)


@given(rows=SIZES, columns=SIZES, rank=SIZES, scale=st.floats(-4, 4), seed=st.integers(0, 999))
def test_product_of_factors_is_what_a_layer_would_add(rows, columns, rank, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, columns, generator=generator)
    b = torch.randn(rows, rank, generator=generator)
    update = LinearUpdate(a=a, b=b, scale=scale)
    inputs = torch.randn(5, columns, generator=generator)
    assert update.rank == rank
    assert update.shape == (rows, columns) == tuple(update.product().shape)
    expected = scale * ((inputs @ a.T) @ b.T)
    assert torch.allclose(inputs @ update.product().T, expected, atol=1e-3, rtol=1e-4)


def test_product_of_half_precision_is_computed_in_float32():
    a, b = torch.randn(2, 4), torch.randn(3, 2)
    half = LinearUpdate(a=a.bfloat16(), b=b.bfloat16())
    assert half.product().dtype == torch.float32
    assert torch.equal(half.product(), b.bfloat16().float() @ a.bfloat16().float())


def test_dense_update_is_its_own_product():
    dense, bias = torch.randn(3, 4), torch.randn(3)
    update = LinearUpdate(dense=dense, bias=bias)
    assert update.rank is None
    assert update.shape == (3, 4)
    assert torch.equal(update.product(), dense)
    assert set(update.tensors()) == {"dense", "bias"}


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"a": torch.zeros(1, 2)},
        {"b": torch.zeros(2, 1)},
        {"a": torch.zeros(1, 2), "b": torch.zeros(2, 1), "dense": torch.zeros(2, 2)},
        {"a": torch.zeros(1, 2), "b": torch.zeros(2, 3)},
        {"a": torch.zeros(2), "b": torch.zeros(2, 1)},
        {"dense": torch.zeros(2, 2), "scale": 0.5},
    ],
)
def test_refuses_parts_that_make_no_update(parts):
    with pytest.raises(AdapterError, match="Cannot build an update"):
        LinearUpdate(**parts)


@pytest.mark.parametrize(("rows", "columns", "rank"), [(12, 8, 3), (8, 12, 3), (6, 5, 9)])
def test_factors_are_decomposed_as_their_product_is(rows, columns, rank):
    generator = torch.Generator().manual_seed(rows)
    a, b = (
        torch.randn(rank, columns, generator=generator),
        torch.randn(rows, rank, generator=generator),
    )
    update = LinearUpdate(a=a, b=b, scale=0.5)
    found, expected = decompose_update(update), decompose(update.product())
    kept = min(rank, rows, columns)
    assert torch.allclose(found.values[:kept], expected.values[:kept], atol=1e-5)
    assert torch.allclose((found.u * found.values) @ found.vh, update.product(), atol=1e-5)
    whole = decompose_update(LinearUpdate(dense=update.product()))
    assert torch.equal(whole.values, expected.values)
