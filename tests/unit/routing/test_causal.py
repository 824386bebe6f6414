"""Causal sums against a plain loop, whole and in pieces."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molora_fed.routing.causal import causal_mean, causal_sum, count_since_start


def loop_sum(values, starts, decay, carry=None):
    total = torch.zeros_like(values[:, 0]) if carry is None else carry.clone()
    out = []
    for t in range(values.shape[1]):
        keep = torch.where(starts[:, t], 0.0, decay).to(values.dtype)
        total = keep.view(-1, *[1] * (values.ndim - 2)) * total + values[:, t]
        out.append(total)
    return torch.stack(out, dim=1)


@pytest.mark.parametrize("decay", [1.0, 0.95, 0.5, 0.0])
@pytest.mark.parametrize("shape", [(3, 17), (2, 32, 4), (2, 1, 3), (1, 5, 2, 3)])
def test_sum_matches_a_loop(shape, decay):
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    starts = torch.rand(shape[:2], generator=generator) < 0.2
    carry = torch.randn(values[:, 0].shape, generator=generator, dtype=torch.float64)
    for start in (None, carry):
        torch.testing.assert_close(
            causal_sum(values, starts, decay=decay, carry=start),
            loop_sum(values, starts, decay, start),
        )


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(1, 19), seed=st.integers(0, 2**16), decay=st.sampled_from([1.0, 0.9]))
def test_pieces_continue_each_other(cut, seed, decay):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn((2, 20, 3), generator=generator)
    starts = torch.rand((2, 20), generator=generator) < 0.15
    first = causal_sum(values[:, :cut], starts[:, :cut], decay=decay)
    second = causal_sum(values[:, cut:], starts[:, cut:], decay=decay, carry=first[:, -1])
    whole = causal_sum(values, starts, decay=decay)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-4, atol=1e-5)


def test_mean_and_count_restart_with_a_document():
    values = torch.tensor([[1.0, 3.0, 10.0, 20.0, 60.0]]).unsqueeze(-1)
    starts = torch.tensor([[True, False, True, False, False]])
    assert count_since_start(starts).tolist() == [[1, 2, 1, 2, 3]]
    assert causal_mean(values, starts).squeeze(-1).tolist() == [[1, 2, 10, 15, 30]]
    assert count_since_start(starts[:, 3:], carry=torch.tensor([1.0])).tolist() == [[2, 3]]


def test_large_sums_do_not_spoil_a_later_document():
    values = torch.full((1, 1000, 1), 1e6)
    values[0, -1] = 0.125
    starts = torch.zeros((1, 1000), dtype=torch.bool)
    starts[0, -1] = True
    assert causal_sum(values, starts)[0, -1].item() == 0.125
