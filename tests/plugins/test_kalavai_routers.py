"""What the routers promise beyond the contract: the evidence guarantee, exact equivariance."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from molora_kalavai.evidence import EvidenceOptions, EvidenceRouter, ZeroTrainingEvidenceRouter
from molora_kalavai.linear import LinearOptions, LinearRouter, NoncausalLinearRouter
from pydantic import ValidationError

from molora_fed.bank import HeldOutBank
from molora_fed.bank.mixture import compute_log_gates, compute_probability_nll
from molora_fed.bank.views import RouterView
from molora_fed.errors import RoutingError, ShapeError
from molora_fed.evaluation.evaluate import compute_router_losses
from molora_fed.testing import build_synthetic_bank, permute_experts
from molora_fed.types import Split


def segments(starts):
    """(row, first, last) of every document's part within a block."""
    for row, marks in enumerate(starts.tolist()):
        begins = [t for t, mark in enumerate(marks) if mark or t == 0]
        for first, after in zip(begins, [*begins[1:], len(marks)], strict=True):
            yield row, first, after - 1


@st.composite
def columns(draw):
    batch, length = draw(st.integers(1, 3)), draw(st.integers(2, 24))
    num_experts = draw(st.integers(1, 6))
    numbers = st.floats(-30, 0, width=32)
    logprob = draw(arrays.arrays(np.float32, (batch, length, num_experts), elements=numbers))
    starts = draw(arrays.arrays(np.bool_, (batch, length)))
    starts[:, 0] = True
    return torch.from_numpy(logprob), torch.from_numpy(starts)


@settings(max_examples=150, deadline=None)
@given(columns())
def test_no_document_costs_more_than_its_best_expert_plus_ln_e(case):
    logprob, starts = case
    evidence = logprob.masked_fill(starts[..., None], 0.0)
    router = ZeroTrainingEvidenceRouter(logprob.shape[-1])
    gates = router.gates(RouterView(document_starts=starts, evidence=evidence))
    nll = compute_probability_nll(compute_log_gates(gates), logprob).double()
    allowance = np.log(logprob.shape[-1]) + 1e-3  # rounding of float32 sums of up to 24 * 30
    for row, first, last in segments(starts):
        # Tokens after the first: predicted at positions first .. last - 1.
        inside = slice(first, last)
        best = -logprob[row, first + 1 : last + 1].double().sum(0).max()
        assert nll[row, inside].sum() <= best + allowance
        # The same with the token that begins the next document, where there is one.
        onward = slice(first, min(last + 1, nll.shape[1]))
        best = -logprob[row, first + 1 : last + 2].double().sum(0).max()
        assert nll[row, onward].sum() <= best + allowance


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("prior", [False, True])
def test_fitted_evidence_is_never_worse_than_zero_on_calibration(seed, prior):
    bank = build_synthetic_bank(num_experts=4, seed=seed)
    if seed == 3:  # evidence that misleads: the fit has to leave it
        bank = replace(bank, logprob=bank.logprob.flip(1), _derived={})
    fitted = EvidenceRouter.fit(bank, EvidenceOptions(prior=prior), 0)
    zero = ZeroTrainingEvidenceRouter(4)
    losses = [compute_router_losses(bank, router).nll.mean() for router in (fitted, zero)]
    assert losses[0] <= losses[1] + 1e-6


def test_fitted_evidence_starts_from_the_zero_form():
    bank = build_synthetic_bank()
    view = bank.view(slice(0, 5))
    tensors = {"weights": torch.tensor([1.0, 0.0, 0.0]), "prior": torch.zeros(3)}
    start = EvidenceRouter(3, EvidenceOptions(), tensors)
    torch.testing.assert_close(start.gates(view), ZeroTrainingEvidenceRouter(3).gates(view))


def test_zero_form_is_bayes_rule():
    logprob = torch.log(torch.tensor([[[0.5, 0.5], [0.2, 0.4], [0.9, 0.3], [0.1, 0.2]]]))
    starts = torch.tensor([[True, False, False, True]])
    evidence = logprob.masked_fill(starts[..., None], 0.0)
    view = RouterView(document_starts=starts, evidence=evidence)
    found = ZeroTrainingEvidenceRouter(2).gates(view)[0]
    expected = [[1 / 2, 1 / 2], [1 / 3, 2 / 3], [0.6, 0.4], [1 / 2, 1 / 2]]
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize(
    ("router", "options"),
    [
        (ZeroTrainingEvidenceRouter, None),
        (EvidenceRouter, None),
        (LinearRouter, LinearOptions(steps=60, learning_rate=0.01)),
        (NoncausalLinearRouter, LinearOptions(steps=60, learning_rate=0.01)),
    ],
)
def test_permuting_experts_permutes_gates_only(router, options):
    options = options or router.Options()
    bank, held_out = build_synthetic_bank(), build_synthetic_bank(HeldOutBank, seed=1)
    order, rows = [2, 0, 1], slice(0, held_out.num_blocks)
    here = router.fit(bank, options, 4).gates(held_out.view(rows))
    moved = router.fit(permute_experts(bank, order), options, 4)
    there = moved.gates(permute_experts(held_out, order).view(rows))
    torch.testing.assert_close(there, here[..., order], rtol=1e-2, atol=1e-3)


