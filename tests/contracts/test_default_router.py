"""What a new cooperative's router promises, whichever it is: no document costs much more than
under its best expert, on any experts, lengths and texts."""

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from molora_fed.bank import HeldOutBank
from molora_fed.charter import FusionRules
from molora_fed.evaluation.evaluate import compute_excess, compute_router_losses, evaluate
from molora_fed.plugins import get_plugins
from molora_fed.routing.top_k import limit_experts
from molora_fed.testing import build_synthetic_bank

DEFAULT = FusionRules().router
EARLIER = "evidence"  # the default before, which promises nothing
ROUNDING = 2e-3  # of float32 sums of up to 40 * 30 nats


@cache
def fit(name, num_experts, seed):
    """A router fitted on a bank whose experts are good at domains of their own."""
    bank = build_synthetic_bank(num_experts=num_experts, seed=seed)
    router = get_plugins().routers.resolve(name)
    return router.fit(bank, router.Options(), seed)


def build_bank(logprob, starts):
    """A held-out bank of these numbers alone; (N, T, E) and (N, T)."""
    rows, length, num_experts = logprob.shape
    bank = build_synthetic_bank(HeldOutBank, num_experts=num_experts, blocks_per_domain=1)
    logprob = torch.from_numpy(logprob)
    return replace(
        bank,
        tokens=torch.zeros(rows, length, dtype=bank.tokens.dtype),
        document_starts=torch.from_numpy(starts),
        clusters=np.zeros((rows, length), dtype=np.int64),
        domains=bank.domains[:1],
        domain_of=np.zeros(rows, dtype=np.int64),
        base_logprob=logprob[..., 0],
        logprob=logprob,
        readings=frozenset({"evidence"}),
        _derived={},
    )


def find_largest_excess(name, logprob, starts, seed=0):
    bank = build_bank(logprob, starts)
    nll = compute_router_losses(bank, fit(name, logprob.shape[-1], seed)).nll
    return max(compute_excess(bank, nll).tolist(), default=-math.inf)


def start_blocks(shape):
    starts = np.zeros(shape, dtype=np.bool_)
    starts[:, 0] = True
    return starts


@st.composite
def texts(draw):
    """Log-probabilities of any experts on any documents."""
    rows, length = draw(st.integers(1, 3)), draw(st.integers(2, 40))
    num_experts = draw(st.integers(2, 6))
    numbers = st.floats(-30, 0, width=32)
    logprob = draw(arrays.arrays(np.float32, (rows, length, num_experts), elements=numbers))
    starts = draw(arrays.arrays(np.bool_, (rows, length)))
    starts[:, 0] = True
    return logprob, starts


@st.composite
def hard_texts(draw):
    """One document each whose experts lead by turns, steadily or by little, to mislead a router."""
    length, num_experts = draw(st.integers(2, 120)), draw(st.integers(2, 6))
    lead, period = draw(st.floats(0, 5)), draw(st.integers(1, 120))
    leader = (np.arange(length) // period + draw(st.integers(0, 5))) % num_experts
    logprob = np.full((1, length, num_experts), -6.0, dtype=np.float32)
    logprob[0, np.arange(length), leader] += np.float32(lead)
    return logprob, start_blocks((1, length))


@settings(max_examples=100, deadline=None)
@given(st.one_of(texts(), hard_texts()), st.integers(0, 2))
def test_no_document_costs_more_than_promised(case, seed):
    logprob, starts = case
    bound = get_plugins().routers.resolve(DEFAULT).bound_excess(logprob.shape[-1])
    assert bound <= math.log(logprob.shape[-1]) + math.log(2) + 1e-9
    excess = find_largest_excess(DEFAULT, logprob, starts, seed)
    assert excess <= bound + ROUNDING


def test_the_earlier_default_exceeds_what_is_promised_now():
    # Experts lead by turns: whoever trusts the last leader too much is wrong at every token.
    length, num_experts = 200, 4
    logprob = np.full((1, length, num_experts), -6.0, dtype=np.float32)
    logprob[0, np.arange(length), np.arange(length) % num_experts] += 3
    starts = start_blocks((1, length))
    bound = get_plugins().routers.resolve(DEFAULT).bound_excess(num_experts)
    assert get_plugins().routers.resolve(EARLIER).bound_excess(num_experts) is None
    assert find_largest_excess(EARLIER, logprob, starts) > bound + 100
    assert find_largest_excess(DEFAULT, logprob, starts) <= bound + ROUNDING


def test_a_limit_of_experts_promises_nothing():
    router = get_plugins().routers.resolve(DEFAULT)
    assert limit_experts(router, 2).bound_excess(4) is None


@pytest.mark.parametrize("mixture", ["probability", "logit"])
def test_a_report_says_what_is_promised_under_its_mixture(mixture):
    bank = replace(build_synthetic_bank(HeldOutBank, seed=1), mixture=mixture)
    if mixture == "logit":
        bank = replace(bank, readout=None)  # losses of the other mixture do for what is promised
    router = fit(DEFAULT, bank.num_experts, 0)
    found = evaluate(bank, {DEFAULT: router}).to_json()["excess_nats"][DEFAULT]
    promised = router.bound_excess(bank.num_experts) if mixture == "probability" else None
    assert found["bound"] == promised
    assert found["largest"] <= router.bound_excess(bank.num_experts) + ROUNDING
    starts = bank.document_starts
    within = (~starts[:, 1:]).sum()
    assert 0 < found["parts"] <= within
