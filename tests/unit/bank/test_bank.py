"""Reading a bank: views, losses and derived numbers."""

from dataclasses import replace

import pytest
import torch

from molora_fed.errors import BankError, ShapeError
from molora_fed.routing.causal import causal_mean
from molora_fed.testing import build_synthetic_bank, permute_experts


@pytest.fixture
def bank():
    return build_synthetic_bank()


def test_slices_and_indices_read_the_same(bank):
    one, other = bank.view(slice(3, 6)), bank.view(torch.tensor([3, 4, 5]))
    for name in ("document_starts", "evidence", "mean_hidden", "experts_hidden"):
        assert torch.equal(getattr(one, name), getattr(other, name))


def test_uniform_gates_give_the_mean_probability(bank):
    rows = slice(0, 4)
    found = bank.nll(bank.uniform_gates(rows), rows)
    expected = -bank.logprob[rows, 1:].exp().mean(-1).log()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(bank.score_nll(torch.zeros(4, 24, 3), rows), expected)


def test_gates_of_other_experts_are_refused(bank):
    with pytest.raises(ShapeError, match=r"expected gates \(B, 24, 3\), got \(2, 24, 4\)"):
        bank.nll(torch.full((2, 24, 4), 0.25), slice(0, 2))


def test_derived_numbers_are_computed_once(bank, tmp_path):
    calls = []

    def compute(view):
        calls.append(len(view.document_starts))
        return causal_mean(view.mean_hidden, view.document_starts)

    first = bank.derive("mean", compute)
    assert bank.derive("mean", compute) is first
    assert sum(calls) == bank.num_blocks
    everything = bank.view(slice(0, bank.num_blocks))
    assert torch.equal(first, causal_mean(everything.mean_hidden, everything.document_starts))


def test_derived_numbers_on_disk_are_the_same_and_leave_no_file(bank, tmp_path):
    on_disk = replace(bank, folder=tmp_path, _derived={})
    found = on_disk.derive("evidence", lambda view: view.evidence)
    assert torch.equal(found, bank.derive("evidence", lambda view: view.evidence))
    assert not list(tmp_path.iterdir())


def test_missing_column_is_named():
    bank = build_synthetic_bank(readings=frozenset({"evidence"}))
    with pytest.raises(BankError, match="bank column 'mean_hidden'"):
        replace(bank, readings=frozenset({"mean_hidden"})).view(slice(0, 1))


def test_bank_of_numbers_cannot_measure_models(bank):
    with pytest.raises(BankError, match="weight_average"):
        bank.add_column("weight_average", object())


def test_permuting_experts_permutes_columns_only(bank):
    moved = permute_experts(bank, [2, 0, 1])
    gates = torch.softmax(torch.randn(2, 24, 3, generator=torch.Generator().manual_seed(0)), -1)
    rows = slice(0, 2)
    torch.testing.assert_close(moved.nll(gates[..., [2, 0, 1]], rows), bank.nll(gates, rows))