def test_linear_learns_to_tell_domains_apart():
    bank, held_out = build_synthetic_bank(), build_synthetic_bank(HeldOutBank, seed=1)
    router = LinearRouter.fit(bank, LinearOptions(learning_rate=0.01), 0)
    gates = compute_router_losses(held_out, router).gates
    assert (gates.argmax(1) == np.arange(3)).all()
    assert gates.diagonal().min() > 0.6


def test_another_seed_is_another_start():
    bank = build_synthetic_bank()
    options = LinearOptions(steps=1)
    one, other = (LinearRouter.fit(bank, options, seed).weight for seed in (0, 1))
    assert (one - other).abs().max() > 0.1


def test_noncausal_form_cannot_decode():
    router = NoncausalLinearRouter.fit(build_synthetic_bank(), LinearOptions(steps=1), 0)
    with pytest.raises(RoutingError, match="expected a causal router"):
        router.step(build_synthetic_bank().view(slice(0, 1)), router.init_state(1))


@pytest.mark.parametrize(
    ("options", "values"),
    [
        (LinearOptions, {"input": "evidence"}),
        (LinearOptions, {"temperature": 2}),
        (LinearOptions, {"steps": 0}),
        (EvidenceOptions, {"decays": (0.9,)}),
        (EvidenceOptions, {"decays": (1.0, 1.5)}),
        (EvidenceOptions, {"decays": ()}),
        (ZeroTrainingEvidenceRouter.Options, {"decay": 1}),
    ],
)
def test_senseless_options_are_refused(options, values):
    with pytest.raises(ValidationError):
        options(**values)


@pytest.mark.parametrize(
    ("router", "tensors", "reason"),
    [
        (LinearRouter, {}, "got no tensors"),
        (LinearRouter, {"weight": torch.zeros(4, 8)}, r"\(3, D\), got weight \(4, 8\)"),
        (EvidenceRouter, {"weights": torch.zeros(3)}, "prior"),
        (ZeroTrainingEvidenceRouter, {"weight": torch.zeros(1)}, "no tensors, got weight"),
    ],
)
def test_state_of_another_router_is_refused(router, tensors, reason):
    with pytest.raises(ShapeError, match=reason):
        router(3, router.Options(), tensors)


def test_view_without_the_column_is_refused():
    bank = build_synthetic_bank(readings=frozenset({"base_hidden"}))
    view = bank.view(slice(0, 1))
    with pytest.raises(ShapeError, match="got none"):
        ZeroTrainingEvidenceRouter(3).gates(view)
    with pytest.raises(RoutingError, match="a view with mean_hidden"):
        LinearRouter.fit(bank, LinearOptions(), 0)


def test_linear_of_another_width_is_refused():
    router = LinearRouter(3, LinearOptions(), {"weight": torch.zeros(3, 8)})
    with pytest.raises(ShapeError, match="width 8, got 16"):
        router.gates(build_synthetic_bank().view(slice(0, 1)))


def test_evidence_on_a_logit_bank_is_kept_only_if_it_helps_there(tiny_model, tmp_path):
    from types import SimpleNamespace

    from molora_fed.bank import Expert, build_calibration_bank
    from molora_fed.corpus.blocks import Blocks
    from molora_fed.testing import build_random_adapter

    model = tiny_model()
    tokens = np.random.default_rng(0).integers(0, 257, (6, 16), dtype=np.int32)
    documents = np.zeros_like(tokens)
    blocks = Blocks("noise", Split.CALIBRATION, tokens, documents, documents)
    experts = [Expert(f"e{i}", build_random_adapter(model, seed=i)) for i in range(3)]
    base = SimpleNamespace(model=model, weights="a" * 64, hidden_size=32)
    bank = build_calibration_bank(tmp_path, base, experts, [blocks], mixture="logit")
    fitted = EvidenceRouter.fit(bank, EvidenceOptions(), 0)
    zero = ZeroTrainingEvidenceRouter(3)
    losses = [compute_router_losses(bank, router).nll.mean() for router in (fitted, zero)]
    assert losses[0] <= losses[1] + 1e-6
