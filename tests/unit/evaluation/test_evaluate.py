"""The evaluator against plain computations on a made-up bank."""

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from molora_kalavai.evidence import ZeroTrainingEvidenceRouter
from molora_kalavai.linear import LinearOptions, LinearRouter

from molora_fed.bank import HeldOutBank
from molora_fed.errors import BankError, ShapeError
from molora_fed.evaluation.bootstrap import ClusterIndex
from molora_fed.evaluation.evaluate import (
    Evaluation,
    compute_domain_losses,
    compute_router_losses,
    evaluate,
)
from molora_fed.testing import build_synthetic_bank

SCHEMA = Path(__file__).parents[3] / "docs" / "report.schema.json"


@pytest.fixture(scope="module")
def bank():
    return build_synthetic_bank(HeldOutBank, seed=3)


@pytest.fixture(scope="module")
def routers():
    calibration = build_synthetic_bank()
    return {
        "evidence-zero": ZeroTrainingEvidenceRouter(3),
        "linear": LinearRouter.fit(calibration, LinearOptions(learning_rate=0.02), 0),
    }


def measure(bank, routers):
    average = bank.base_nll() + 0.5
    return evaluate(bank, routers, {"weight_average": average, "control": average - 1}, seed=1)


@pytest.fixture(scope="module")
def evaluation(bank, routers):
    return measure(bank, routers)


def mean_by_domain(bank, nll):
    return {
        domain: nll[torch.from_numpy(bank.domain_of == index)].double().mean().item()
        for index, domain in enumerate(bank.domains)
    }


def test_losses_of_everything_anyone_has_alone(bank, evaluation):
    losses = evaluation.to_json()["losses"]
    assert losses["base"] == pytest.approx(mean_by_domain(bank, bank.base_nll()))
    for expert, name in enumerate(bank.expert_names):
        expected = mean_by_domain(bank, bank.expert_nll(expert))
        assert losses["specialists"][name] == pytest.approx(expected)
    assert losses["weight_average"] == pytest.approx(
        {domain: loss + 0.5 for domain, loss in losses["base"].items()}
    )
    assert losses["control"]["domain-0"] == pytest.approx(losses["base"]["domain-0"] - 0.5)


def test_oracles(bank, evaluation):
    losses = evaluation.to_json()["losses"]
    alone = [losses["base"], *losses["specialists"].values()]
    for domain in bank.domains:
        best = min(table[domain] for table in alone)
        assert losses["domain_oracle"][domain] == pytest.approx(best)
    nll = torch.stack([bank.base_nll(), *(bank.expert_nll(e) for e in range(3))]).amin(0)
    assert losses["token_oracle"] == pytest.approx(mean_by_domain(bank, nll))


def test_uniform_and_routers(bank, routers, evaluation):
    losses = evaluation.to_json()["losses"]
    everything = slice(0, bank.num_blocks)
    uniform = -bank.logprob[:, 1:].exp().mean(-1).log()
    assert losses["uniform"] == pytest.approx(mean_by_domain(bank, uniform), abs=1e-6)
    for name, router in routers.items():
        gates = router.gates(bank.view(everything))
        expected = mean_by_domain(bank, bank.nll(gates, everything))
        assert losses["fused"][name] == pytest.approx(expected, abs=1e-6)
        mean = gates[:, :-1][torch.from_numpy(bank.domain_of == 1)].mean((0, 1))
        found = evaluation.gates[name]["domain-1"]
        assert list(found.values()) == pytest.approx(mean.tolist(), abs=1e-5)
        assert list(found) == list(bank.expert_names)


def test_gains_and_gaps_are_of_equal_weight_losses(evaluation):
    result = evaluation.to_json()
    losses, points = result["losses"], result["equal_weight"]
    for method, table in (
        ("base", losses["base"]),
        ("fused:linear", losses["fused"]["linear"]),
        ("specialist:expert-1", losses["specialists"]["expert-1"]),
        ("domain_oracle", losses["domain_oracle"]),
    ):
        assert points[method]["point"] == pytest.approx(np.mean(list(table.values())))
        assert points[method]["low"] <= points[method]["point"] <= points[method]["high"]
    best = min(points[f"specialist:expert-{e}"]["point"] for e in range(3))
    fused = points["fused:linear"]["point"]
    gains = result["gain_percent"]["linear"]
    assert gains["vs_best_specialist"] == pytest.approx(100 * (best - fused) / best)
    alone = min(best, points["base"]["point"])
    assert gains["vs_best_alone"] == pytest.approx(100 * (alone - fused) / alone)
    assert result["best_specialist"]["loss"] == pytest.approx(best)
    assert result["best_alone"]["loss"] == pytest.approx(alone)
    gap = result["oracle_gap_nats"]["linear"]
    assert gap["point"] == pytest.approx(fused - points["domain_oracle"]["point"])
    assert gap["low"] <= gap["point"] <= gap["high"]
    interval = result["gain_interval_percent"]["linear"]["vs_best_alone"]
    assert interval["low"] <= gains["vs_best_alone"] <= interval["high"]


