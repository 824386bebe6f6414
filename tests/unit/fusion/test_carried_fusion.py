"""Routers read what contributions carry, from banks and where nobody's text is pooled."""

from dataclasses import replace

import pytest
import torch
from carried_helpers import NAME, MeanStateRouter, load_with_plugin
from fusion_helpers import build_charter, build_cooperative

from molora_fed.adapters.carried_files import CarriedFiles
from molora_fed.adapters.files import load_adapter
from molora_fed.bank import Expert, build_calibration_bank
from molora_fed.cooperative.publish import measure_statistics
from molora_fed.errors import PluginError
from molora_fed.fusion.fuse import fuse, fuse_texts
from molora_fed.fusion.local_members import LocalMembers, drop_text
from molora_fed.fusion.private_texts import PrivateTexts
from molora_fed.testing import build_synthetic_bank, check_router_conformance

ROUTERS = {"router": MeanStateRouter.name, "fallback": "", "merges": ()}


@pytest.fixture(scope="module")
def plugins():
    return load_with_plugin()


@pytest.fixture(scope="module")
def cooperative(tiny_checkpoint, tmp_path_factory):
    """The second contribution was made before anything was asked for."""
    base, contributions = build_cooperative(tiny_checkpoint(), tmp_path_factory.mktemp("adapters"))
    generator = torch.Generator().manual_seed(0)
    carrying = []
    for number, one in enumerate(contributions):
        mean = torch.randn(base.hidden_size, generator=generator)
        files = {} if number == 1 else {NAME: lambda mean=mean: {"mean": mean.clone()}}
        carrying.append(replace(one, carried=CarriedFiles(files)))
    return base, carrying


def collect(contributions, width):
    """What the router has learned, in the order of the experts."""
    found = {one.contributor: one.carried[NAME] for one in contributions}
    names = ["base", *(one.contributor for one in sorted(contributions, key=lambda one: one.id))]
    zeros = {"mean": torch.zeros(width)}
    return torch.stack([(found.get(name) or zeros)["mean"] for name in names])


def test_a_bank_has_what_each_expert_carries_and_nobody_changes_it(cooperative, tmp_path):
    base, contributions = cooperative
    own = contributions[0]
    experts = [Expert("base", None), Expert("law-1", load_adapter(own.adapter), own.carried)]
    bank = build_calibration_bank(tmp_path, base, experts, [contributions[0].calibration], batch=8)
    assert list(bank.carried) == ["base", "law-1"] and bank.carried["base"][NAME] is None
    assert bank.carried["law-1"][NAME]["mean"].shape == (base.hidden_size,)
    with pytest.raises(TypeError):
        bank.carried["base"] = experts[1].carried
    made = build_synthetic_bank(carried={"expert-1": {NAME: {"mean": torch.ones(2)}}})
    made.carried["expert-1"][NAME]["mean"].zero_()
    assert made.carried["expert-1"][NAME]["mean"].tolist() == [1.0, 1.0]
    assert made.carried["expert-0"][NAME] is None
    assert set(made.carried) == set(made.expert_names)


def test_a_router_that_reads_them_keeps_its_contract_where_there_are_none():
    check_router_conformance(MeanStateRouter)


def test_a_router_that_reads_them_keeps_its_contract_where_there_are_some():
    states = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    carried = {f"expert-{n}": {NAME: {"mean": state}} for n, state in enumerate(states)}
    check_router_conformance(MeanStateRouter, carried=carried)
    with pytest.raises(PluginError, match="changed"):
        check_router_conformance(_Careless, carried=carried)


class _Careless(MeanStateRouter):
    """Keeps what it was handed, and the column that it read."""

    @classmethod
    def learn(cls, bank, options, seed, progress):
        bank.base_hidden[0] += 1
        return super().learn(bank, options, seed, progress)


def test_a_pooled_fusion_publishes_a_router_made_of_what_is_carried(cooperative, plugins, tmp_path):
    base, contributions = cooperative
    found = fuse(base, build_charter(base, **ROUTERS), contributions, tmp_path, plugins=plugins)
    assert found.result["router"] == MeanStateRouter.name
    means = found.fused.router.state_tensors()["means"]
    assert torch.equal(means, collect(contributions, base.hidden_size))


@pytest.mark.parametrize("mode", ["private", "statistics"])
def test_members_and_coordinator_have_the_same_carried_files(cooperative, plugins, mode, tmp_path):
    base, contributions = cooperative
    charter = build_charter(base, **ROUTERS)
    identity = charter.identity.model_copy(update={"privacy_mode": mode})
    charter = charter.model_copy(update={"identity": identity})
    experts = []
    for one in contributions:
        path = None
        if charter.publishes_statistics:
            path = tmp_path / f"{one.contributor}.safetensors"
            measure_statistics(base, charter, one.calibration, tmp_path / "states").save(path)
        experts.append(replace(drop_text(one), statistics=path))
    asked = LocalMembers.open(base, charter, contributions, experts, tmp_path, plugins=plugins)
    found = fuse_texts(
        base, charter, PrivateTexts(experts, asked), tmp_path / "coordinator", plugins=plugins
    )
    means = found.fused.router.state_tensors()["means"]
    assert torch.equal(means, collect(contributions, base.hidden_size))
    pooled = fuse(
        base, build_charter(base, **ROUTERS), contributions, tmp_path / "pooled", plugins=plugins
    )
    mine, theirs = (one.result["losses"]["fused"][MeanStateRouter.name] for one in (found, pooled))
    assert mine == pytest.approx(theirs, abs=1e-5)
