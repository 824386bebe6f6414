"""Fits by sums: what is sent and added, what is refused, and who takes part."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from molora_kalavai.evidence import EvidenceOptions, EvidenceRouter, ZeroTrainingEvidenceRouter
from molora_kalavai.linear import LinearRouter

from molora_fed.bank import HeldOutBank
from molora_fed.errors import RoutingError
from molora_fed.routing.contract import OutputRouter, RouterOptions
from molora_fed.routing.summed import (
    Finished,
    SumEntry,
    SummedFit,
    locate_domains,
    plan_summed_fit,
)
from molora_fed.routing.summed_run import (
    add_plainly,
    answer_round,
    collect_setting,
    fit_by_sums,
    list_bounds,
    pack_sums,
    run_rounds,
    unpack_sums,
    weigh_domains,
)
from molora_fed.routing.top_k import limit_experts
from molora_fed.testing import build_synthetic_bank, take_blocks

NO_OPTIONS = RouterOptions()


@pytest.fixture
def bank():
    return build_synthetic_bank()


class SharesFit(SummedFit):
    """Gates are the experts' shares of being best at a token, counted in one round."""

    rounds = 1

    def start(self):
        return {"begin": torch.zeros(())}

    def entries(self, state):
        return {"best": SumEntry((self.setting.num_experts,), 1.0)}

    def measure(self, bank, state, weights):
        best = bank.logprob[:, 1:].argmax(-1)
        of_block = torch.tensor([weights[bank.domains[d]] for d in bank.domain_of])
        shares = torch.zeros(bank.num_experts, dtype=torch.float64)
        shares.index_add_(0, best.flatten(), of_block.double().repeat_interleave(best.shape[1]))
        return {"best": shares}

    def advance(self, state, totals):
        return Finished({"shares": totals["best"].float()})


class SharesRouter(OutputRouter[RouterOptions]):
    name = "shares"

    @classmethod
    def shapes(cls, num_experts, options):
        return {"shares": (num_experts,)}

    @classmethod
    def learn(cls, bank, options, seed, progress):
        return fit_by_sums(cls, [bank], options, seed)[0]

    @classmethod
    def by_sums(cls, setting):
        return SharesFit(setting, setting.options)

    def scores(self, view):
        return self.shares.log().expand(*view.document_starts.shape, -1)


def by_domain(bank):
    return [take_blocks(bank, np.flatnonzero(bank.domain_of == d)) for d in range(3)]


def test_a_router_of_ones_own_is_fitted_by_members_as_on_the_whole(bank):
    pooled = SharesRouter.fit(bank, NO_OPTIONS, 0)
    found, result = fit_by_sums(SharesRouter, by_domain(bank), NO_OPTIONS, 0)
    torch.testing.assert_close(found.shares, pooled.shares)
    assert float(found.shares.sum()) == pytest.approx(1)
    assert (result.rounds, result.answer_numbers) == (1, 3)


@pytest.mark.parametrize("router", [ZeroTrainingEvidenceRouter, limit_experts(SharesRouter, 2)])
def test_what_learns_nothing_and_what_limits_another_take_part(bank, router):
    options = router.Options()
    found, _ = fit_by_sums(router, by_domain(bank), options, 0)
    view = bank.view(slice(0, 3))
    torch.testing.assert_close(found.gates(view), router.fit(bank, options, 0).gates(view))


class LearnsAnew(SharesRouter):
    name = "learns-anew"

    @classmethod
    def learn(cls, bank, options, seed, progress):
        return cls(bank.num_experts, options, {"shares": torch.ones(bank.num_experts)})


class HasNoSums(SharesRouter):
    name = "has-none"

    @classmethod
    def by_sums(cls, setting):
        return None


@pytest.mark.parametrize("router", [LearnsAnew, HasNoSums, limit_experts(HasNoSums, 2)])
def test_who_cannot_take_part_is_refused_by_name(bank, router):
    name = "has-none" if "HasNo" in router.__name__ else router.name
    with pytest.raises(RoutingError, match=rf"^Cannot fit router '{name}' by sums: [^\n]*$"):
        fit_by_sums(router, [bank], NO_OPTIONS, 0)


def test_a_fit_that_asks_for_more_numbers_than_it_said_is_refused(bank):
    class AsksForMore(SharesFit):
        def limit_numbers(self):
            return (2,)

    class GreedyRouter(SharesRouter):
        name = "greedy"

        @classmethod
        def by_sums(cls, setting):
            return AsksForMore(setting, setting.options)

    assert SharesFit(collect_setting([bank], NO_OPTIONS, 0), NO_OPTIONS).limit_numbers() == (3,)
    with pytest.raises(RoutingError, match="at most 2 numbers in round 1, got 3"):
        fit_by_sums(GreedyRouter, [bank], NO_OPTIONS, 0)


