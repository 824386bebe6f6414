"""Fixed share and its guarantee; hidden states beside evidence, used only where they help."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from molora_kalavai.evidence import EvidenceOptions, EvidenceRouter, ZeroTrainingEvidenceRouter
from molora_kalavai.evidence_hidden import EvidenceHiddenOptions, EvidenceHiddenRouter
from molora_kalavai.evidence_share import FixedShareRouter, ShareOptions

from molora_fed.bank import CalibrationBank, HeldOutBank
from molora_fed.bank.mixture import compute_log_gates, compute_probability_nll
from molora_fed.bank.views import RouterView
from molora_fed.errors import RoutingError, ShapeError
from molora_fed.evaluation.evaluate import compute_router_losses
from molora_fed.routing.fitting import fit_on_whole
from molora_fed.testing import build_synthetic_bank, check_router_conformance, permute_experts


def make_share(rate, power, prior):
    tensors = {
        "rate": torch.tensor(rate),
        "power": torch.tensor(power),
        "log_prior": torch.tensor(prior).log(),
    }
    return FixedShareRouter(len(prior), ShareOptions(), tensors)


def find_best_sequence(logprob, rate, power, prior):
    """Lowest loss plus penalty of any sequence of experts over predicted tokens, by Viterbi."""
    stay, arrive = -np.log1p(-rate), -np.log(rate * prior)
    cost = -np.log(prior) / power - logprob[0]
    for token in logprob[1:]:
        reached = np.minimum(cost + stay / power, (cost.min() + arrive / power))
        cost = reached - token
    return cost.min()


@st.composite
def documents(draw):
    num_experts, length = draw(st.integers(1, 5)), draw(st.integers(2, 20))
    numbers = st.floats(-20, 0, width=32)
    logprob = draw(arrays.arrays(np.float32, (length, num_experts), elements=numbers))
    prior = np.array([draw(st.floats(0.05, 1.0)) for _ in range(num_experts)])
    rate, power = draw(st.floats(0.001, 0.9)), draw(st.floats(0.1, 1.0))
    return logprob, rate, power, prior / prior.sum()


@settings(max_examples=150, deadline=None)
@given(documents())
def test_no_document_costs_more_than_any_sequence_of_experts_plus_its_switches(case):
    logprob, rate, power, prior = case
    columns = torch.from_numpy(logprob)[None]
    starts = torch.zeros(columns.shape[:2], dtype=torch.bool)
    starts[:, 0] = True
    view = RouterView(document_starts=starts, evidence=columns.masked_fill(starts[..., None], 0.0))
    gates = make_share(rate, power, prior.tolist()).gates(view)
    loss = compute_probability_nll(compute_log_gates(gates), columns).double().sum()
    best = find_best_sequence(logprob[1:].astype(np.float64), rate, power, prior)
    assert loss <= best + 1e-2


def test_without_switches_it_is_the_zero_form():
    view = build_synthetic_bank().view(slice(0, 6))
    share = make_share(0.0, 1.0, [1 / 3] * 3)
    torch.testing.assert_close(share.gates(view), ZeroTrainingEvidenceRouter(3).gates(view))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("prior", [False, True])
def test_fixed_share_is_never_worse_than_zero_on_calibration(seed, prior):
    bank = build_synthetic_bank(num_experts=4, seed=seed)
    if seed == 2:  # evidence that misleads: the fit has to leave it
        bank = replace(bank, logprob=bank.logprob.flip(1), _derived={})
    fitted = FixedShareRouter.fit(bank, ShareOptions(prior=prior), 0)
    losses = [
        compute_router_losses(bank, router).nll.mean()
        for router in (fitted, ZeroTrainingEvidenceRouter(4))
    ]
    assert losses[0] <= losses[1] + 1e-6


def build_switching_bank(kind, seed):
    """Blocks of one document each, whose best expert changes in the middle."""
    bank = build_synthetic_bank(kind, block_size=60, blocks_per_domain=6, seed=seed)
    starts = torch.zeros_like(bank.document_starts)
    starts[:, 0] = True
    logprob = bank.logprob.clone()
    logprob[:, 30:] = logprob[:, 30:].roll(1, dims=-1)
    return replace(bank, document_starts=starts, logprob=logprob, _derived={})


def test_a_switching_rate_is_found_where_documents_switch():
    bank = build_switching_bank(CalibrationBank, 0)
    held_out = build_switching_bank(HeldOutBank, 1)
    share = FixedShareRouter.fit(bank, ShareOptions(), 0)
    zero = ZeroTrainingEvidenceRouter(3)
    found, plain = (compute_router_losses(held_out, r).nll.mean() for r in (share, zero))
    assert 0.003 < float(share.rate) < 0.2
    assert found < plain - 0.02


def build_noisy_bank(kind=CalibrationBank, *, seed=0, informative=True):
    """Experts hardly differ, so evidence is slow; hidden states tell domains, or nothing."""
    bank = build_synthetic_bank(kind, blocks_per_domain=20, seed=seed)
    own = torch.from_numpy(bank.domain_of)[:, None, None] == torch.arange(3)
    generator = torch.Generator().manual_seed(seed + 7)
    noise = torch.rand(bank.logprob.shape, generator=generator)
    logprob = 0.5 * own - 3 - 3 * noise  # losses vary more than experts differ
    hidden = bank.base_hidden
    if not informative:
        hidden = torch.randn(hidden.shape, generator=generator)
    clusters = np.arange(bank.num_blocks)[:, None] + 0 * bank.clusters
    return replace(bank, logprob=logprob, base_hidden=hidden, clusters=clusters, _derived={})


def test_hidden_states_that_help_are_used():
    bank, held_out = build_noisy_bank(), build_noisy_bank(HeldOutBank, seed=1)
    router = EvidenceHiddenRouter.fit(bank, EvidenceHiddenOptions(), 0)
    alone = EvidenceRouter.fit(bank, EvidenceOptions(), 0)
    assert router.uses_hidden
    found, plain = (compute_router_losses(held_out, r).nll.mean() for r in (router, alone))
    assert found < plain - 0.01


@pytest.mark.parametrize("seed", range(3))
def test_hidden_states_that_say_nothing_are_left_out(seed):
    bank = build_noisy_bank(seed=seed, informative=False)
    router = EvidenceHiddenRouter.fit(bank, EvidenceHiddenOptions(), 0)
    alone = EvidenceRouter.fit(bank, EvidenceOptions(), 0)
    assert not router.uses_hidden
    view = bank.view(slice(0, 5))
    torch.testing.assert_close(router.gates(view), alone.gates(view))


def test_one_block_a_domain_decides_for_evidence_alone():
    bank = build_synthetic_bank(blocks_per_domain=1)
    assert not EvidenceHiddenRouter.fit(bank, EvidenceHiddenOptions(), 0).uses_hidden


def test_shared_clusters_are_no_second_opinion():
    bank = build_noisy_bank()
    same = replace(bank, clusters=bank.domain_of[:, None] + 0 * bank.clusters, _derived={})
    assert not EvidenceHiddenRouter.fit(same, EvidenceHiddenOptions(), 0).uses_hidden


@pytest.mark.parametrize("router", [FixedShareRouter, EvidenceHiddenRouter])
def test_permuting_experts_permutes_gates_only(router):
    bank, held_out = build_synthetic_bank(), build_synthetic_bank(HeldOutBank, seed=1)
    order, rows = [2, 0, 1], slice(0, held_out.num_blocks)
    options = router.Options()
    here = router.fit(bank, options, 0).gates(held_out.view(rows))
    moved = router.fit(permute_experts(bank, order), options, 0)
    there = moved.gates(permute_experts(held_out, order).view(rows))
    torch.testing.assert_close(there, here[..., order], rtol=1e-2, atol=2e-3)


def test_other_options_conform():
    check_router_conformance(FixedShareRouter, ShareOptions(prior=False))
    options = EvidenceHiddenOptions(decays=(1.0, 0.5), prior=False, input="prefix_hidden")
    check_router_conformance(EvidenceHiddenRouter, options)


def test_fitting_some_blocks_is_fitting_a_bank_of_them():
    bank = build_synthetic_bank(readings=frozenset({"evidence"}))
    rows = torch.tensor([0, 3, 9, 11, 12, 17, 20, 22, 23])
    part = replace(
        bank,
        **{
            name: getattr(bank, name)[rows]
            for name in ("tokens", "document_starts", "base_logprob", "logprob")
        },
        clusters=bank.clusters[rows.numpy()],
        domain_of=bank.domain_of[rows.numpy()],
        _derived={},
    )
    fits = []
    for each, chosen in ((bank, rows), (part, None)):
        features = each.view(slice(0, each.num_blocks)).evidence
        weight = torch.ones(3)
        loss = fit_on_whole(
            each, features, [weight], lambda f, w=weight: f * w, iterations=9, rows=chosen
        )
        fits.append((loss, weight))
    assert fits[0][0] == pytest.approx(fits[1][0], abs=1e-6)
    torch.testing.assert_close(fits[0][1], fits[1][1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("router", "reason"),
    [(FixedShareRouter, "log_prior"), (EvidenceHiddenRouter, "weights")],
)
def test_state_of_another_router_is_refused(router, reason):
    with pytest.raises(ShapeError, match=reason):
        router(3, router.Options(), {"weight": torch.zeros(1)})
    with pytest.raises(RoutingError, match="Options, got"):
        router.fit(build_synthetic_bank(), ZeroTrainingEvidenceRouter.Options(), 0)
