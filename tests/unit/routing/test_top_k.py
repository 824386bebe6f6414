"""The top-k wrapper: its arithmetic, around every router, in fused models and while decoding."""

import pytest
import torch
from fused_helpers import NoncausalRouter, ProbeRouter, build_fused, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from molora_kalavai.uniform import UniformRouter
from pydantic import ValidationError

from molora_fed.charter import FusionRules
from molora_fed.errors import RoutingError
from molora_fed.inference.fused_build import build_causal_lm
from molora_fed.inference.generate import Sampling, decode_tokens
from molora_fed.models.base import load_base
from molora_fed.plugins import load_plugins
from molora_fed.routing.fused import FusedModel
from molora_fed.routing.top_k import keep_top_k, limit_experts
from molora_fed.testing import build_synthetic_bank, check_router_conformance

ROUTERS = load_plugins().routers


@st.composite
def gates_and_k(draw):
    num_experts = draw(st.integers(1, 7))
    # Few distinct numbers, so that ties are common.
    rows = st.lists(st.integers(0, 3), min_size=num_experts, max_size=num_experts).filter(any)
    table = torch.tensor(draw(st.lists(rows, min_size=1, max_size=4)), dtype=torch.float32)
    return table / table.sum(-1, keepdim=True), draw(st.integers(1, 9))


@settings(max_examples=200, deadline=None)
@given(gates_and_k())
def test_the_largest_gates_stay_in_proportion_and_sum_to_one(case):
    gates, top_k = case
    kept = keep_top_k(gates, top_k)
    assert ((kept > 0).sum(-1) <= top_k).all()
    torch.testing.assert_close(kept.sum(-1), torch.ones(len(gates)))
    for before, after in zip(gates, kept, strict=True):
        chosen = after > 0
        assert bool(chosen.all()) or before[chosen].min() >= before[~chosen].max()
        torch.testing.assert_close(after[chosen] * before[chosen].sum(), before[chosen])
    torch.testing.assert_close(keep_top_k(kept, top_k), kept)


def test_as_many_as_there_are_changes_nothing():
    gates = torch.softmax(torch.randn(2, 5, 3), dim=-1)
    for top_k in (3, 4, 99):
        assert torch.equal(keep_top_k(gates, top_k), gates)


def test_of_equal_gates_the_first_stay():
    kept = keep_top_k(torch.full((1, 4), 0.25), 2)
    assert kept.tolist() == [[0.5, 0.5, 0, 0]]


# Uniform gates have no best expert: which ones stay depends on their order, as it must. How many
# stay is the wrapper's matter, and not the router's: one that sees the future, one that does not.
@pytest.mark.parametrize(
    ("name", "top_k"),
    [
        *((name, 2) for name in sorted(set(ROUTERS.names()) - {"uniform"})),
        *((name, 1) for name in ("evidence", "linear-noncausal")),
    ],
)
def test_every_limited_router_conforms(name, top_k):
    check_router_conformance(limit_experts(ROUTERS.resolve(name), top_k))


def test_a_limited_router_is_the_same_class_each_time_and_fitted_as_the_other():
    router = ROUTERS.resolve("evidence")
    limited = limit_experts(router, 2)
    assert limited is limit_experts(router, 2)
    assert limited is not limit_experts(router, 1)
    assert limited.__name__ == "EvidenceRouterTop2"
    bank = build_synthetic_bank()
    one, other = (r.fit(bank, r.Options(), 0) for r in (router, limited))
    for name, tensor in one.state_tensors().items():
        assert torch.equal(tensor, other.state_tensors()[name])
    view = bank.view(slice(0, 4))
    assert torch.equal(other.scores(view), one.scores(view))
    assert torch.equal(other.gates(view), keep_top_k(one.gates(view), 2))


def test_senseless_limits_are_refused():
    with pytest.raises(RoutingError, match="at least 1 expert, got 0"):
        limit_experts(UniformRouter, 0)
    with pytest.raises(ValidationError, match="top_k"):
        FusionRules(top_k=0)


@pytest.fixture(scope="module")
def base(tiny_checkpoint):
    return load_base(tiny_checkpoint())


def limit(fused, router, top_k):
    """The fused model with its router in the wrapper."""
    tensors = fused.router.state_tensors()
    limited = limit_experts(router, top_k)(fused.router.num_experts, fused.router.options, tensors)
    parts = (fused.router_name, fused.mixture, fused.frozen_depth)
    return FusedModel(fused.base, fused.experts, limited, *parts)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("mixture", ["probability", "logit"])
def test_decoding_with_top_k_equals_the_full_form(base, mixture, top_k):
    fused = limit(
        build_fused(base, columns=("base_hidden", "evidence"), mixture=mixture), ProbeRouter, top_k
    )
    prompt = random_tokens(2, 9)
    tokens, gates = decode_tokens(build_causal_lm(fused), prompt, Sampling(max_new_tokens=8))
    full = build_causal_lm(fused)(torch.cat([prompt, tokens], dim=1)[:, :-1])
    torch.testing.assert_close(gates, full.gates[:, 8:], atol=1e-4, rtol=1e-4)
    assert ((gates > 0).sum(-1) <= top_k).all()
    assert torch.isfinite(full.logits).all()


def test_top_one_is_the_expert_alone(base):
    fused = limit(build_fused(base, columns=("base_hidden",)), ProbeRouter, 1)
    tokens = random_tokens(1, 10)
    output = build_causal_lm(fused)(tokens)
    chosen = output.gates.argmax(-1)[0]
    for expert in chosen.unique().tolist():
        model = FusedModel(
            fused.base, (fused.experts[expert],), UniformRouter(1, UniformRouter.Options()),
            "uniform", "probability", fused.frozen_depth,
        )  # fmt: skip
        alone = build_causal_lm(model)(tokens).logits
        at = chosen == expert
        torch.testing.assert_close(output.logits[0, at], alone[0, at], atol=1e-4, rtol=0)


def test_a_limited_noncausal_router_cannot_decode(base):
    drawn = build_fused(base, columns=("base_hidden",))
    fused = limit(drawn, NoncausalRouter, 2)
    with pytest.raises(RoutingError, match="expected a causal router"):
        decode_tokens(build_causal_lm(fused), random_tokens(1, 4), Sampling(max_new_tokens=2))
