"""The dispatch router: one expert a document, decided once, from the first tokens."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from molora_kalavai.dispatch import DispatchOptions, DispatchRouter
from pydantic import ValidationError

from molora_fed.bank import HeldOutBank
from molora_fed.bank.views import RouterView
from molora_fed.errors import RoutingError, ShapeError
from molora_fed.evaluation.evaluate import compute_domain_losses, compute_router_losses
from molora_fed.fusion.collapse import fit_guarded
from molora_fed.testing import build_synthetic_bank, check_router_conformance, permute_experts


@pytest.fixture(scope="module")
def bank():
    return build_synthetic_bank(blocks_per_domain=16)


@pytest.fixture(scope="module")
def held_out():
    return build_synthetic_bank(HeldOutBank, seed=1, blocks_per_domain=16)


@pytest.mark.parametrize("read_tokens", [1, 4, 24])
@pytest.mark.parametrize("reading", ["base_hidden", "prefix_hidden"])
def test_conforms(read_tokens, reading):
    check_router_conformance(
        DispatchRouter, DispatchOptions(input=reading, read_tokens=read_tokens)
    )


def build_router(read_tokens, num_experts=3):
    """Domain d is told by coordinate d; expert d is best there, expert 0 on all together."""
    losses = torch.full((3, num_experts), 3.0)
    losses.fill_diagonal_(1.0)
    losses[:, 0] -= 0.5
    losses[:, 1] -= 0.01  # so that no two experts tie
    tensors = {"weight": 50 * torch.eye(3), "bias": torch.zeros(3), "losses": losses}
    return DispatchRouter(num_experts, DispatchOptions(read_tokens=read_tokens), tensors)


@st.composite
def texts(draw):
    length = draw(st.integers(1, 30))
    starts = draw(arrays.arrays(np.bool_, (2, length)))
    starts[:, 0] = True
    which = draw(arrays.arrays(np.int64, (2, length), elements=st.integers(0, 2)))
    hidden = torch.nn.functional.one_hot(torch.from_numpy(which), 3).float()
    return RouterView(document_starts=torch.from_numpy(starts), base_hidden=hidden)


@settings(max_examples=150, deadline=None)
@given(texts(), st.integers(1, 6))
def test_an_expert_is_chosen_at_the_nth_token_and_stays(view, read_tokens):
    router = build_router(read_tokens)
    chosen = router.gates(view).argmax(-1)
    for row in range(2):
        count, decision = 0, 0
        for t in range(view.document_starts.shape[1]):
            if view.document_starts[row, t]:
                count, decision = 0, 0
            count += 1
            if count == read_tokens:
                votes = view.base_hidden[row, t - count + 1 : t + 1].sum(0)
                posterior = torch.softmax(50 * votes / count, dim=-1)
                decision = int((posterior @ router.losses).argmin())
            assert chosen[row, t] == decision


def test_every_document_runs_two_experts_at_most(bank, held_out):
    router = DispatchRouter.fit(bank, DispatchOptions(read_tokens=4), 0)
    gates = router.gates(held_out.view(slice(0, held_out.num_blocks)))
    assert set(gates.unique().tolist()) == {0.0, 1.0}
    chosen, starts = gates.argmax(-1), held_out.document_starts
    changes = (chosen[:, 1:] != chosen[:, :-1]) & ~starts[:, 1:]
    documents = starts.cumsum(1)
    for row in range(len(chosen)):
        at = documents[row, 1:][changes[row]]
        assert len(at) == len(at.unique())


def test_it_finds_the_domains_expert(bank, held_out):
    router = DispatchRouter.fit(bank, DispatchOptions(read_tokens=3), 0)
    gates = compute_router_losses(held_out, router).gates
    assert (gates.argmax(1) == np.arange(3)).all()
    assert gates.diagonal().min() > 0.6


def test_before_the_nth_token_the_best_on_all_domains_writes(bank, held_out):
    worse = bank.logprob.clone()
    worse[..., 1] += 0.5  # expert 1 is best on all together
    better = replace(bank, logprob=worse, _derived={})
    losses = [
        np.mean(list(compute_domain_losses(better, better.expert_nll(e)).values()))
        for e in range(3)
    ]
    assert int(np.argmin(losses)) == 1
    router = DispatchRouter.fit(better, DispatchOptions(read_tokens=5), 0)
    chosen = router.gates(held_out.view(slice(0, 8))).argmax(-1)
    starts = held_out.document_starts[:8]
    for offset in range(4):
        at = torch.zeros_like(starts)
        at[:, offset:] = starts[:, : starts.shape[1] - offset]
        for later in range(offset):
            recent = torch.zeros_like(starts)
            recent[:, later:] = starts[:, : starts.shape[1] - later]
            at &= ~recent
        assert (chosen[at] == 1).all()


def test_the_classifier_is_at_the_penalised_optimum(bank):
    """The gradient of the stated loss, by autograd, is 0 at what was fitted."""
    options = DispatchOptions(read_tokens=4, penalty=0.05)
    router = DispatchRouter.fit(bank, options, 0)
    from molora_kalavai.dispatch import _collect_samples

    samples, domain_of = _collect_samples(bank, options)
    inputs, targets = torch.from_numpy(samples), torch.from_numpy(domain_of)
    mean, scale = inputs.mean(0), inputs.std(0, correction=0)
    weight = (router.weight.double() * scale).requires_grad_(True)
    bias = (router.bias.double() + router.weight.double() @ mean).requires_grad_(True)
    logits = (inputs - mean) / scale @ weight.T + bias
    nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    by_domain = torch.stack([nll[targets == d].mean() for d in range(3)]).mean()
    (by_domain + 0.025 * weight.square().sum()).backward()
    assert weight.grad.abs().max() < 1e-3
    assert bias.grad.abs().max() < 1e-3


def test_a_domain_of_short_documents_is_never_guessed():
    bank = build_synthetic_bank(num_experts=3)
    starts = bank.document_starts.clone()
    starts[torch.from_numpy(bank.domain_of == 2)] = True
    router = DispatchRouter.fit(
        replace(bank, document_starts=starts, _derived={}), DispatchOptions(read_tokens=4), 0
    )
    assert torch.isfinite(router.weight).all()
    posterior = torch.softmax(bank.base_hidden.mean(1) @ router.weight.T + router.bias, -1)
    assert (posterior[:, 2] == 0).all()


def test_without_long_documents_the_best_alone_is_used():
    bank = build_synthetic_bank()
    router = DispatchRouter.fit(bank, DispatchOptions(read_tokens=999), 0)
    gates = router.gates(bank.view(slice(0, bank.num_blocks)))
    assert len(gates.argmax(-1).unique()) == 1


def test_permuting_experts_permutes_gates_only(bank, held_out):
    order, rows = [2, 0, 1], slice(0, held_out.num_blocks)
    options = DispatchOptions(read_tokens=4)
    here = DispatchRouter.fit(bank, options, 4).gates(held_out.view(rows))
    moved = DispatchRouter.fit(permute_experts(bank, order), options, 4)
    there = moved.gates(permute_experts(held_out, order).view(rows))
    assert torch.equal(there, here[..., order])


def test_the_guard_fits_it_once(bank):
    found = fit_guarded(DispatchRouter, bank, DispatchOptions(), 0, collapse_nats=1e-9)
    assert len(found.attempts) == 1


@pytest.mark.parametrize(
    "values",
    [{"read_tokens": 0}, {"input": "mean_hidden"}, {"penalty": 0}, {"steps": 5}],
)
def test_senseless_options_are_refused(values):
    with pytest.raises(ValidationError):
        DispatchOptions(**values)


def state(domains=3, width=16, num_experts=3, **changed):
    tensors = {
        "weight": torch.zeros(domains, width),
        "bias": torch.zeros(domains),
        "losses": torch.zeros(domains, num_experts),
        **changed,
    }
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        state(bias=None),
        state(num_experts=4),
        state(bias=torch.zeros(2)),
        state(weight=torch.zeros(16)),
        state(domains=0),
        state(more=torch.zeros(1)),
    ],
)
def test_state_of_another_router_is_refused(tensors):
    with pytest.raises(ShapeError, match="Cannot load router 'dispatch'"):
        DispatchRouter(3, DispatchOptions(), tensors)


def test_another_width_or_no_column_is_refused(bank):
    router = DispatchRouter(3, DispatchOptions(), state(width=8))
    with pytest.raises(ShapeError, match="base_hidden of width 8, got 16"):
        router.gates(bank.view(slice(0, 1)))
    with pytest.raises(RoutingError, match="'dispatch': expected a view with base_hidden"):
        router.gates(RouterView(document_starts=bank.document_starts[:1]))
