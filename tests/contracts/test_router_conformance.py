"""Every registered router, built in or installed, keeps the contract; broken ones are caught."""

from dataclasses import replace

import pytest
import torch
from molora_kalavai.evidence import EvidenceOptions, ZeroTrainingEvidenceRouter
from molora_kalavai.hidden import HiddenSums as LinearSums
from molora_kalavai.lda import StatisticsRouter
from molora_kalavai.linear import LinearOptions, LinearRouter, NoncausalLinearRouter

from molora_fed.errors import PluginError
from molora_fed.plugins import load_plugins
from molora_fed.testing import check_router_conformance, take_blocks

ROUTERS = load_plugins().routers


@pytest.mark.parametrize("name", ROUTERS.names())
def test_registered_router_conforms(name):
    check_router_conformance(ROUTERS.resolve(name))


@pytest.mark.parametrize("reading", ["base_hidden", "prefix_hidden"])
def test_linear_conforms_on_other_inputs(reading):
    check_router_conformance(LinearRouter, LinearOptions(input=reading))


def test_evidence_conforms_without_prior_and_with_other_decays():
    router = ROUTERS.resolve("evidence")
    check_router_conformance(router, EvidenceOptions(decays=(1.0, 0.5), prior=False))


class PretendsToBeCausal(NoncausalLinearRouter):
    causal = True
    step = LinearRouter.step


class PromisesTooMuch(LinearRouter):
    @classmethod
    def bound_excess(cls, num_experts):
        return -100.0


class ForgetsToReorder(LinearRouter):
    def reorder(self, state, index):
        return state


class LearnsFromChance(LinearRouter):
    @classmethod
    def fit(cls, bank, options, seed, progress=None):
        router = super().fit(bank, options, seed, progress)
        router.weight += torch.randn_like(router.weight)
        return router


class PrefersTheFirst(ZeroTrainingEvidenceRouter):
    def scores(self, view):
        return super().scores(view) + torch.tensor([9.0, 0.0, 0.0])[: self.num_experts]


class ForgetsTheDocument(LinearRouter):
    def step(self, view, state):
        return super().step(view, self.init_state(len(view.document_starts)))


class _HalfSums(LinearSums):
    """Counts a member's first block alone."""

    def measure(self, bank, state, weights):
        return super().measure(take_blocks(bank, [0]), state, weights)


class AnswersForOneBlock(LinearRouter):
    @classmethod
    def by_sums(cls, setting):
        return _HalfSums(setting, setting.options, cls)


class _WildSums(LinearSums):
    """Declares a range that its sums leave."""

    def entries(self, state):
        return {name: replace(e, bound=1e-9) for name, e in super().entries(state).items()}


class LeavesItsBounds(LinearRouter):
    @classmethod
    def by_sums(cls, setting):
        return _WildSums(setting, setting.options, cls)


class BelievesTheFirst(StatisticsRouter):
    """Its statistics have an order."""

    @classmethod
    def from_statistics(cls, statistics, setting):
        made = super().from_statistics(statistics, setting)
        shift = float(next(iter(statistics.values())).mean[0])
        moved = {name: tensor + shift for name, tensor in made.state_tensors().items()}
        return cls(setting.num_experts, made.options, moved)


class TakesAnyBank(ZeroTrainingEvidenceRouter):
    @classmethod
    def fit(cls, bank, options, seed, progress=None):
        return cls(bank.num_experts, options)


@pytest.mark.parametrize(
    ("router", "reason"),
    [
        (PretendsToBeCausal, "ignore later ones"),
        (ForgetsToReorder, "reorder to move"),
        (PromisesTooMuch, "at most -100.000 nats above the best expert"),
        (LearnsFromChance, "same bank and seed"),
        (PrefersTheFirst, "order does not change"),
        (ForgetsTheDocument, "step to give"),
        (TakesAnyBank, "HeldOutBank"),
        (AnswersForOneBlock, "two halves to add up"),
        (LeavesItsBounds, "within their bounds"),
        (BelievesTheFirst, "same statistics in any order"),
    ],
)
def test_broken_router_is_caught(router, reason):
    with pytest.raises(PluginError, match=reason):
        check_router_conformance(router)


@pytest.mark.parametrize("seed", [0, 991])
def test_a_fit_by_chance_is_caught_whatever_was_seeded_before(seed):
    torch.manual_seed(seed)
    with pytest.raises(PluginError, match="same bank and seed"):
        check_router_conformance(LearnsFromChance)


def test_a_check_that_raises_hides_no_other_finding():

    from molora_fed.routing.contract import OutputRouter

    class Twice(OutputRouter):
        readings = frozenset({"evidence"})

        def scores(self, view):
            return torch.zeros_like(view.evidence)

        def gates(self, view):
            return view.evidence.flip(1).softmax(-1)

        def reorder(self, state, index):
            raise IndexError("oops")

    with pytest.raises(PluginError) as caught:
        check_router_conformance(Twice)
    assert "IndexError: oops" in str(caught.value)
    assert "to ignore later ones" in str(caught.value)
