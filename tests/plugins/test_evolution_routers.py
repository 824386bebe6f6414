import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from molora_evolution.routers import (
    ParallelSigmoidOptions,
    ParallelSigmoidRouter,
    SoftmaxEmbeddingMeanOptions,
    SoftmaxEmbeddingMeanRouter,
)
from pydantic import ValidationError

from molora_fed.bank.views import GateView
from molora_fed.errors import PopulationError, ShapeError
from molora_fed.testing import build_synthetic_view

SLOTS, WIDTH = 5, 8
UNDONE = {"competition": "softmax", "floor": 0, "anneal": False, "input": "embeddings"}


def build(seed=3, **options):
    router = ParallelSigmoidRouter.build(SLOTS, WIDTH, ParallelSigmoidOptions(**options), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for values in router.parameters():
            values.copy_(torch.randn(values.shape, generator=generator))
    return router


def test_the_rewrite_is_its_formula():
    router, view = build(floor=0.4, hot=3.0, cold=1.0), build_synthetic_view()
    router.set_progress(0.5)
    state = view.base_hidden / view.base_hidden.square().mean(-1, keepdim=True).sqrt()
    scores = (state @ router.weight.T + router.bias) / 3.0**0.5
    floor = 0.4 * torch.sigmoid(router.floor_score)
    expected = floor + (1 - floor) * torch.sigmoid(scores)
    assert torch.allclose(router(view), expected, atol=1e-6)


def test_the_old_router_is_the_rewrite_with_every_part_undone():
    undone = ParallelSigmoidRouter.build(SLOTS, WIDTH, ParallelSigmoidOptions(**UNDONE), 7)
    old = SoftmaxEmbeddingMeanRouter.build(SLOTS, WIDTH, SoftmaxEmbeddingMeanOptions(), 7)
    view = build_synthetic_view()
    for share in (0.0, 1.0):
        undone.set_progress(share)
        old.set_progress(share)
        assert torch.equal(old(view), undone(view))
    assert old.state_dict().keys() == undone.state_dict().keys()
    assert torch.allclose(old(view).sum(-1), torch.ones(3, 12))


@pytest.mark.parametrize("part", UNDONE)
def test_each_part_alone_changes_the_gates(part):
    view = build_synthetic_view()
    changed = build(**{part: UNDONE[part]})
    assert not torch.allclose(changed(view), build()(view))


@given(st.floats(0, 1), st.floats(0.05, 2), st.floats(1, 4))
@settings(max_examples=50, deadline=None)
def test_the_temperature_stays_within_its_bounds_and_falls(share, cold, ratio):
    router = build(hot=cold * ratio, cold=cold)
    router.set_progress(share)
    bounds = torch.tensor([cold, cold * ratio])
    assert bounds[0] <= router.temperature <= bounds[1]
    router.set_progress(1.0)
    assert router.temperature == bounds[0]


@given(st.floats(0, 0.999), st.floats(-60, 60), st.floats(-60, 60))
@settings(max_examples=60, deadline=None)
def test_gates_lie_between_the_floor_and_1(floor, score, floor_score):
    router = build(floor=floor, anneal=False)
    with torch.no_grad():
        router.weight.zero_()
        router.bias.fill_(score)
        if floor > 0:
            router.floor_score.fill_(floor_score)
    gates = router(build_synthetic_view())
    lowest = floor * torch.sigmoid(torch.tensor(floor_score))
    assert bool((gates <= 1).all()) and bool((gates >= lowest * (1 - 1e-6)).all())


def test_the_size_of_the_states_does_not_matter():
    view = build_synthetic_view()
    larger = GateView(view.document_starts, 30 * view.base_hidden, 0.01 * view.embeddings)
    for options in ({}, {"input": "embeddings"}):
        router = build(**options)
        assert torch.allclose(router(larger), router(view), atol=1e-5)


def test_states_in_half_precision_and_all_zero_are_read():
    view = build_synthetic_view()
    assert build()(GateView(view.document_starts, view.base_hidden.bfloat16())).dtype == (
        torch.float32
    )
    zero = build()(GateView(view.document_starts, torch.zeros_like(view.base_hidden)))
    assert bool(zero.isfinite().all())


def test_a_new_slot_leaves_the_others_alone_and_starts_like_any_fresh_one():
    router = build()
    before = {name: values.clone() for name, values in router.named_parameters()}
    router.reset_slot(2, None, seed=9)
    others = [0, 1, 3, 4]
    for name, values in router.named_parameters():
        assert torch.equal(values[others], before[name][others])
    fresh = ParallelSigmoidRouter.build(3, WIDTH, ParallelSigmoidOptions(), 9)
    assert torch.equal(router.weight[2], fresh.weight[2])
    router.reset_slot(4, 2, seed=0)
    assert torch.equal(router.weight[4], router.weight[2])


def test_it_says_what_it_lacks():
    view = build_synthetic_view()
    with pytest.raises(ShapeError, match=r"expected 'base_hidden' of width 8.*got none"):
        build()(GateView(view.document_starts, embeddings=view.embeddings))
    with pytest.raises(ShapeError, match="got width 4"):
        build()(GateView(view.document_starts, view.base_hidden[..., :4]))
    with pytest.raises(PopulationError, match=r"from 0 to 1, got 1\.5"):
        build().set_progress(1.5)
    with pytest.raises(PopulationError, match="slots from 0 to 4, got 5"):
        build().reset_slot(5, None, 0)


@pytest.mark.parametrize(
    "options", [{"floor": 1.0}, {"hot": 0.1}, {"cold": 0}, {"input": "tokens"}, {"warm": 1}]
)
def test_wrong_options_are_refused(options):
    with pytest.raises(ValidationError):
        ParallelSigmoidOptions(**options)
