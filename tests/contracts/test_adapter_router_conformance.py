"""Every registered adapter router keeps the contract; broken ones are caught."""

import pytest
import torch
from molora_evolution.routers import ParallelSigmoidOptions, ParallelSigmoidRouter

from molora_fed.errors import PluginError
from molora_fed.plugins import load_plugins
from molora_fed.testing import check_adapter_router_conformance

ROUTERS = load_plugins().adapter_routers


@pytest.mark.parametrize("name", ROUTERS.names())
def test_registered_adapter_router_conforms(name):
    check_adapter_router_conformance(ROUTERS.resolve(name))


@pytest.mark.parametrize(
    "part", [{"competition": "softmax"}, {"floor": 0}, {"anneal": False}, {"input": "embeddings"}]
)
def test_the_rewrite_conforms_without_any_one_part(part):
    check_adapter_router_conformance(ParallelSigmoidRouter, ParallelSigmoidOptions(**part))


class SeesTheFuture(ParallelSigmoidRouter):
    def forward(self, view):
        gates = super().forward(view)
        return gates.mean(dim=1, keepdim=True).expand_as(gates)


class RemembersTheLastDocument(ParallelSigmoidRouter):
    def forward(self, view):
        count = torch.arange(1, view.document_starts.shape[1] + 1).view(1, -1, 1)
        return super().forward(view).cumsum(dim=1) / count


class Unbounded(ParallelSigmoidRouter):
    def forward(self, view):
        return 1.5 * super().forward(view)


class DrawsFromChance(ParallelSigmoidRouter):
    @classmethod
    def build(cls, num_slots, width, options, seed):
        router = super().build(num_slots, width, options, seed)
        torch.nn.init.normal_(router.weight)
        return router


class AnnealsByCalls(ParallelSigmoidRouter):
    def set_progress(self, share):
        self.temperature.mul_(0.9)


class KeepsItsTemperature(ParallelSigmoidRouter):
    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        return {**state, "temperature": torch.tensor(2.0)}


class IgnoresTheParent(ParallelSigmoidRouter):
    def reset_slot(self, slot, parent, seed):
        super().reset_slot(slot, None, seed)


class CannotLearn(ParallelSigmoidRouter):
    def forward(self, view):
        return super().forward(view).detach() + 0 * self.weight.sum()


BROKEN = {
    SeesTheFuture: "ignore later ones",
    RemembersTheLastDocument: "forget at a document's start",
    Unbounded: "between 0 and 1",
    DrawsFromChance: "same router from the same seed",
    AnnealsByCalls: "last progress only",
    KeepsItsTemperature: "after saving and loading",
    IgnoresTheParent: "its parent's",
    CannotLearn: "finite gradients",
}


@pytest.mark.parametrize("router", BROKEN)
def test_a_broken_adapter_router_is_caught_by_name(router):
    with pytest.raises(PluginError) as caught:
        check_adapter_router_conformance(router)
    assert BROKEN[router] in str(caught.value) and router.__name__ in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_reading_is_refused():
    class ReadsTheExperts(ParallelSigmoidRouter):
        @classmethod
        def reads(cls, options):
            return frozenset({"experts_hidden"})

    with pytest.raises(PluginError, match=r"expected reads among .* got .*experts_hidden"):
        check_adapter_router_conformance(ReadsTheExperts)
