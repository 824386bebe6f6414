"""Fitting on a bank: batches, both optimisers, and what is refused."""

import numpy as np
import pytest
import torch

from molora_fed.bank import HeldOutBank
from molora_fed.errors import RoutingError
from molora_fed.routing.fitting import (
    check_calibration,
    compute_score_loss,
    draw_batches,
    fit_on_batches,
    fit_on_whole,
)
from molora_fed.testing import build_synthetic_bank


@pytest.fixture
def bank():
    return build_synthetic_bank()


def test_only_calibration_banks_are_taken(bank):
    check_calibration(bank)
    for other in (build_synthetic_bank(HeldOutBank), None, [bank]):
        with pytest.raises(RoutingError, match=f"got {type(other).__name__}"):
            check_calibration(other)


def test_domains_take_turns_and_blocks_are_gone_through(bank):
    batches = draw_batches(bank, steps=16, batch=3, seed=1)
    assert batches.shape == (16, 3)
    assert [sorted(bank.domain_of[row]) for row in batches] == [[0, 1, 2]] * 16
    counts = np.bincount(batches.flatten().numpy(), minlength=24)
    assert counts.tolist() == [2] * 24
    assert torch.equal(batches, draw_batches(bank, steps=16, batch=3, seed=1))
    assert not torch.equal(batches, draw_batches(bank, steps=16, batch=3, seed=2))


def test_pure_steps_hold_one_domain_each_and_come_first(bank):
    batches = draw_batches(bank, steps=12, batch=4, seed=1, pure_steps=6)
    domains = [set(bank.domain_of[row]) for row in batches]
    assert all(len(found) == 1 for found in domains[:6])
    assert set.union(*domains[:3]) == set.union(*domains[3:6]) == {0, 1, 2}
    assert all(found == {0, 1, 2} for found in domains[6:])
    counts = np.bincount(batches.flatten().numpy(), minlength=24)
    assert counts.sum() == 48 and counts.tolist() == [2] * 24


@pytest.mark.parametrize("pure_steps", [0, 1, 7])
def test_every_step_has_blocks_however_many_are_pure(bank, pure_steps):
    batches = draw_batches(bank, steps=7, batch=2, seed=3, pure_steps=pure_steps)
    assert batches.shape == (7, 2)
    assert batches.min() >= 0 and batches.max() < 24


def test_adamw_on_batches_is_a_plain_loop_over_the_same_batches(bank):
    features, weight = bank.mean_hidden, torch.zeros(3, 16)
    plain = weight.clone().requires_grad_(True)
    optimizer = torch.optim.AdamW([plain], lr=0.01)
    for rows in draw_batches(bank, steps=20, batch=4, seed=5):
        gates = torch.softmax(features[rows] @ plain.T, -1)[:, :-1]
        probability = (gates * bank.logprob[rows][:, 1:].exp()).sum(-1)
        optimizer.zero_grad()
        (-probability.log().mean()).backward()
        optimizer.step()
    fit_on_batches(
        bank, features, [weight], lambda part: part @ weight.T,
        steps=20, batch=4, learning_rate=0.01, seed=5,
    )  # fmt: skip
    torch.testing.assert_close(weight, plain.detach(), rtol=1e-4, atol=1e-5)
    assert not weight.requires_grad


def test_progress_and_threads_are_left_in_order(bank):
    seen, weight, threads = [], torch.zeros(3, 16), torch.get_num_threads()
    fit_on_batches(
        bank, bank.mean_hidden, [weight], lambda part: part @ weight.T,
        steps=60, batch=2, learning_rate=0.01, seed=0,
        progress=lambda done, total, **fields: seen.append((done, total, set(fields))),
    )  # fmt: skip
    assert seen == [(25, 60, {"loss"}), (50, 60, {"loss"}), (60, 60, {"loss"})]
    assert torch.get_num_threads() == threads


def test_a_loss_that_is_not_finite_is_an_error(bank):
    weight = torch.full((3, 16), float("nan"))
    with pytest.raises(RoutingError, match="finite loss, got nan"):
        fit_on_batches(
            bank, bank.mean_hidden, [weight], lambda part: part @ weight.T,
            steps=2, batch=2, learning_rate=0.01, seed=0,
        )  # fmt: skip


def test_the_whole_bank_gives_the_equal_weight_loss_and_never_a_worse_one(bank, monkeypatch):
    monkeypatch.setattr("molora_fed.routing.fitting._CHUNK_NUMBERS", 24 * 16 * 5)
    weight = torch.zeros(3, 16)

    def scores(part):
        return part @ weight.T

    start = compute_score_loss(bank, bank.mean_hidden, scores)
    everything = slice(0, bank.num_blocks)
    uniform = bank.nll(bank.uniform_gates(everything), everything).mean(1)
    by_domain = [uniform[torch.from_numpy(bank.domain_of == d)].mean() for d in range(3)]
    assert start == pytest.approx(float(torch.stack(by_domain).mean()), abs=1e-5)
    best = fit_on_whole(bank, bank.mean_hidden, [weight], scores, iterations=20)
    assert best < start - 0.1
    assert compute_score_loss(bank, bank.mean_hidden, scores) == pytest.approx(best, abs=1e-6)
    assert not weight.requires_grad


def test_from_the_optimum_it_does_not_move_away(bank):
    scale = torch.zeros(1)
    best = fit_on_whole(
        bank, torch.zeros(24, 24, 3), [scale], lambda part: part * scale, iterations=5
    )
    assert scale.item() == 0
    assert best == compute_score_loss(bank, torch.zeros(24, 24, 3), lambda part: part)


def test_curriculum_changes_the_order_of_blocks_only(bank):
    weights = []
    for curriculum in (0.0, 0.0, 0.5):
        weight = torch.zeros(3, 16)
        fit_on_batches(
            bank, bank.mean_hidden, [weight], lambda part, weight=weight: part @ weight.T,
            steps=10, batch=2, learning_rate=0.01, seed=5, curriculum=curriculum,
        )  # fmt: skip
        weights.append(weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
