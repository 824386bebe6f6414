"""The package's own tests: both conformance kits, and what makes this router this router."""

import pytest
import torch
from molora_phatgoose.gate import Gate, GateOptions
from molora_phatgoose.router import CARRIED, PhatgooseOptions, PhatgooseRouter, collect

from molora_fed.testing import (
    build_carried_context,
    build_synthetic_bank,
    check_carried_files_conformance,
    check_router_conformance,
)

QUICK = GateOptions(steps=5, batch=2, blocks=4)


def test_the_router_keeps_its_contract():
    check_router_conformance(PhatgooseRouter)
    check_router_conformance(PhatgooseRouter, PhatgooseOptions(temperature=0.5, absent=1.0))


def test_the_gate_keeps_its_contract():
    check_carried_files_conformance(Gate, QUICK)


def test_training_lowers_the_loss_and_the_seed_decides():
    losses = []
    context = build_carried_context()
    told = type(context)(
        **{**vars(context), "progress": lambda done, total, **said: losses.append(said)}
    )
    first = Gate(GateOptions(steps=60, batch=4, learning_rate=0.05))(told)["gate"]
    again = Gate(GateOptions(steps=60, batch=4, learning_rate=0.05))(context)["gate"]
    assert torch.equal(first, again) and first.isfinite().all() and len(losses) == 60


def test_gates_open_where_states_lie_along_them():
    width = 16
    directions = torch.eye(3, width) * 5
    carried = {name: {CARRIED: {"gate": row}} for name, row in zip("abc", directions, strict=True)}
    tensors = collect(carried, width)
    router = PhatgooseRouter(3, PhatgooseOptions(), tensors)
    bank = build_synthetic_bank(readings=PhatgooseRouter.readings, hidden_size=width)
    view = bank.view(slice(0, 1)).at(0, 3)
    view.base_hidden[0] = directions
    assert router.gates(view)[0].argmax(-1).tolist() == [0, 1, 2]


@pytest.mark.parametrize("tensors", [None, {}, {"gate": torch.ones(5)}, {"gate": torch.zeros(4)}])
def test_who_carries_no_usable_gate_gets_the_score_of_the_absent(tensors):
    found = collect({"a": {CARRIED: tensors}, "b": {CARRIED: {"gate": torch.randn(4)}}}, 4)
    assert not found["gates_of"][0].any() and found["gates_of"][1].any()
    router = PhatgooseRouter(2, PhatgooseOptions(absent=0.7), found)
    bank = build_synthetic_bank(
        readings=PhatgooseRouter.readings, num_experts=2, hidden_size=4, blocks_per_domain=1
    )
    assert float(router.scores(bank.view(slice(0, 1)))[..., 0].mean()) == pytest.approx(0.7)
