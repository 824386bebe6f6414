"""The package's own tests: the conformance kit, and what makes this router this router."""

from dataclasses import replace

import pytest
import torch
from molora_arrow.router import ArrowError, ArrowOptions, ArrowRouter, read_directions

from molora_fed.testing import build_synthetic_bank, check_router_conformance


@pytest.fixture(scope="module")
def bank():
    return build_synthetic_bank(readings=ArrowRouter.readings)


def test_keeps_the_contract():
    check_router_conformance(ArrowRouter)
    check_router_conformance(ArrowRouter, ArrowOptions(sharpness=4.0))


def test_a_direction_is_what_the_product_stretches_most(bank):
    found = read_directions(bank.adapters)["directions"]
    for expert, adapter in zip(found, bank.adapters.values(), strict=True):
        for row, name in zip(expert, bank.adapters.entry.modules, strict=True):
            update = adapter.updates[name]
            product = update.scale * update.b @ update.a
            largest = torch.linalg.matrix_norm(product, 2)
            torch.testing.assert_close((product @ row).norm(), largest, rtol=1e-4, atol=1e-4)


def test_it_prefers_the_expert_whose_adapter_reads_the_state(bank):
    gates = ArrowRouter.fit(bank, ArrowOptions(), seed=0).gates(bank.view(slice(0, 24)))
    own = gates.mean(1)[torch.arange(24), torch.from_numpy(bank.domain_of)]
    assert float(own.mean()) > 1 / 3


def test_neither_text_nor_seed_matter(bank):
    other = build_synthetic_bank(readings=ArrowRouter.readings, seed=9)
    one = ArrowRouter.fit(bank, ArrowOptions(), seed=0).state_tensors()
    two = ArrowRouter.fit(other, ArrowOptions(), seed=1).state_tensors()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_expert_without_an_adapter_scores_what_the_others_do(bank):
    router = ArrowRouter.fit(bank, ArrowOptions(), seed=0)
    tensors = router.state_tensors()
    tensors["directions"] = tensors["directions"].clone()
    tensors["directions"][0] = 0
    view = bank.view(slice(0, 2))
    scores = ArrowRouter(3, ArrowOptions(), tensors).scores(view)
    torch.testing.assert_close(scores[..., 0], scores[..., 1:].mean(-1))


def test_a_base_of_another_form_is_refused_in_one_line(bank):
    entry = replace(bank.adapters.entry, norm=None)
    with pytest.raises(ArrowError, match="expected linear layers that read what enters block K"):
        read_directions(type("Adapters", (), {"entry": entry})())
