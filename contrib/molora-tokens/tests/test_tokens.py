"""The package's own tests: the conformance kit, and what makes this router this router."""

import torch
from molora_tokens.router import TokenOptions, TokenRouter

from molora_fed.testing import build_synthetic_bank, check_router_conformance


def test_keeps_the_contract():
    check_router_conformance(TokenRouter)
    check_router_conformance(TokenRouter, TokenOptions(units=8, steps=40))


def test_a_gate_depends_on_its_own_token_alone():
    bank = build_synthetic_bank(readings=TokenRouter.readings)
    router = TokenRouter.fit(bank, TokenOptions(steps=40), seed=0)
    view = bank.view(slice(0, 4))
    alone = [router.gates(view.at(t, t + 1)) for t in range(view.document_starts.shape[1])]
    torch.testing.assert_close(torch.cat(alone, dim=1), router.gates(view))


def test_it_learns_which_expert_a_state_asks_for():
    bank = build_synthetic_bank(readings=TokenRouter.readings)
    gates = TokenRouter.fit(bank, TokenOptions(), seed=0).gates(bank.view(slice(0, 24)))
    own = gates.mean(1)[torch.arange(24), torch.from_numpy(bank.domain_of)]
    assert float(own.mean()) > 0.5
