"""A small plugin whose gates contributions carry, and the router that reads them."""

from typing import ClassVar

import torch

from molora_fed import OutputRouter, hookimpl
from molora_fed.adapters.compatibility import applied
from molora_fed.plugins import load_plugins
from molora_fed.routing.summed import Finished, SummedFit
from molora_fed.types import Split

NAME = "mean-states"


def compute_mean_states(context):
    """Mean of the specialist's last hidden state over its own train text, (D,)."""
    total, count = torch.zeros(context.base.hidden_size), 0
    for blocks in context.blocks(Split.TRAIN, batch=4):
        with applied(context.base.model, context.adapter) as model, torch.no_grad():
            tokens = torch.from_numpy(blocks.tokens).long()
            states = model(tokens, output_hidden_states=True).hidden_states[-1]
        total += states.sum(dim=(0, 1))
        count += tokens.numel()
    return {"mean": total / count}


def collect_means(carried, names, width):
    """The experts' means, (E, D); zeros of one whose contribution carries none."""
    rows = []
    for name in names:
        found = carried[name][NAME]
        rows.append(torch.zeros(width) if found is None else found["mean"])
    return torch.stack(rows)


class _Collected(SummedFit):
    """Nothing is asked: what is learned was carried."""

    rounds = 0

    def start(self):
        setting = self.setting
        means = collect_means(setting.carried, setting.expert_names, setting.hidden_size)
        return Finished({"means": means})

    def entries(self, state):
        return {}

    def measure(self, bank, state, weights):
        return {}

    def advance(self, state, totals):
        return Finished({})


class MeanStateRouter(OutputRouter):
    """The cosine of a state with each expert's mean state."""

    name = "by-mean-states"
    readings: ClassVar = frozenset({"base_hidden"})

    @classmethod
    def shapes(cls, num_experts, options):
        return {"means": (num_experts, "D")}

    @classmethod
    def learn(cls, bank, options, seed, progress):
        means = collect_means(bank.carried, bank.expert_names, bank.hidden_size)
        return cls(bank.num_experts, options, {"means": means})

    @classmethod
    def by_sums(cls, setting):
        return _Collected(setting, setting.options)

    @classmethod
    def from_statistics(cls, statistics, setting):
        finished = _Collected(setting, setting.options).start()
        return cls(setting.num_experts, setting.options, finished.tensors)

    def scores(self, view):
        means = torch.nn.functional.normalize(self.means, dim=-1)
        return torch.nn.functional.normalize(view.base_hidden, dim=-1) @ means.T


class Plugin:
    """What its entry point would name."""

    @staticmethod
    @hookimpl
    def register_carried_files(register):
        register(NAME, compute_mean_states, summary="Mean states", source="own definition")

    @staticmethod
    @hookimpl
    def register_routers(register):
        register(MeanStateRouter.name, MeanStateRouter, summary="By them", source="own definition")


def load_with_plugin():
    """The installed plugins and this one."""
    return load_plugins(extra=[("mean-states (molora-mean-states 1.0)", Plugin)])
