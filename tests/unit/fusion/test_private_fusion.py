"""A fusion on texts that stay with their owners gives what the same texts, pooled, give."""

import json
from pathlib import Path

import jsonschema
import pytest
from fusion_helpers import build_charter, build_cooperative

from molora_fed.fusion.fuse import fuse, fuse_texts
from molora_fed.fusion.local_members import LocalMembers, drop_text
from molora_fed.fusion.private_texts import PrivateTexts
from molora_fed.plugins import load_plugins

SCHEMA = json.loads((Path(__file__).parents[3] / "docs" / "report.schema.json").read_text())
ROUTERS = {"router": "evidence", "compare": ("evidence-zero", "statistics", "linear", "dispatch")}


@pytest.fixture(scope="module")
def plugins():
    return load_plugins()


@pytest.fixture(scope="module")
def cooperative(tiny_checkpoint, tmp_path_factory):
    return build_cooperative(tiny_checkpoint(), tmp_path_factory.mktemp("adapters"))


def keep_private(charter, summing="masked"):
    identity = charter.identity.model_copy(update={"privacy_mode": "private", "summing": summing})
    return charter.model_copy(update={"identity": identity})


def fuse_privately(base, charter, contributions, folder, plugins):
    experts = [drop_text(one) for one in contributions]
    asked = LocalMembers.open(base, charter, contributions, experts, folder, plugins=plugins)
    texts = PrivateTexts(experts, asked)
    return fuse_texts(base, charter, texts, folder / "coordinator", plugins=plugins), asked


@pytest.fixture(scope="module")
def pooled(cooperative, plugins, tmp_path_factory):
    base, contributions = cooperative
    charter = build_charter(base, **ROUTERS)
    return fuse(base, charter, contributions, tmp_path_factory.mktemp("pooled"), plugins=plugins)


@pytest.mark.parametrize("summing", ["masked", "robust"])
def test_private_and_pooled_fusions_say_the_same(cooperative, plugins, pooled, summing, tmp_path):
    base, contributions = cooperative
    charter = keep_private(build_charter(base, **ROUTERS), summing)
    private, asked = fuse_privately(base, charter, contributions, tmp_path, plugins)
    jsonschema.validate(private.result, SCHEMA)
    mine, theirs = private.result, pooled.result
    assert mine["privacy_mode"] == "private"
    for router, bar in (("evidence", 1e-3), ("evidence-zero", 1e-6), ("statistics", 0.02)):
        for domain, loss in theirs["losses"]["fused"][router].items():
            assert mine["losses"]["fused"][router][domain] == pytest.approx(loss, abs=bar), router
    for method in ("base", "uniform", "weight_average", "token_oracle"):
        assert mine["losses"][method] == pytest.approx(theirs["losses"][method], abs=1e-5)
    assert "dispatch" in mine["not_measured"]["router"]
    for name, forecast in theirs["forecasts"].items():
        assert mine["forecasts"][name]["point"] == pytest.approx(forecast["point"], abs=1e-3)
    places = [question.place for question in asked.questions]
    assert places[:2] == ["fit 0 0", "fit 0 1"] and places[-1] == "held-out"
    assert "judge 0" in places and len(set(places)) == len(places)


def test_a_router_that_is_published_must_be_fitted_by_sums(cooperative, plugins, tmp_path):
    base, contributions = cooperative
    charter = keep_private(build_charter(base, router="dispatch", compare=()))
    with pytest.raises(Exception, match=r"'dispatch' by sums.*another router"):
        fuse_privately(base, charter, contributions, tmp_path, plugins)
