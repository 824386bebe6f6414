"""Routers fitted by sums: as good as the pooled fit, whoever holds the text, and bounded."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from fusion_helpers import build_cooperative
from hypothesis import given, settings
from hypothesis import strategies as st
from molora_kalavai.evidence import EvidenceOptions, EvidenceRouter, ZeroTrainingEvidenceRouter
from molora_kalavai.evidence_share import FixedShareRouter, ShareOptions
from molora_kalavai.hard import HardRouter
from molora_kalavai.lda import StatisticsOptions, StatisticsRouter
from molora_kalavai.linear import LinearOptions, LinearRouter
from molora_kalavai.mixtures import fit_mixtures, measure_mixtures, propose_mixtures
from molora_kalavai.mlp import MlpOptions, MlpRouter
from molora_kalavai.second_order import spread_evenly

from molora_fed.adapters.files import load_adapter
from molora_fed.bank import Expert, build_calibration_bank
from molora_fed.errors import RoutingError
from molora_fed.evaluation.evaluate import compute_domain_losses, compute_router_losses
from molora_fed.plugins import load_plugins
from molora_fed.routing.summed import plan_summed_fit
from molora_fed.routing.summed_run import (
    answer_round,
    collect_setting,
    fit_by_sums,
    unpack_sums,
    weigh_domains,
)
from molora_fed.testing import build_synthetic_bank, take_blocks

READINGS = frozenset({"evidence", "base_hidden", "mean_hidden"})


def share_out(bank):
    """Every member has one domain's blocks."""
    domains = range(len(bank.domains))
    return [take_blocks(bank, np.flatnonzero(bank.domain_of == d)) for d in domains]


def compute_loss(bank, router):
    losses = compute_domain_losses(bank, compute_router_losses(bank, router).nll)
    return sum(losses.values()) / len(losses)


def blur(bank, seed, width=1.5):
    """The bank with noise on what experts say, so that no weights tell domains apart for sure."""
    noise = torch.randn(bank.logprob.shape, generator=torch.Generator().manual_seed(seed))
    logprob = (bank.logprob + width * noise).clamp_max(-1e-3)
    logprob[:, 0] = 0.0
    return replace(bank, logprob=logprob, _derived={})


@pytest.fixture(scope="module")
def grown(tiny_checkpoint, tmp_path_factory):
    """The bank of a small cooperative: a base, three specialists, text that they wrote."""
    base, contributions = build_cooperative(tiny_checkpoint(), tmp_path_factory.mktemp("adapters"))
    experts = [
        Expert("base", None),
        *(Expert(c.contributor, partial(load_adapter, c.adapter)) for c in contributions),
    ]
    blocks = [c.calibration for c in contributions]
    folder = tmp_path_factory.mktemp("bank")

    def build(mixture="probability"):
        return build_calibration_bank(
            folder, base, experts, blocks, readings=READINGS, mixture=mixture
        )

    return build


