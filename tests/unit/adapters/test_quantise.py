"""Rounding to few bits: what is read is near what was written, and says how near."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molora_fed.adapters.quantised_files import (
    BITS,
    Quantised,
    count_row_bytes,
    count_scales,
    dequantise,
    quantise,
)
from molora_fed.errors import AdapterError

LEVELS = {
    2: torch.tensor([-1.5, -0.5, 0.5, 1.5]),
    4: torch.arange(-7.0, 8.0),
    8: torch.arange(-127.0, 128.0),
}


def random_matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def there_and_back(matrix: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    return dequantise(quantise(matrix, bits, group), matrix.shape[1], bits, group)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    rows=st.integers(1, 5),
    columns=st.integers(1, 70),
    group=st.integers(1, 80),
    size=st.sampled_from([1e-30, 1e-6, 1.0, 1e30]),
    seed=st.integers(0, 1000),
)
def test_sizes_are_as_stated_and_errors_bounded(bits, rows, columns, group, size, seed):
    matrix = size * random_matrix(rows, columns, seed)
    made = quantise(matrix, bits, group)
    assert made.codes.dtype == torch.uint8
    assert made.scales.dtype == torch.bfloat16
    assert made.codes.shape == (rows, count_row_bytes(columns, bits))
    assert made.scales.shape == (rows, count_scales(columns, group))
    back = dequantise(made, columns, bits, group)
    assert back.shape == matrix.shape
    # The search never loses to the scale that fits the largest number.
    for start in range(0, columns, group):
        own, found = matrix[:, start : start + group], back[:, start : start + group]
        levels = LEVELS[bits]
        scale = (own.abs().amax(1, keepdim=True) / levels[-1]).bfloat16().float()
        nearest = ((own / scale)[..., None] - levels).abs().argmin(-1)
        plain = levels[nearest] * scale
        relative = (own - found) / size, (own - plain) / size
        assert relative[0].square().sum() <= relative[1].square().sum() * (1 + 1e-5) + 1e-12


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.01), (4, 0.12), (2, 0.36)])
def test_error_of_normal_numbers(bits, limit):
    matrix = random_matrix(64, 256, 0)
    error = (there_and_back(matrix, bits, 64) - matrix).norm() / matrix.norm()
    assert error < limit


@pytest.mark.parametrize("bits", BITS)
def test_numbers_on_the_grid_survive_exactly(bits):
    numbers = 0.25 * LEVELS[bits][None]
    assert torch.equal(there_and_back(numbers, bits, numbers.shape[1]), numbers)


@pytest.mark.parametrize("bits", BITS)
def test_zeros_stay_zeros(bits):
    matrix = torch.zeros(3, 21)
    matrix[1, :5] = 1.0
    back = there_and_back(matrix, bits, 8)
    assert torch.equal(back[0], matrix[0])
    assert torch.equal(back[1, 8:], matrix[1, 8:])
    assert torch.isfinite(back).all()


@pytest.mark.parametrize("bits", BITS)
def test_equal_matrices_give_equal_bytes_and_signs_mirror(bits):
    matrix = random_matrix(4, 33, 1)
    first, second = quantise(matrix, bits, 16), quantise(matrix.clone(), bits, 16)
    assert torch.equal(first.codes, second.codes) and torch.equal(first.scales, second.scales)
    assert torch.equal(there_and_back(-matrix, bits, 16), -there_and_back(matrix, bits, 16))


@pytest.mark.parametrize(
    ("bits", "codes", "numbers"),
    [
        (8, [0x81, 0x7F, 0x80], [1.0, -1.0, 0.0]),
        (4, [0x9F, 0x08], [7.0, 1.0, 0.0]),
        (2, [0b11100100], [-1.5, -0.5, 0.5]),
    ],
)
def test_the_first_number_lies_in_the_lowest_bits(bits, codes, numbers):
    stored = Quantised(torch.tensor([codes], dtype=torch.uint8), torch.ones(1, 1).bfloat16())
    assert dequantise(stored, 3, bits, 64).tolist() == [numbers]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_refuses_what_is_not_finite(value):
    matrix = torch.ones(2, 2)
    matrix[1, 1] = value
    with pytest.raises(AdapterError, match="expected finite numbers"):
        quantise(matrix, 4, 64)
