"""The paper's routers beyond the contract: uniform, hard, mlp; curriculum and restarts."""

from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from molora_kalavai.hard import HardRouter
from molora_kalavai.linear import LinearOptions, LinearRouter
from molora_kalavai.mlp import MlpOptions, MlpRouter
from molora_kalavai.uniform import UniformRouter
from pydantic import ValidationError

from molora_fed.bank import HeldOutBank
from molora_fed.errors import RoutingError, ShapeError
from molora_fed.evaluation.evaluate import compute_domain_losses, compute_router_losses
from molora_fed.testing import (
    build_synthetic_bank,
    check_router_conformance,
    permute_experts,
)

FAST = {"steps": 60, "learning_rate": 0.01}


def equal_weight(bank, router):
    losses = compute_domain_losses(bank, compute_router_losses(bank, router).nll)
    return sum(losses.values()) / len(losses)


@pytest.fixture(scope="module")
def bank():
    return build_synthetic_bank()


@pytest.fixture(scope="module")
def held_out():
    return build_synthetic_bank(HeldOutBank, seed=1)


def test_uniform_is_the_evaluators_uniform(held_out):
    router = UniformRouter(3, UniformRouter.Options())
    here, there = (compute_router_losses(held_out, r).nll for r in (router, None))
    assert torch.equal(here, there)