@pytest.mark.parametrize("prior", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_evidence_is_the_pooled_fit_within_five_rounds(seed, prior):
    bank = blur(build_synthetic_bank(num_experts=3 + seed, seed=seed, blocks_per_domain=12), seed)
    options = EvidenceOptions(prior=prior)
    pooled = EvidenceRouter.fit(bank, options, 0)
    found, result = fit_by_sums(EvidenceRouter, share_out(bank), options, 0)
    assert compute_loss(bank, found) == pytest.approx(compute_loss(bank, pooled), abs=1e-4)
    assert result.rounds <= 5
    if not prior:
        assert found.prior.tolist() == [0.0] * bank.num_experts


def test_evidence_is_the_pooled_fit_on_text_that_specialists_wrote(grown):
    bank = grown()
    for router in (EvidenceRouter, FixedShareRouter):
        pooled = router.fit(bank, router.Options(), 0)
        found, _ = fit_by_sums(router, share_out(bank), router.Options(), 0)
        assert compute_loss(bank, found) <= compute_loss(bank, pooled) + 1e-4


@pytest.mark.parametrize("router", [EvidenceRouter, FixedShareRouter])
@pytest.mark.parametrize("seed", range(3))
def test_a_fit_by_sums_is_never_worse_than_the_zero_form(router, seed):
    bank = build_synthetic_bank(num_experts=4, seed=seed, block_size=16)
    if seed == 2:  # evidence that misleads
        bank = replace(bank, logprob=bank.logprob.flip(1), _derived={})
    found, _ = fit_by_sums(router, share_out(bank), router.Options(), 0)
    zero = ZeroTrainingEvidenceRouter(4)
    assert compute_loss(bank, found) <= compute_loss(bank, zero) + 1e-6


@pytest.mark.parametrize("router", [EvidenceRouter, FixedShareRouter])
def test_under_the_logit_mixture_the_zero_form_is_kept_where_it_is_better(grown, router):
    bank = grown("logit")
    found, result = fit_by_sums(router, share_out(bank), router.Options(), 0)
    zero = ZeroTrainingEvidenceRouter(bank.num_experts)
    assert compute_loss(bank, found) <= compute_loss(bank, zero) + 1e-6
    assert result.rounds <= 5


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_evidence_sums_are_the_losss_derivatives(seed, prior):
    bank = blur(build_synthetic_bank(seed=seed % 50, block_size=12, blocks_per_domain=3), seed)
    fit = plan_summed_fit(EvidenceRouter, collect_setting([bank], EvidenceOptions(prior=prior), 0))
    basis = fit.directions()
    random = np.random.default_rng(seed)
    theta = torch.from_numpy(random.normal(0, 0.5, basis.shape[0]))
    # So small that the third derivative is far below the tolerance: 1e-3 leaves 0.4 %.
    step = 1e-4 * torch.from_numpy(random.normal(size=basis.shape[1]))
    state = {"points": torch.stack([theta, theta + basis @ step, theta - basis @ step])}
    found = fit.measure(bank, state, weigh_domains([bank]))
    loss, gradient = found["loss"], found["gradient"]
    row, column = torch.triu_indices(len(step), len(step))
    hessian = torch.zeros(len(step), len(step)).double()
    half = (found["gates_curvature"] - found["text_curvature"])[0]
    hessian[row, column] = hessian[column, row] = half
    assert float(gradient[0] @ step) == pytest.approx(
        float(loss[1] - loss[2]) / 2, rel=1e-3, abs=1e-10
    )
    change = (gradient[1] - gradient[2]) / 2
    torch.testing.assert_close(hessian @ step, change, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_priors_directions_leave_out_the_one_that_changes_no_gate(count):
    basis = spread_evenly(count)
    assert basis.shape == (count, count - 1)
    torch.testing.assert_close(basis.T @ basis, torch.eye(count - 1).double())
    torch.testing.assert_close(basis.sum(0), torch.zeros(count - 1).double())


def test_statistics_of_equal_folds_are_the_pooled_ones():
    # Clusters 0 to 3 of every domain are dealt alike to four folds, and every position is sampled.
    options = StatisticsOptions(folds=4)
    bank = blur(build_synthetic_bank(num_experts=4, seed=3), 3, width=0.7)
    pooled = StatisticsRouter.fit(bank, options, 0)
    found, result = fit_by_sums(StatisticsRouter, share_out(bank), options, 0)
    view = bank.view(slice(0, bank.num_blocks))
    torch.testing.assert_close(found.gates(view), pooled.gates(view), rtol=0, atol=2e-3)
    for name in ("temperature", "correlation"):
        assert torch.equal(getattr(found, name), getattr(pooled, name))
    assert compute_loss(bank, found) == pytest.approx(compute_loss(bank, pooled), abs=1e-4)
    assert result.rounds == 4


def test_statistics_are_as_good_on_text_that_specialists_wrote(grown):
    bank = grown()
    pooled = StatisticsRouter.fit(bank, StatisticsOptions(), 0)
    found, _ = fit_by_sums(StatisticsRouter, share_out(bank), StatisticsOptions(), 0)
    assert compute_loss(bank, found) == pytest.approx(compute_loss(bank, pooled), abs=5e-3)


def test_a_domain_of_one_cluster_still_gives_a_router():
    bank = build_synthetic_bank()
    clusters = np.where((bank.domain_of == 1)[:, None], 7, bank.clusters)
    single = replace(bank, clusters=clusters, _derived={})
    found, _ = fit_by_sums(StatisticsRouter, share_out(single), StatisticsOptions(), 0)
    assert torch.isfinite(found.gates(bank.view(slice(0, 4)))).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(2, 40))
def test_constant_gates_get_better_and_find_the_best(seed, experts, tokens):
    random = np.random.default_rng(seed)
    logprob = torch.from_numpy(random.normal(-3, 2, (tokens, experts)).clip(max=0)).float()
    bank = replace(
        build_synthetic_bank(num_experts=1, blocks_per_domain=1, block_size=tokens + 1),
        expert_names=tuple(f"e{e}" for e in range(experts)),
        logprob=torch.cat([torch.zeros(1, experts), logprob]).unsqueeze(0),
    )

    def measure(points):
        return [total / tokens for total in measure_mixtures(logprob, points)]

    point, losses = torch.full((experts,), 1 / experts).double(), []
    for _ in range(6):
        loss, shares, products = measure(point.unsqueeze(0))
        losses.append(float(loss))
        tried = propose_mixtures(point, shares[0], products[0])
        assert (tried > 0).all()
        torch.testing.assert_close(tried.sum(-1), torch.ones(len(tried)).double())
        tried = torch.cat([tried, point.unsqueeze(0)])
        point = tried[int(measure(tried)[0].argmin())]
    assert losses == sorted(losses, reverse=True)
    by_em = float(measure(fit_mixtures(bank).double().clamp_min(1e-12))[0])
    assert losses[-1] <= by_em + 2e-3


@pytest.mark.parametrize(
    ("router", "options"),
    [
        (LinearRouter, LinearOptions(learning_rate=0.01)),
        (HardRouter, LinearOptions(learning_rate=0.01)),
        (MlpRouter, MlpOptions(learning_rate=0.01, units=16)),
    ],
)
def test_one_gradient_a_round_reaches_the_pooled_fit(router, options):
    bank = build_synthetic_bank(num_experts=4, seed=1, blocks_per_domain=12)
    pooled = router.fit(bank, options, 5)
    found, result = fit_by_sums(router, share_out(bank), options, 5)
    assert compute_loss(bank, found) <= compute_loss(bank, pooled) + 0.02
    assert result.rounds == 12
    other, _ = fit_by_sums(router, share_out(bank), options, 6)
    assert not torch.equal(next(other.parameters()), next(found.parameters()))


def test_restarts_keep_the_best_of_several_starts():
    bank = build_synthetic_bank(seed=2)
    options = LinearOptions(learning_rate=0.001, steps=100)
    once, _ = fit_by_sums(LinearRouter, share_out(bank), options, 0)
    options = options.model_copy(update={"restarts": 2})
    found, result = fit_by_sums(LinearRouter, share_out(bank), options, 0)
    assert result.rounds == 36
    assert compute_loss(bank, found) < compute_loss(bank, once)


@pytest.mark.parametrize("name", ["dispatch", "evidence-hidden"])
def test_who_needs_pooled_text_is_refused_by_name(name):
    router = load_plugins().routers.resolve(name)
    with pytest.raises(RoutingError, match=f"Cannot fit router '{name}' by sums: expected"):
        fit_by_sums(router, [build_synthetic_bank()], router.Options(), 0)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([EvidenceRouter, FixedShareRouter, StatisticsRouter]))
