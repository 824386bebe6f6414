"""The kit of carried files: a good plugin passes, a broken one is told what is wrong."""

from typing import ClassVar

import pytest
import torch
from carried_helpers import compute_mean_states
from pydantic import BaseModel

from molora_fed.errors import PluginError
from molora_fed.testing import (
    build_carried_context,
    check_carried_files_conformance,
    examine_carried_files,
)

CHECKS = (
    "gives bounded finite tensors",
    "same seed gives same bytes",
    "leaves the model as it was",
    "leaves the adapter as it was",
    "takes dense adapters",
    "takes other architectures",
)


class ScaledOptions(BaseModel):
    scale: float = 1.0


class Scaled:
    """The same with an option."""

    Options: ClassVar = ScaledOptions

    def __init__(self, options):
        self.options = options

    def __call__(self, context):
        return {"mean": self.options.scale * compute_mean_states(context)["mean"]}


def draw(context):
    """Draws from the global generator and spoils the adapter."""
    for update in context.adapter.updates.values():
        for tensor in update.tensors().values():
            tensor.zero_()
    return {"noise": torch.randn(4)}


def train_base(context):
    """Trains the base with the gates, and gives a number that is none."""
    weight = context.base.model.get_output_embeddings().weight
    weight.requires_grad_(True)
    return {"gate": torch.full((3,), float("nan"))}


def leave_hook(context):
    context.base.model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: 2 * output
    )
    return {"gate": torch.zeros(3)}


@pytest.mark.parametrize("target", [compute_mean_states, Scaled])
def test_a_plugin_that_keeps_the_contract_passes_every_check(target):
    assert tuple(result.name for result in examine_carried_files(target)) == CHECKS
    check_carried_files_conformance(target)


def test_options_reach_a_class():
    check_carried_files_conformance(Scaled, ScaledOptions(scale=2.0))
    with pytest.raises(PluginError, match="finite numbers in 'mean'"):
        check_carried_files_conformance(Scaled, ScaledOptions(scale=float("inf")))


@pytest.mark.parametrize(
    ("target", "failed"),
    [
        (draw, {"same seed gives same bytes", "leaves the adapter as it was"}),
        (train_base, {*CHECKS} - {"leaves the adapter as it was", "same seed gives same bytes"}),
        (leave_hook, {"leaves the model as it was"}),
        (lambda context: 1 / 0, {*CHECKS}),
    ],
)
def test_a_broken_one_is_told_each_rule_it_breaks(target, failed):
    results = examine_carried_files(target)
    assert {result.name for result in results if result.problem is not None} == failed
    with pytest.raises(PluginError, match="breaks its contract: expected") as caught:
        check_carried_files_conformance(target)
    assert "\n" not in str(caught.value)


def test_made_up_contexts_are_the_same_each_time():
    first, again = (build_carried_context(kind="delta", architecture="gpt2") for _ in range(2))
    assert first.adapter.hash == again.adapter.hash
    for split, blocks in first.samples.items():
        assert blocks.fingerprint == again.samples[split].fingerprint
