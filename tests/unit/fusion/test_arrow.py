"""A router that learns of adapters alone: the same in pooled, private and statistics fusions."""

import textwrap

import arrow_router
import pytest
import torch
from arrow_router import ArrowOptions, ArrowRouter, Meddler
from fusion_helpers import build_charter, build_cooperative, fuse_apart, publish
from molora_arrow.router import read_directions
from page_helpers import find_blocks, read_page

from molora_fed.cooperative.outgoing import _plan_rounds
from molora_fed.errors import PluginError
from molora_fed.fusion.fuse import fuse
from molora_fed.plugins import load_plugins
from molora_fed.routing.summed import NoRounds
from molora_fed.testing import check_router_conformance

ROUTERS = {"router": "arrow", "compare": ("evidence-zero",), "fallback": "", "restarts": 0}


@pytest.fixture(scope="module")
def plugins():
    return load_plugins([("arrow", arrow_router)])


@pytest.fixture(scope="module")
def cooperative(tiny_checkpoint, tmp_path_factory):
    return build_cooperative(tiny_checkpoint(), tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def pooled(cooperative, plugins, tmp_path_factory):
    base, contributions = cooperative
    charter = build_charter(base, **ROUTERS)
    return fuse(base, charter, contributions, tmp_path_factory.mktemp("pooled"), plugins=plugins)


@pytest.mark.parametrize("options", [None, ArrowOptions(sharpness=3.0)])
def test_it_keeps_the_contract_of_routers(options):
    check_router_conformance(ArrowRouter, options)


def test_the_methods_on_the_page_of_routers_make_such_a_router():
    (code,) = find_blocks(read_page("routers.md"), "python")
    namespace = {"ArrowRouter": ArrowRouter, "NoRounds": NoRounds}
    namespace |= {"read_directions": read_directions, "__name__": "page"}
    exec("class Shown(ArrowRouter):\n" + textwrap.indent(code, "    "), namespace)
    check_router_conformance(namespace["Shown"])


def test_the_kit_tells_of_a_router_that_changes_an_adapter():
    with pytest.raises(PluginError, match="expected inputs as they were, got changed"):
        check_router_conformance(Meddler)


def test_its_directions_are_those_of_the_published_adapters(pooled):
    fused = pooled.fused
    assert fused.router_name == "arrow"
    assert fused.router.directions.shape == (4, 1, 32)
    for expert, directions in zip(fused.experts, fused.router.directions, strict=True):
        if expert.adapter is None:
            assert not bool(directions.any())
            continue
        (update,) = (u for n, u in expert.adapter.updates.items() if "query_key_value" in n)
        product = update.product()
        largest = torch.linalg.matrix_norm(product, 2)
        assert torch.allclose((product @ directions[0]).norm(), largest, rtol=1e-4)


@pytest.mark.parametrize("mode", ["private", "statistics"])
def test_where_text_stays_with_its_owners_it_is_the_same_router(
    cooperative, plugins, pooled, mode, tmp_path
):
    base, contributions = cooperative
    charter = publish(build_charter(base, **ROUTERS), mode=mode)
    found, asked = fuse_apart(base, charter, contributions, tmp_path, plugins)
    for name, tensor in pooled.fused.router.state_tensors().items():
        assert torch.equal(found.fused.router.state_tensors()[name], tensor)
    mine, theirs = (one.result["losses"]["fused"]["arrow"] for one in (found, pooled))
    assert mine == pytest.approx(theirs, abs=1e-5)
    places = [question.place for question in asked.questions]
    first = "losses" if mode == "statistics" else "fit 0 0"
    assert places[0] == first and places[-1] == "held-out"
    assert all("arrow" not in question.routers for question in asked.questions[:1])


def test_what_is_sent_can_be_said_before_there_are_adapters(cooperative, plugins):
    base, _ = cooperative
    charter = publish(build_charter(base, **ROUTERS), mode="private")
    rounds = _plan_rounds(charter, plugins, 4, 2, base.hidden_size)
    assert "arrow" in rounds.limit_fits()[1]


def test_a_router_that_changes_an_adapter_has_failed(cooperative, plugins, pooled, tmp_path):
    base, contributions = cooperative
    rules = {**ROUTERS, "compare": ("meddler",)}
    found = fuse(base, build_charter(base, **rules), contributions, tmp_path, plugins=plugins)
    why = found.result["not_measured"]["router"]["meddler"]
    assert "got changes of the adapter of" in why
    for name, tensor in pooled.fused.router.state_tensors().items():
        assert torch.equal(found.fused.router.state_tensors()[name], tensor)