def test_sums_of_any_parts_add_up_and_stay_within_their_bounds(seed, router):
    bank = build_synthetic_bank(block_size=10, blocks_per_domain=4, seed=seed % 20)
    # However wild the numbers are: 80 nats a token, states of a thousand.
    random = torch.Generator().manual_seed(seed)
    logprob = -80 * torch.rand(bank.logprob.shape, generator=random)
    bank = replace(bank, logprob=logprob, base_hidden=1e3 * bank.base_hidden, _derived={})
    owner = np.random.default_rng(seed).integers(0, 3, bank.num_blocks)
    parts = [take_blocks(bank, np.flatnonzero(owner == who)) for who in np.unique(owner)]
    options = router.Options()
    fit, weights = (
        plan_summed_fit(router, collect_setting([bank], options, 0)),
        weigh_domains([bank]),
    )
    state = fit.start()
    for _ in range(3):
        sent = fit.send(state)
        entries = fit.entries(sent)
        whole = unpack_sums(answer_round(fit, bank, sent, weights), entries)
        vectors = [answer_round(fit, part, sent, weights) for part in parts]
        added = unpack_sums(np.sum(vectors, axis=0), entries)
        for name, total in whole.items():
            scale = max(1e-6, float(total.abs().max()))
            torch.testing.assert_close(added[name], total, rtol=0, atol=1e-5 * scale)
        state = fit.advance(state, whole)
        if not isinstance(state, dict):
            break


def test_answers_are_the_same_bytes_each_time():
    bank = build_synthetic_bank(num_experts=4)
    for name in ("evidence", "statistics", "linear"):
        router = load_plugins().routers.resolve(name)
        fit = plan_summed_fit(router, collect_setting([bank], router.Options(), 0))
        state = fit.send(fit.start())
        once, again = (
            answer_round(fit, replace(bank, _derived={}), state, weigh_domains([bank]))
            for _ in range(2)
        )
        assert once.tobytes() == again.tobytes()


def test_share_options_without_a_prior_leave_it_alone():
    bank = build_synthetic_bank(block_size=12)
    found, _ = fit_by_sums(FixedShareRouter, share_out(bank), ShareOptions(prior=False), 0)
    torch.testing.assert_close(found.log_prior, torch.full((3,), -np.log(3)).float())