def test_hard_is_the_linear_routers_best_expert_alone(bank, held_out):
    linear, hard = (r.fit(bank, LinearOptions(**FAST), 3) for r in (LinearRouter, HardRouter))
    assert torch.equal(linear.weight, hard.weight)
    rows = slice(0, held_out.num_blocks)
    gates = hard.gates(held_out.view(rows))
    assert set(gates.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(gates.argmax(-1), linear.gates(held_out.view(rows)).argmax(-1))
    alone = torch.stack([held_out.expert_nll(e) for e in range(3)], dim=-1)
    expected = (alone * gates[:, :-1]).sum(-1)
    torch.testing.assert_close(compute_router_losses(held_out, hard).nll, expected)


@pytest.mark.parametrize("reading", ["base_hidden", "prefix_hidden"])
@pytest.mark.parametrize(
    ("router", "options"), [(MlpRouter, MlpOptions), (HardRouter, LinearOptions)]
)
def test_conforms_on_other_inputs_with_curriculum_and_restarts(router, options, reading):
    chosen = options(input=reading, curriculum=0.2, restarts=1, **FAST)
    assert router.reads(chosen) == {reading}
    check_router_conformance(router, chosen)


@pytest.mark.parametrize(
    ("router", "options"),
    [(MlpRouter, MlpOptions(**FAST)), (HardRouter, LinearOptions(**FAST))],
)
def test_permuting_experts_permutes_gates_only(router, options, bank, held_out):
    order, rows = [2, 0, 1], slice(0, held_out.num_blocks)
    here = router.fit(bank, options, 4).gates(held_out.view(rows))
    moved = router.fit(permute_experts(bank, order), options, 4)
    there = moved.gates(permute_experts(held_out, order).view(rows))
    torch.testing.assert_close(there, here[..., order], rtol=1e-2, atol=1e-3)


def bend(bank):
    """The bank with hidden states in which domain 0 lies on both sides of the others."""
    directions = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    domain_of = torch.from_numpy(bank.domain_of)
    side = torch.where(torch.arange(len(domain_of)) % 2 == 0, 3.0, -3.0)
    centre = torch.where(
        (domain_of == 0)[:, None], side[:, None] * directions[0], (domain_of == 1)[:, None] * 0.0
    )
    centre = centre + (domain_of == 2)[:, None] * 3.0 * directions[1]
    noise = torch.randn(bank.base_hidden.shape, generator=torch.Generator().manual_seed(1))
    return replace(bank, base_hidden=centre[:, None] + 0.3 * noise, _derived={})


def test_mlp_tells_apart_what_no_linear_gate_can(bank):
    bent = bend(bank)
    options = {"input": "base_hidden", "steps": 300, "learning_rate": 0.01}
    mlp = compute_router_losses(bent, MlpRouter.fit(bent, MlpOptions(**options), 0)).gates
    linear = compute_router_losses(bent, LinearRouter.fit(bent, LinearOptions(**options), 0)).gates
    assert mlp.diagonal().min() > 0.6
    assert linear.diagonal().min() < 0.5


def test_another_seed_is_another_start(bank):
    options = MlpOptions(steps=1, units=8)
    one, other = (MlpRouter.fit(bank, options, seed) for seed in (0, 1))
    assert one.inner.shape == (8, 16) and one.outer.shape == (3, 8)
    for name in ("inner", "outer"):
        assert (getattr(one, name) - getattr(other, name)).abs().max() > 0.1


class Unlucky(LinearRouter):
    """Its first start is on the wrong side, so that few steps leave it there."""

    starts: ClassVar = []

    @classmethod
    def draw(cls, names, width, options, seed):
        router = super().draw(names, width, options, seed)
        cls.starts.append(seed)
        if seed == 5:
            bank = build_synthetic_bank()
            router.weight.copy_(-4 * bank.mean_hidden.mean(1).reshape(3, 8, 16).mean(1))
        return router


def test_restarts_keep_the_lowest_calibration_loss(bank):
    Unlucky.starts.clear()
    options = LinearOptions(steps=5, learning_rate=0.01)
    alone = Unlucky.fit(bank, options, 5)
    kept = Unlucky.fit(bank, options.model_copy(update={"restarts": 3}), 5)
    assert Unlucky.starts[:2] == [5, 5]
    others = Unlucky.starts[2:]
    assert len(set(others)) == 3 and not {6, 7, 8} & set(others)
    losses = [equal_weight(bank, Unlucky.fit(bank, options, seed)) for seed in others]
    assert equal_weight(bank, kept) == min(losses) < equal_weight(bank, alone)
    again = Unlucky.fit(bank, options.model_copy(update={"restarts": 3}), 5)
    assert torch.equal(kept.weight, again.weight)


def test_no_restarts_and_no_curriculum_are_the_plain_fit(bank):
    plain = LinearRouter.fit(bank, LinearOptions(**FAST), 1)
    said = LinearRouter.fit(bank, LinearOptions(**FAST, restarts=0, curriculum=0.0), 1)
    assert torch.equal(plain.weight, said.weight)
    pure = LinearRouter.fit(bank, LinearOptions(**FAST, curriculum=0.2), 1)
    assert not torch.equal(plain.weight, pure.weight)


def test_progress_of_restarts_is_one_progress(bank):
    seen = []
    options = MlpOptions(steps=50, units=4, restarts=2)
    MlpRouter.fit(bank, options, 0, lambda done, total, **fields: seen.append((done, total)))
    assert seen == [(25 * n, 150) for n in range(1, 7)]


@pytest.mark.parametrize(
    ("options", "values"),
    [
        (LinearOptions, {"curriculum": 1.5}),
        (LinearOptions, {"restarts": -1}),
        (LinearOptions, {"units": 8}),
        (MlpOptions, {"units": 0}),
        (MlpOptions, {"input": "experts_hidden"}),
        (UniformRouter.Options, {"steps": 1}),
    ],
)
def test_senseless_options_are_refused(options, values):
    with pytest.raises(ValidationError):
        options(**values)


def test_options_of_another_router_are_refused(bank):
    with pytest.raises(RoutingError, match="'mlp': expected MlpOptions, got LinearOptions"):
        MlpRouter.fit(bank, LinearOptions(), 0)


@pytest.mark.parametrize(
    ("router", "tensors", "reason"),
    [
        (UniformRouter, {"weight": torch.zeros(1)}, "no tensors, got weight"),
        (HardRouter, {}, "router 'hard': expected weight"),
        (MlpRouter, {}, "got no tensors"),
        (MlpRouter, {"inner": torch.zeros(8, 16)}, "outer"),
        (MlpRouter, {"inner": torch.zeros(8, 16), "outer": torch.zeros(3, 9)}, r"\(3, 9\)"),
        (MlpRouter, {"inner": torch.zeros(8, 16), "outer": torch.zeros(4, 8)}, r"\(4, 8\)"),
        (MlpRouter, {"inner": torch.zeros(8), "outer": torch.zeros(3, 8)}, r"inner \(8\)"),
    ],
)
def test_state_of_another_router_is_refused(router, tensors, reason):
    with pytest.raises(ShapeError, match=reason):
        router(3, router.Options(), tensors)


def test_another_width_is_refused(bank):
    router = MlpRouter(3, MlpOptions(), {"inner": torch.zeros(4, 8), "outer": torch.zeros(3, 4)})
    with pytest.raises(ShapeError, match="'mlp': expected mean_hidden of width 8, got 16"):
        router.gates(bank.view(slice(0, 1)))


def test_the_same_running_mean_is_computed_once(bank, monkeypatch):
    fresh = replace(bank, _derived={})
    for router in (LinearRouter, HardRouter, MlpRouter):
        router.fit(fresh, router.Options(steps=1), 0)
    assert len(fresh._derived) == 1
    assert np.isfinite(next(iter(fresh._derived.values())).numpy()).all()