def test_paired_differences_are_tighter_than_the_losses(evaluation):
    result = evaluation.to_json()
    gap = result["oracle_gap_nats"]["evidence-zero"]
    loss = result["equal_weight"]["fused:evidence-zero"]
    assert gap["high"] - gap["low"] < loss["high"] - loss["low"]


def test_same_seed_same_bytes_and_the_published_schema(bank, routers, evaluation):
    result = evaluation.to_json()
    again = measure(bank, routers).to_json()
    assert json.dumps(result, sort_keys=True) == json.dumps(again, sort_keys=True)
    schema = json.loads(SCHEMA.read_text())
    for part, value in result.items():
        jsonschema.validate(value, {"$defs": schema["$defs"], **schema["properties"][part]})


def test_base_as_an_expert_is_no_specialist(bank):
    from dataclasses import replace

    with_base = replace(
        bank, expert_names=("base", "expert-1", "expert-2"), has_base_expert=True, _derived={}
    )
    assert set(evaluate(with_base, {}).to_json()["losses"]["specialists"]) == {
        "expert-1",
        "expert-2",
    }


def test_domains_of_unequal_size_count_equally(bank):
    nll = torch.ones(bank.num_blocks, 23)
    nll[torch.from_numpy(bank.domain_of == 2)] = 4.0
    assert compute_domain_losses(bank, nll) == {"domain-0": 1, "domain-1": 1, "domain-2": 4}


def test_equal_weight_does_not_depend_on_the_size_of_domains():
    domain_of = np.array([0, 1, 1, 1])  # one block, and three
    clusters = ClusterIndex.build(np.repeat(np.arange(4)[:, None], 9, axis=1), domain_of)
    sums = {"base": clusters.sum(np.repeat(domain_of + 1.0, 8).astype(np.float32))}
    evaluation = Evaluation(("small", "large"), clusters, sums, {}, seed=0)
    assert evaluation.losses("base") == {"small": 1, "large": 2}
    assert evaluation.equal_weight("base") == 1.5


def test_uniform_gates_have_no_router(bank):
    found = compute_router_losses(bank, None)
    assert found.gates == pytest.approx(np.full((3, 3), 1 / 3))


def test_what_is_no_held_out_bank_is_refused(routers):
    with pytest.raises(BankError, match="expected a HeldOutBank, got CalibrationBank"):
        evaluate(build_synthetic_bank(), routers)


@pytest.mark.parametrize(
    "baselines",
    [
        {"control": torch.zeros(24, 24)},
        {"Wider": torch.zeros(24, 23)},
        {"fused:x": torch.zeros(24, 23)},
        {"base": torch.zeros(24, 23)},
        {"specialists": torch.zeros(24, 23)},
    ],
)
def test_misnamed_or_misshapen_baselines_are_refused(bank, baselines):
    with pytest.raises(BankError, match=next(iter(baselines))):
        evaluate(bank, {}, baselines)


def test_any_baseline_is_reported_with_its_gain(bank, routers, evaluation):
    wider = bank.base_nll() - 0.25
    found = evaluate(bank, routers, {"dare-ties": wider + 1, "wider": wider}, seed=1).to_json()
    losses = found["losses"]
    assert losses["wider"]["domain-0"] == pytest.approx(losses["base"]["domain-0"] - 0.25)
    gains = found["baseline_gain_percent"]
    assert {"base", "uniform", "wider", "dare-ties", "domain_oracle", "token_oracle"} == set(gains)
    alone = found["best_alone"]["loss"]
    point = found["equal_weight"]["wider"]["point"]
    gain = gains["wider"]["vs_best_alone"]
    assert gain["point"] == pytest.approx(100 * (alone - point) / alone)
    assert gain["low"] <= gain["point"] <= gain["high"]
    schema = json.loads(SCHEMA.read_text())
    for part, value in found.items():
        jsonschema.validate(value, {"$defs": schema["$defs"], **schema["properties"][part]})
    assert evaluation.to_json()["losses"]["fused"] == losses["fused"]


def test_a_difference_is_paired(bank, evaluation):
    found = evaluation.difference("weight_average", "base")
    assert found["point"] == pytest.approx(0.5)
    assert found["low"] == pytest.approx(0.5) and found["high"] == pytest.approx(0.5)
    fused = evaluation.difference("fused:linear", "domain_oracle")
    gap = evaluation.to_json()["oracle_gap_nats"]["linear"]
    assert fused == pytest.approx({key: gap[key] for key in ("point", "low", "high")})


def test_router_of_other_experts_is_refused(bank):
    with pytest.raises(ShapeError, match="evidence of 4 experts, got 3"):
        evaluate(bank, {"evidence": ZeroTrainingEvidenceRouter(4)})
