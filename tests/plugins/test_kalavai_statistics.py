"""The discriminant in closed form, and the router made of it."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from molora_kalavai.discriminant import Discriminant, fit_discriminant
from molora_kalavai.lda import StatisticsOptions, StatisticsRouter
from molora_kalavai.linear import LinearOptions, LinearRouter
from molora_kalavai.mixtures import fit_mixtures, mix_log
from molora_kalavai.moments import ClassMoments, assign_folds, collect_moments
from pydantic import ValidationError
from scipy.stats import multivariate_normal

from molora_fed.bank import HeldOutBank
from molora_fed.errors import RoutingError, ShapeError
from molora_fed.evaluation.evaluate import compute_domain_losses, compute_router_losses
from molora_fed.testing import build_synthetic_bank, permute_experts

OPTIONS = StatisticsOptions()


def draw_segments(seed, segments, width=3, domains=2):
    """States of many documents with known covariances, and which document and domain each is of."""
    random = np.random.default_rng(seed)
    within = np.diag(np.arange(1.0, width + 1))
    between = 0.5 * np.eye(width) + 0.2
    sizes = random.integers(2, 12, segments)
    domain = random.integers(0, domains, segments)
    domain[:domains] = range(domains)
    means = random.normal(size=(domains, width)) * 3
    own = means[domain] + random.multivariate_normal(np.zeros(width), between, segments)
    segment_of = np.repeat(np.arange(segments), sizes)
    noise = random.multivariate_normal(np.zeros(width), within, len(segment_of))
    states = own[segment_of] + noise
    return torch.from_numpy(states).float(), segment_of, domain[segment_of], within, between


def make_moments(states, segment_of, domain_of, domains=2):
    moments = ClassMoments.zeros(domains, torch.zeros(states.shape[1], dtype=torch.float64))
    moments.add_block_states(states, torch.from_numpy(segment_of), torch.from_numpy(domain_of))
    return moments


def test_both_covariances_are_recovered():
    states, segment_of, domain_of, within, between = draw_segments(0, 6000)
    moments = make_moments(states, segment_of, domain_of)
    np.testing.assert_allclose(moments.within(), within, atol=0.1)
    np.testing.assert_allclose(moments.between(), between, atol=0.1)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(4, 40), st.integers(1, 6))
def test_moments_add_up_and_can_be_taken_away(seed, segments, folds):
    states, segment_of, domain_of, _, _ = draw_segments(seed, segments)
    whole = make_moments(states, segment_of, domain_of)
    parts = []
    for fold in range(folds):
        mine = segment_of % folds == fold
        parts.append(make_moments(states[mine], segment_of[mine], domain_of[mine]))
    added = sum(parts[1:], start=parts[0])
    left = whole - parts[0]
    others = sum(parts[1:], start=ClassMoments.zeros(2, whole.shift))
    for name in ("tokens", "squares", "segments", "sums", "total", "grouped"):
        torch.testing.assert_close(getattr(added, name), getattr(whole, name), atol=1e-2, rtol=1e-4)
        torch.testing.assert_close(getattr(left, name), getattr(others, name), atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("count", [1, 4, 50])
def test_posterior_is_that_of_gaussians_with_two_levels(count):
    states, segment_of, domain_of, _, _ = draw_segments(1, 400)
    moments = make_moments(states, segment_of, domain_of)
    found = Discriminant.of(moments, shrinkage=0.0).weigh(correlation=2.0, temperature=1.0)
    x = np.array([1.0, -0.5, 2.0])
    covariance = moments.between().numpy() + 2.0 / count * moments.within().numpy()
    densities = [multivariate_normal(m, covariance).logpdf(x) for m in moments.means().numpy()]
    expected = torch.log_softmax(torch.tensor(densities), dim=0)
    posterior = found.log_posterior(torch.from_numpy(x)[None].float(), torch.tensor([float(count)]))
    # The ridge that keeps rank-deficient covariances usable moves the numbers a little.
    torch.testing.assert_close(posterior[0].double(), expected, atol=0.05, rtol=0.05)


def test_temperature_zero_leaves_all_domains_equal():
    states, segment_of, domain_of, _, _ = draw_segments(1, 30)
    found = Discriminant.of(make_moments(states, segment_of, domain_of), 0.5).weigh(1.0, 0.0)
    posterior = found.log_posterior(states, torch.ones(len(states)))
    torch.testing.assert_close(posterior.exp(), torch.full_like(posterior, 0.5))


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_folds_keep_clusters_whole_and_leave_every_domain_something(folds):
    bank = build_synthetic_bank()
    fold_of = assign_folds(bank, folds)
    for cluster in np.unique(bank.clusters):
        assert len(np.unique(fold_of[bank.clusters == cluster])) == 1
    count = fold_of.max() + 1
    assert count == min(folds, 4)  # the bank has four clusters a domain
    for fold, domain in np.ndindex(count, len(bank.domains)):
        assert (fold_of[bank.domain_of == domain] != fold).any()
        assert (fold_of[bank.domain_of == domain] == fold).any()


def test_blocks_are_dealt_where_clusters_do_not_suffice():
    bank = build_synthetic_bank()
    single = replace(bank, clusters=bank.domain_of[:, None] + 0 * bank.clusters, _derived={})
    fold_of = assign_folds(single, 5)
    assert (fold_of == fold_of[:, :1]).all()
    assert fold_of.max() == 4
    lone = build_synthetic_bank(blocks_per_domain=1)
    assert not assign_folds(replace(lone, clusters=single.clusters[::8], _derived={}), 5).any()


@pytest.mark.parametrize("blocks", [1, 2, 30])
def test_little_calibration_text_still_gives_a_router(blocks):
    bank = build_synthetic_bank(blocks_per_domain=blocks)
    gates = StatisticsRouter.fit(bank, OPTIONS, 0).gates(bank.view(slice(0, 3)))
    assert torch.isfinite(gates).all()


def test_constant_states_give_a_router_that_mixes_all_domains():
    bank = build_synthetic_bank()
    same = replace(bank, base_hidden=torch.zeros_like(bank.base_hidden), _derived={})
    router = StatisticsRouter.fit(same, OPTIONS, 0)
    gates = router.gates(same.view(slice(0, 3)))
    torch.testing.assert_close(gates, router.mixtures.mean(0).expand_as(gates))


def test_a_mixture_is_at_least_as_good_as_the_domains_best_expert():
    bank = build_synthetic_bank(num_experts=4, seed=3)
    gates = fit_mixtures(bank)[torch.from_numpy(bank.domain_of)][:, None]
    nll = bank.nll(gates.expand(-1, bank.block_size, -1), slice(0, bank.num_blocks))
    losses = compute_domain_losses(bank, nll)
    tables = [compute_domain_losses(bank, bank.expert_nll(e)) for e in range(4)]
    for domain, loss in losses.items():
        assert loss <= min(table[domain] for table in tables) + 1e-4


def test_mixtures_of_certain_domains_are_their_own():
    mixtures = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.3, 0.5]])
    log_posterior = torch.tensor([[0.0, -1e9], [-1e9, 0.0]])
    torch.testing.assert_close(mix_log(log_posterior, mixtures).exp(), mixtures)


def test_statistics_tell_domains_apart_as_well_as_the_linear_router():
    bank, held_out = build_synthetic_bank(), build_synthetic_bank(HeldOutBank, seed=1)
    router = StatisticsRouter.fit(bank, OPTIONS, 0)
    found = compute_router_losses(held_out, router)
    assert found.gates.diagonal().min() > 0.8
    options = LinearOptions(input="base_hidden", learning_rate=0.01)
    linear = compute_router_losses(held_out, LinearRouter.fit(bank, options, 0))
    assert found.nll.mean() <= linear.nll.mean() + 0.03


@pytest.mark.parametrize("seed", range(3))
def test_near_identical_domains_are_not_lost(seed):
    bank, held_out = (
        build_synthetic_bank(kind, num_experts=4, blocks_per_domain=16, seed=s)
        for kind, s in ((type(build_synthetic_bank()), seed), (HeldOutBank, seed + 100))
    )

    def twin(one):
        """Hidden states and experts 0 and 1 become the same but for noise of the losses."""
        hidden, logprob = one.base_hidden.clone(), one.logprob.clone()
        hidden[one.domain_of == 1] = hidden[one.domain_of == 0]
        own = logprob[..., :2].amax(-1, keepdim=True) - 0.05
        twins = torch.from_numpy((one.domain_of == 0) | (one.domain_of == 1))[:, None, None]
        logprob[..., :2] = torch.where(twins, own, logprob[..., :2])
        return replace(one, base_hidden=hidden, logprob=logprob, _derived={})

    bank, held_out = twin(bank), twin(held_out)
    router = StatisticsRouter.fit(bank, OPTIONS, 0)
    losses = compute_domain_losses(held_out, compute_router_losses(held_out, router).nll)
    tables = [compute_domain_losses(held_out, held_out.expert_nll(e)) for e in range(4)]
    for domain, loss in losses.items():
        assert loss <= min(table[domain] for table in tables) + 0.05


def test_permuting_experts_permutes_gates_only():
    bank, held_out = build_synthetic_bank(), build_synthetic_bank(HeldOutBank, seed=1)
    order, rows = [2, 0, 1], slice(0, held_out.num_blocks)
    here = StatisticsRouter.fit(bank, OPTIONS, 0).gates(held_out.view(rows))
    moved = StatisticsRouter.fit(permute_experts(bank, order), OPTIONS, 0)
    there = moved.gates(permute_experts(held_out, order).view(rows))
    torch.testing.assert_close(there, here[..., order], rtol=1e-4, atol=1e-5)


def test_out_of_fold_posteriors_do_not_see_their_own_text():
    bank = build_synthetic_bank()
    fold_of = assign_folds(bank, 4)
    mine = torch.from_numpy(fold_of) == 0
    hidden = bank.base_hidden.clone()
    hidden[mine] = hidden[mine].flip(0)  # another domain's states, in the left-out text alone
    changed = replace(bank, base_hidden=hidden, _derived={})
    left = []
    for each in (bank, changed):
        parts = collect_moments(each, "base_hidden", fold_of, "statistics")
        left.append(Discriminant.of(sum(parts[1:], start=parts[0]) - parts[0], 0.5))
    rows = bank.base_hidden[:4].flatten(0, 1)
    one, other = (found.log_posterior(rows, torch.ones(len(rows))) for found in left)
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_out_of_fold_posteriors_of_noise_find_nothing():
    bank = build_synthetic_bank(hidden_size=64)
    noise = torch.randn(bank.base_hidden.shape, generator=torch.Generator().manual_seed(5))
    found = fit_discriminant(replace(bank, base_hidden=noise, _derived={}), "base_hidden", 4, "x")
    out = found.out_of_fold(replace(bank, base_hidden=noise, _derived={}), "base_hidden", "x")
    torch.testing.assert_close(out.exp().sum(-1), torch.ones(out.shape[:2]))
    own = torch.from_numpy(bank.domain_of)[:, None, None].expand(-1, bank.block_size, 1)
    # Worse than knowing nothing by little: in-sample, 64 axes would find much in 24 blocks.
    assert -out.gather(2, own).mean() < np.log(3) + 0.02


def test_fit_takes_less_than_a_second_of_a_core():
    bank = build_synthetic_bank(
        num_experts=4,
        blocks_per_domain=150,  # 600 blocks, as studies have
        block_size=128,
        hidden_size=128,
        readings=frozenset({"base_hidden"}),
    )
    StatisticsRouter.fit(build_synthetic_bank(), OPTIONS, 0)  # first calls load libraries
    start = time.process_time()
    StatisticsRouter.fit(bank, OPTIONS, 0)
    assert time.process_time() - start < 2.0  # about 0.4 s; room for slower machines


@pytest.mark.parametrize("values", [{"input": "evidence"}, {"folds": 1}, {"temperature": 1.0}])
def test_senseless_options_are_refused(values):
    with pytest.raises(ValidationError):
        StatisticsOptions(**values)


def test_states_that_do_not_fit_are_refused():
    bank = build_synthetic_bank()
    router = StatisticsRouter.fit(bank, OPTIONS, 0)
    tensors = router.state_tensors()
    with pytest.raises(ShapeError, match=r"mixtures \(C, 5\)"):
        StatisticsRouter(5, OPTIONS, tensors)
    with pytest.raises(ShapeError, match=r"spread \(D\)"):
        kept = {name: tensor for name, tensor in tensors.items() if name != "spread"}
        StatisticsRouter(3, OPTIONS, kept)
    narrow = build_synthetic_bank(hidden_size=8)
    with pytest.raises(ShapeError, match="width 16, got 8"):
        router.gates(narrow.view(slice(0, 1)))
    with pytest.raises(RoutingError, match="StatisticsOptions, got LinearOptions"):
        StatisticsRouter.fit(bank, LinearOptions(), 0)
