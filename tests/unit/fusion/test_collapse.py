"""The collapse guard: what it reports, when it refits, what it keeps."""

import numpy as np
import pytest
import torch
from molora_kalavai.evidence import EvidenceOptions, EvidenceRouter, ZeroTrainingEvidenceRouter
from molora_kalavai.linear import LinearOptions, LinearRouter

from molora_fed.fusion.collapse import (
    SummedJudgement,
    choose_published,
    compute_best_expert_losses,
    fit_guarded,
)
from molora_fed.routing.contract import RouterOptions
from molora_fed.routing.summed_run import (
    answer_round,
    collect_setting,
    unpack_sums,
    weigh_domains,
)
from molora_fed.testing import build_synthetic_bank, take_blocks


@pytest.fixture
def bank():
    return build_synthetic_bank()


class Collapses(LinearRouter):
    """Cannot tell domain 2 from domain 0 on seeds below 9."""

    @classmethod
    def fit(cls, bank, options, seed, progress=None):
        router = super().fit(bank, options, seed, progress)
        if seed < 9:
            router.weight[2] = router.weight[0] - 1e-3 * seed
            router.weight[0] = router.weight[0] * (1 - 1e-3 * seed)
        return router


def test_a_good_router_is_fitted_once(bank):
    found = fit_guarded(LinearRouter, bank, LinearOptions(learning_rate=0.01), 7)
    assert [attempt.seed for attempt in found.attempts] == [7]
    assert found.collapsed == ()
    assert found.kept == 0


def test_a_collapse_is_reported_and_refitted_until_it_is_gone(bank):
    options = LinearOptions(learning_rate=0.01, steps=200)
    found = fit_guarded(Collapses, bank, options, 7, restarts=5)
    assert [attempt.seed for attempt in found.attempts] == [7, 8, 9]
    assert "domain-2" in found.attempts[0].collapsed
    assert found.attempts[0].excess_nats["domain-2"] > 0.05
    assert found.collapsed == ()
    assert found.kept == 2
    assert torch.equal(found.router.weight, LinearRouter.fit(bank, options, 9).weight)


def test_the_best_of_bad_fits_is_kept_and_says_so(bank):
    options = LinearOptions(learning_rate=0.01, steps=200)
    found = fit_guarded(Collapses, bank, options, 2, restarts=2)
    assert len(found.attempts) == 3
    assert "domain-2" in found.collapsed
    assert found.attempts[found.kept].loss_nats == min(a.loss_nats for a in found.attempts)
    report = found.to_json()
    assert report["collapsed"] == list(found.collapsed)
    assert set(report["attempts"][0]) == {"seed", "loss_nats", "excess_nats", "collapsed"}


def test_a_fit_without_chance_is_not_repeated_in_vain(bank):
    strict = {"collapse_nats": 1e-9, "restarts": 5}
    for router, options in (
        (ZeroTrainingEvidenceRouter, ZeroTrainingEvidenceRouter.Options()),
        (EvidenceRouter, EvidenceOptions()),
    ):
        assert isinstance(options, RouterOptions)
        assert len(fit_guarded(router, bank, options, 0, **strict).attempts) == 1


def test_best_expert_of_each_domain(bank):
    losses = compute_best_expert_losses(bank)
    for index, domain in enumerate(bank.domains):
        own = bank.expert_nll(index)[torch.from_numpy(bank.domain_of == index)]
        assert losses[domain] == pytest.approx(own.double().mean().item())


def test_a_router_that_no_refit_saves_is_replaced_by_the_last_resort(bank):
    options = LinearOptions(learning_rate=0.01, steps=200)
    guarded = {
        "collapses": fit_guarded(Collapses, bank, options, 2, restarts=1),
        "good": fit_guarded(LinearRouter, bank, options, 2),
    }
    assert choose_published(guarded, "collapses", "good") == "good"
    assert choose_published(guarded, "good", "collapses") == "good"
    assert choose_published(guarded, "collapses", "not-fitted") == "collapses"
    assert choose_published(guarded, "collapses", "collapses") == "collapses"
    assert choose_published(guarded, "collapses", "") == "collapses"


def test_judgements_of_halves_add_up(bank):
    router = LinearRouter.fit(bank, LinearOptions(steps=5), 0)
    setting, weights = collect_setting([bank], LinearOptions(), 0), weigh_domains([bank])
    judgement = SummedJudgement(setting, LinearRouter, router.state_tensors())
    state = judgement.start()
    entries = judgement.entries(state)
    whole, *halves = (
        answer_round(judgement, part, state, weights)
        for part in (bank, take_blocks(bank, range(0, 24, 2)), take_blocks(bank, range(1, 24, 2)))
    )
    np.testing.assert_allclose(sum(halves), whole, rtol=1e-6)
    best = compute_best_expert_losses(bank)
    found = unpack_sums(whole, entries)["experts"].amin(dim=1)
    assert found.tolist() == pytest.approx([best[domain] for domain in bank.domains], abs=1e-6)
