import json
import math
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import torch
from fusion_helpers import build_charter, build_contributed, build_cooperative

from molora_fed.cooperative.controls import CONTROLS
from molora_fed.errors import (
    BaseCheckpointError,
    CharterError,
    ConfigError,
    IncompatibleAdapterError,
    RoutingError,
    UnknownNameError,
)
from molora_fed.forecasting.divergence import compute_gains
from molora_fed.forecasting.records import parse_record
from molora_fed.fusion.fuse import PHASES, fuse
from molora_fed.fusion.texts import Control
from molora_fed.inference.fused_build import build_causal_lm
from molora_fed.inference.generate import Sampling, generate
from molora_fed.plugins import load_plugins
from molora_fed.routing.bundle import load_fused, load_manifest
from molora_fed.testing import build_random_adapter
from molora_fed.types import LossMatrix

SCHEMA = json.loads((Path(__file__).parents[3] / "docs" / "report.schema.json").read_text())


@pytest.fixture(scope="module")
def plugins():
    return load_plugins()


@pytest.fixture(scope="module")
def cooperative(tiny_checkpoint, tmp_path_factory):
    return build_cooperative(tiny_checkpoint(), tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def fusion(cooperative, plugins, tmp_path_factory):
    """One fusion with everything on, its folder, and what it told while it ran."""
    base, contributions = cooperative
    folder = tmp_path_factory.mktemp("fusion")
    told = []

    def on_forecasts(records):
        written = json.loads((folder / "forecasts.json").read_text())
        told.append(("forecasts", [r.actual for r in records], written))

    cost = {"steps": 30, "tokens": 960}
    controls = {
        "monolithic": Control(build_random_adapter(base.model, seed=9, frozen_depth=1), cost),
        "base_continued": Control(base, cost),
    }
    result = fuse(
        base,
        build_charter(base, compare=("evidence", "evidence-zero", "linear")),
        contributions,
        folder,
        plugins=plugins,
        controls=controls,
        on_phase=lambda name: told.append(("phase", name)),
        on_forecasts=on_forecasts,
    )
    return result, folder, told


def test_what_any_document_costs_is_reported_beside_what_is_promised(fusion):
    result = fusion[0].result
    num_experts = len(result["experts"])
    for router, bound in (
        ("evidence-mixed", math.log(2 * num_experts)),
        ("evidence-zero", math.log(num_experts)),
        ("evidence", None),
        ("linear", None),
    ):
        found = result["excess_nats"][router]
        assert found["bound"] == (None if bound is None else pytest.approx(bound))
        assert bound is None or found["largest"] <= bound + 1e-3
        assert found["parts"] > 0


def test_result_follows_the_published_schema(fusion):
    result, folder, _ = fusion
    jsonschema.validate(result.result, SCHEMA)
    assert json.loads((folder / "result.json").read_text()) == result.result


def test_result_has_every_method(fusion, cooperative):
    result = fusion[0].result
    base, contributions = cooperative
    assert result["domains"] == ["art", "law"]
    assert result["seed"] == 7
    losses = result["losses"]
    assert losses["specialists"].keys() == {"law-1", "law-2", "art-1"}
    assert losses["fused"].keys() == {"evidence-mixed", "evidence", "evidence-zero", "linear"}
    for name in ("base", "uniform", "weight_average", "domain_oracle", "token_oracle", *CONTROLS):
        assert losses[name].keys() == {"art", "law"}
    # A whole checkpoint is measured as the bank measures experts: here it is the base itself.
    assert losses["base_continued"] == pytest.approx(losses["base"], abs=1e-6)
    for name, difference in result["control_difference_nats"].items():
        weights = result["equal_weight"]
        expected = weights["fused:evidence-mixed"]["point"] - weights[name]["point"]
        assert difference["point"] == pytest.approx(expected)
        assert difference["low"] <= difference["point"] <= difference["high"]
    for name in ("gain_percent", "oracle_gap_nats", "guard", "gates"):
        assert result[name].keys() == losses["fused"].keys()
    assert result["own_domain"]["law-2"] == "law"
    measured_on = {"device": "cpu", "dtype": "float32", "blocks_per_pass": 8}
    assert result["measured_on"] == measured_on
    assert result["contamination"] == {"art": 0.01, "law": 0.01}
    assert result["fingerprints"]["base"] == base.weights
    assert result["bytes"]["adapters"].keys() == losses["specialists"].keys()
    assert result["compute"]["controls"] == {n: {"steps": 30, "tokens": 960} for n in CONTROLS}
    assert result["compute"]["contributors"]["art-1"]["kind"] == "delta"
    assert result["seconds"].keys() == set(PHASES)
    ids = [c.id for c in sorted(contributions, key=lambda c: c.id)]
    assert [e["contribution"] for e in result["experts"]] == [None, *ids]
    assert all(e["changed"] == e["modules"] > 0 for e in result["experts"][1:])


def test_fusion_is_better_than_anyone_alone(fusion):
    result = fusion[0].result
    assert result["gain_percent"]["evidence-mixed"]["vs_best_alone"] > 2
    gap = result["oracle_gap_nats"]["evidence-mixed"]
    assert gap["low"] <= gap["point"] <= gap["high"] < 0.2


def test_forecasts_are_written_before_anything_is_fitted_and_scored_after(fusion):
    _, folder, told = fusion
    assert [name for kind, *rest in told for name in rest[:1] if kind == "phase"] == list(PHASES)
    places = [index for index, (kind, *_) in enumerate(told) if kind == "forecasts"]
    assert [told[i - 1][1] for i in places] == ["forecasts", "evaluation"]
    before, after = (told[i] for i in places)
    assert set(before[1]) == {None} and all(r["actual"] is None for r in before[2])
    assert None not in after[1]
    for early, late in zip(before[2], after[2], strict=True):
        assert parse_record({**late, "actual": None}) == parse_record(early)
    assert json.loads((folder / "forecasts.json").read_text()) == after[2]


def test_every_forecast_is_reported_with_interval_and_outcome(fusion):
    result = fusion[0].result
    forecasts = result["forecasts"]
    expected = {"fitted", "kalavai-law", "loss-matrix", "own-loss", "own-loss-bracket"}
    assert expected <= set(forecasts)
    headline = ["measured-alone", "measured-specialist"]
    assert result["headline"] == {"predictors": headline, "reason": None}
    for forecast in forecasts.values():
        assert forecast["low"] <= forecast["high"] and 0 < forecast["level"] < 1
        assert forecast["router"] == "evidence-mixed"
        key = f"vs_{forecast['reference']}"
        assert forecast["actual"] == result["gain_percent"]["evidence-mixed"][key]


def test_gains_agree_with_the_losses_they_come_from(fusion):
    result = fusion[0].result
    losses = result["losses"]
    matrix = LossMatrix(
        tuple(result["domains"]), losses["base"], losses["specialists"], result["own_domain"]
    )
    for router, gain in result["gain_percent"].items():
        expected = compute_gains(matrix, losses["fused"][router])
        assert gain["vs_best_alone"] == pytest.approx(expected["best_alone"])
        assert gain["vs_best_specialist"] == pytest.approx(expected["best_specialist"])


def measure_saved(folder, contributions, base_folder):
    """Loss by domain of a saved fused model, from its full form."""
    fused = load_fused(folder, base_folder=base_folder, plugins=load_plugins())
    sums, counts = {}, {}
    for c in contributions:
        tokens = torch.from_numpy(c.held_out.tokens).long()
        starts = torch.from_numpy(c.held_out.document_starts)
        log_probs = build_causal_lm(fused)(tokens, document_starts=starts).logits[:, :-1]
        nll = -log_probs.gather(-1, tokens[:, 1:, None]).double()
        sums[c.domain] = sums.get(c.domain, 0.0) + float(nll.sum())
        counts[c.domain] = counts.get(c.domain, 0) + nll.numel()
    return {domain: sums[domain] / counts[domain] for domain in sums}


def test_the_saved_model_has_the_reported_losses(fusion, cooperative):
    result, _, _ = fusion
    base, contributions = cooperative
    found = measure_saved(result.fused_folder, contributions, base.folder)
    assert found == pytest.approx(result.result["losses"]["fused"]["evidence-mixed"], abs=2e-4)


def test_the_saved_model_generates(fusion, cooperative):
    told = []
    fused = load_fused(fusion[0].fused_folder, base_folder=cooperative[0].folder)
    results = generate(
        build_causal_lm(fused),
        ["ab", "cd", "longer"],
        Sampling(max_new_tokens=5),
        progress=lambda *a, **_: told.append(a),
    )
    assert [len(r.tokens) for r in results] == [5, 5, 5]
    assert results[0].gates.keys() == {"base", "law-1", "law-2", "art-1"}
    assert told[-1] == (10, 10)


@pytest.mark.parametrize("architecture", ["gemma2", "gpt2"])
@pytest.mark.parametrize("router", ["evidence", "linear"])
def test_logit_mixture_is_the_same_in_bank_and_fused_model(
    architecture, router, tiny_checkpoint, tmp_path, plugins
):
    base, contributions = build_cooperative(tiny_checkpoint(architecture), tmp_path / "adapters")
    charter = build_charter(base, mixture="logit", router=router, compare=(), base_expert=False)
    result = fuse(base, charter, contributions, tmp_path / "out", plugins=plugins)
    found = measure_saved(result.fused_folder, contributions, base.folder)
    assert found == pytest.approx(result.result["losses"]["fused"][router], abs=2e-4)
    assert [e["name"] for e in result.result["experts"]] == [
        c.contributor for c in sorted(contributions, key=lambda c: c.id)
    ]


def test_order_of_arrival_changes_nothing(fusion, cooperative, plugins, tmp_path):
    base, contributions = cooperative
    charter = build_charter(base, compare=("evidence", "evidence-zero", "linear"))
    again = fuse(base, charter, contributions[::-1], tmp_path, plugins=plugins)
    for name in ("losses", "gain_percent", "oracle_gap_nats", "gates", "experts", "fingerprints"):
        expected = dict(fusion[0].result)[name]
        if name == "losses":
            expected = {k: v for k, v in expected.items() if k not in CONTROLS}
        assert again.result[name] == expected
    for file in ("router.safetensors", "adapters/law-1/adapter_model.safetensors"):
        saved = (again.fused_folder / file).read_bytes()
        assert saved == (fusion[0].fused_folder / file).read_bytes()


def build_unpooled(cooperative):
    base, contributions = cooperative
    return base, [replace(c, calibration=None) for c in contributions]


def test_without_calibration_blocks_only_routers_that_learn_nothing_are_fitted(
    cooperative, plugins, tmp_path
):
    base, contributions = build_unpooled(cooperative)
    charter = build_charter(base, router="evidence-zero", compare=("linear",))
    result = fuse(base, charter, contributions, tmp_path, plugins=plugins).result
    assert result["losses"]["fused"].keys() == {"evidence-zero"}
    assert "no calibration blocks" in result["guard"]["linear"]["left_out"]
    assert result["fingerprints"]["calibration"] == {}
    jsonschema.validate(result, SCHEMA)


def test_a_learning_router_needs_calibration_blocks(cooperative, plugins, tmp_path):
    base, contributions = build_unpooled(cooperative)
    with pytest.raises(RoutingError, match="router 'evidence-mixed': expected calibration blocks"):
        fuse(base, build_charter(base), contributions, tmp_path, plugins=plugins)
    assert not (tmp_path / "fused").exists()


def test_one_contributor_can_be_fused_and_is_not_forecast(cooperative, plugins, tmp_path):
    base, contributions = cooperative
    result = fuse(base, build_charter(base), contributions[:1], tmp_path, plugins=plugins).result
    assert result["forecasts"] == {}
    jsonschema.validate(result, SCHEMA)


def refuse(base, charter, contributions, folder, plugins, kind, match):
    with pytest.raises(kind, match=match) as caught:
        fuse(base, charter, contributions, folder / "out", plugins=plugins)
    assert "\n" not in str(caught.value)
    assert not (folder / "out").exists()


def test_bad_input_is_refused_before_anything_is_computed(cooperative, plugins, tmp_path):
    base, contributions = cooperative
    charter = build_charter(base)
    one = contributions[0]
    cases = [
        ([], charter, ConfigError, "at least one admitted contribution"),
        ([one, one], charter, ConfigError, "different names, none 'base', got law-1"),
        ([replace(one, contributor="base")], charter, ConfigError, "none 'base', got base"),
        (
            [one, replace(contributions[1], calibration=None)],
            charter,
            ConfigError,
            "from every contributor or from none, got none from art-1",
        ),
        (
            [replace(one, calibration=None, admission=None)],
            charter,
            ConfigError,
            "calibration or admission blocks",
        ),
        ([one], build_charter(base, router="evidense"), UnknownNameError, "'evidence'"),
        ([one], build_charter(base, merges=("averag",)), UnknownNameError, "'average'"),
        (
            [one],
            build_charter(base, options={"decay": 1}),
            CharterError,
            r"decays, prior, iterations, got decay",
        ),
    ]
    for given, rules, kind, match in cases:
        refuse(base, rules, given, tmp_path, plugins, kind, match)


def test_another_base_is_refused(cooperative, tiny_checkpoint, plugins, tmp_path):
    from molora_fed.models.base import load_base

    base, contributions = cooperative
    other = load_base(tiny_checkpoint("gpt_neox", 5))
    refuse(other, build_charter(base), contributions, tmp_path, plugins, BaseCheckpointError, "got")


def test_a_specialist_of_another_kind_of_base_is_refused(
    cooperative, tiny_checkpoint, plugins, tmp_path
):
    from molora_fed.models.base import load_base

    base, contributions = cooperative
    other = load_base(tiny_checkpoint("llama"))
    stranger = build_contributed(other, tmp_path / "adapters", "llama-1", "llama", seed=4)
    with pytest.raises(IncompatibleAdapterError, match="llama-1"):
        fuse(base, build_charter(base), [*contributions, stranger], tmp_path, plugins=plugins)
    assert not (tmp_path / "fused").exists()


def test_the_charter_limits_the_published_router_only(fusion, cooperative, plugins, tmp_path):
    base, contributions = cooperative
    limited = fuse(base, build_charter(base, top_k=1), contributions, tmp_path, plugins=plugins)
    everyone = fusion[0].result
    assert (limited.result["top_k"], everyone["top_k"]) == (1, None)
    assert load_manifest(limited.fused_folder).router.top_k == 1
    gates = build_causal_lm(limited.fused)(torch.arange(9)[None]).gates
    assert (gates.amax(-1) == 1).all()
    for method, is_equal in (("evidence-mixed", False), ("evidence-zero", True)):
        losses = [r["losses"]["fused"][method] for r in (limited.result, everyone)]
        assert (losses[0] == losses[1]) == is_equal


@pytest.mark.parametrize("merges", [(), ("average", "ties")])
def test_the_charter_says_which_merges_are_reported(cooperative, plugins, tmp_path, merges):
    base, contributions = cooperative
    charter = build_charter(base, compare=(), merges=merges)
    result = fuse(base, charter, contributions, tmp_path, plugins=plugins).result
    jsonschema.validate(result, SCHEMA)
    reported = {"weight_average", "ties"} & result["equal_weight"].keys()
    assert reported == ({"weight_average", "ties"} if merges else set())
    assert reported <= result["baseline_gain_percent"].keys()