def test_weights_of_all_members_tokens_sum_to_one_and_domains_count_alike(bank):
    rows = [0, 8, 9, 16, 17, 18, 19]  # one, two and four blocks
    part = take_blocks(bank, rows)
    weights = weigh_domains([take_blocks(part, [0, 1, 3]), take_blocks(part, [2, 4, 5, 6])])
    per_block = bank.block_size - 1
    tokens = {"domain-0": per_block, "domain-1": 2 * per_block, "domain-2": 4 * per_block}
    assert {d: weights[d] * count for d, count in tokens.items()} == pytest.approx(
        dict.fromkeys(tokens, 1 / 3)
    )
    assert locate_domains(take_blocks(bank, [9, 17]), bank.domains).tolist() == [1, 2]


def test_domains_and_experts_that_nobody_agreed_on_are_refused(bank):
    setting = collect_setting([bank], EvidenceOptions(), 0)
    fit = plan_summed_fit(EvidenceRouter, setting)
    state, weights = fit.start(), weigh_domains([bank])
    with pytest.raises(RoutingError, match="some of domain-x"):
        answer_round(fit, replace(bank, domains=("domain-0", "domain-1", "domain-x")), state, {})
    with pytest.raises(RoutingError, match="got none for domain-1, domain-2"):
        answer_round(fit, bank, state, {"domain-0": 0.1})
    with pytest.raises(RoutingError, match="experts expert-0, expert-1, expert-2, got a, b, c"):
        answer_round(fit, replace(bank, expert_names=("a", "b", "c")), state, weights)
    with pytest.raises(RoutingError, match="got HeldOutBank"):
        answer_round(fit, build_synthetic_bank(HeldOutBank), state, weights)
    with pytest.raises(RoutingError, match="equal hidden_size, got 16 and 8"):
        collect_setting([bank, build_synthetic_bank(hidden_size=8)], NO_OPTIONS, 0)
    with pytest.raises(RoutingError, match="got none"):
        collect_setting([], NO_OPTIONS, 0)


def test_a_fit_that_does_not_end_is_stopped(bank):
    class Endless(SharesFit):
        def advance(self, state, totals):
            return state

    setting = collect_setting([bank], NO_OPTIONS, 0)
    with pytest.raises(RoutingError, match="Endless: expected an end after 1 rounds"):
        run_rounds(Endless(setting, NO_OPTIONS), [bank], weigh_domains([bank]))


ENTRIES = {"a": SumEntry((2, 3), 5.0), "b": SumEntry((), 1.0)}
NUMBERS = arrays.arrays(np.float64, 7, elements=st.floats(-1, 1))


@settings(max_examples=50, deadline=None)
@given(st.lists(NUMBERS, min_size=1, max_size=4))
def test_vectors_add_up_to_the_tensors_sums(vectors):
    bounds = list_bounds(ENTRIES)
    assert bounds.tolist() == [5.0] * 6 + [1.0]
    total = unpack_sums(add_plainly(vectors, bounds), ENTRIES)
    parts = [unpack_sums(vector, ENTRIES) for vector in vectors]
    for name in ENTRIES:
        expected = torch.stack([part[name] for part in parts]).sum(0)
        torch.testing.assert_close(total[name], expected)
    packed = pack_sums(parts[0], ENTRIES, who="x")
    np.testing.assert_array_equal(packed, vectors[0])


FIT = {"a": torch.full((2, 3), 5.0).double(), "b": torch.zeros(()).double()}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("a", torch.full((2, 3), 5.1).double()),
        ("a", torch.zeros(3, 2).double()),
        ("b", torch.zeros(())),
        ("b", torch.tensor(float("nan")).double()),
        ("b", torch.tensor(float("-inf")).double()),
        ("b", None),
        ("c", torch.zeros(()).double()),
    ],
)
def test_sums_that_are_not_as_declared_are_not_sent(name, value):
    assert pack_sums(FIT, ENTRIES, who="x").shape == (7,)
    sums = {n: t for n, t in {**FIT, name: value}.items() if t is not None}
    with pytest.raises(RoutingError, match=f"'x': expected finite float64 .* in {name}\\."):
        pack_sums(sums, ENTRIES, who="x")


@pytest.mark.parametrize("vector", [np.zeros(6), np.zeros((7, 1)), np.full(7, np.nan)])
def test_totals_that_are_no_sums_are_refused(vector):
    with pytest.raises(RoutingError, match="expected 7 finite numbers"):
        unpack_sums(vector, ENTRIES)


def test_members_vectors_are_handed_to_the_function_that_adds_them(bank):
    asked = []

    def add(vectors, bounds):
        asked.append((len(vectors), vectors[0].shape, bounds.max()))
        return add_plainly(vectors, bounds)

    fit_by_sums(SharesRouter, by_domain(bank), NO_OPTIONS, 0, add=add)
    assert asked == [(3, (3,), 1.0)]


def test_the_coordinator_keeps_its_moments_to_itself(bank):
    fit = plan_summed_fit(LinearRouter, collect_setting([bank], LinearRouter.Options(), 0))
    state = fit.start()
    assert list(fit.send(state)) == ["at.weight"]
    assert {"first.weight", "second.weight", "round"} <= state.keys()
