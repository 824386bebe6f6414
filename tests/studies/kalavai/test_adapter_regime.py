"""The study of adapters: derived ones are what they say, and verdicts follow from the figures."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from matplotlib.figure import Figure
from molora_studies.framework.contract import Done
from molora_studies.kalavai.adapter_regime import (
    AdapterRegimeOptions,
    AdapterRegimeStudy,
    Recipe,
    Size,
    Variant,
)
from molora_studies.kalavai.adapter_summary import summarise_adapters
from study_tasks import DOMAINS, running

from molora_fed.adapters.files import load_adapter
from molora_fed.adapters.updates import truncate

EXACT = Variant(kind="delta", precision="float32")
SMALL = Variant(rank=4, precision="int4")
BUDGET = Variant(rank=32, budget_percent=40)
LORA = Recipe(
    label="lora r4",
    training={"rank": 4, "learning_rate": 1e-2},
    fused=True,
    confirmed=True,
)
SHORT = Recipe(
    label="lora attention",
    training={"rank": 2, "options": {"targets": "attention"}},
    domains=DOMAINS[:1],
)
OPTIONS = AdapterRegimeOptions(
    seeds=(1, 2),
    sizes=(
        Size(
            label="D=32",
            base={
                "hidden": 32,
                "layers": 2,
                "heads": 2,
                "vocab_size": 290,
                "steps": 30,
                "domains": DOMAINS,
                "threads": 1,
            },
            domains=DOMAINS,
            specialist={"steps": 20, "validate_every": 10, "learning_rate": 3e-3},
            fusion={"calibration": 6, "held_out": 6},
            screened=(EXACT, SMALL, BUDGET),
            confirmed=(EXACT, SMALL),
            recipes=(LORA, SHORT),
            blocks=6,
        ),
    ),
)
CELLS = {cell.name: cell for cell in AdapterRegimeStudy.plan(OPTIONS)}


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Iterator[Mapping[str, Done]]:
    with running(tmp_path_factory.mktemp("tasks")) as run:
        yield {name: run(cell.task) for name, cell in CELLS.items()} | {
            task.name: run(task) for cell in CELLS.values() for task in cell.task.walk()
        }


def test_every_seed_trains_each_domain_fully_once():
    tasks = {task.key: task for cell in CELLS.values() for task in cell.task.walk()}
    full = [task for task in tasks.values() if task.settings.get("kind") == "delta"
            and task.action == "train-domain"]  # fmt: skip
    assert len(full) == len(DOMAINS) * len(OPTIONS.seeds)


def test_the_whole_difference_keeps_the_whole_gain(done):
    result = done["D=32 delta float32"].result
    assert result["kept_percent"] == pytest.approx({"point": 100, "low": 100, "high": 100})
    assert result["bytes"] == result["full_bytes"]
    screened = done["D=32 screening birds"].result
    assert screened["variants"]["delta float32"]["loss"] == screened["full_loss"]
    assert screened["full_loss"] < screened["base_loss"]


def test_a_budget_is_of_the_full_difference_s_bytes(done):
    screened = done["D=32 screening birds"].result
    share = screened["variants"][BUDGET.label]["bytes"] / screened["full_bytes"]
    assert 0.2 < share <= 0.4


def test_derived_factors_are_the_best_ones_of_the_full_difference(done):
    full = load_adapter(done["birds delta 20 steps seed=1"].folder / "adapter")
    small = load_adapter(done["svd r4 int4 of D=32 birds seed=1"].folder / "adapter")
    assert small.kind == "svd" and small.base_weights == full.base_weights
    for name, update in small.updates.items():
        a, b = truncate(full.updates[name].product(), 4)
        best = b @ a
        assert (update.product() - best).norm() < 0.25 * best.norm()


def test_a_fusion_of_small_adapters_is_compared_seed_by_seed(done):
    result = done["D=32 svd r4 int4"].result
    kept = result["kept_percent"]
    assert kept["low"] <= kept["point"] <= kept["high"]
    assert len(result["kept_percent_by_seed"]) == result["seeds"] == 2
    assert result["bytes"] < result["full_bytes"]
    assert set(result["gains"]["small"][0]) >= {"best_alone", "best_specialist"}


def test_recipes_keep_their_curve(done):
    result = done["D=32 lora attention birds seed 1"].result
    assert [step for step, _ in result["curve"]][-1] == 20
    assert result["kind"] == "lora"
    adapter = load_adapter(done["lora attention: birds lora 20 steps seed=1"].folder / "adapter")
    assert all(".attention." in name for name in adapter.updates)


def test_the_summary_has_every_part_and_draws(done):
    results = {name: done[name].result for name in CELLS}
    summary = AdapterRegimeStudy.summarise(OPTIONS, results)
    assert [len(table.rows) for table in summary.tables] == [3, 3, 2]
    assert [claim.claim.partition(":")[0] for claim in summary.claims[:1]] == ["D=32"]
    assert summary.claims[-1].claim.startswith("D=32, lora r4")
    for figure in summary.figures:
        figure.draw(Figure())


def fusion(variant: str, share: float, low: float, seeds: int = 3) -> tuple[Any, Any]:
    labels = {"size": "D=1", "part": "fusion", "variant": variant}
    gains = {"best_alone": 5.0, "best_specialist": 6.0}
    return labels, {
        "kept_percent": {"point": low + 2, "low": low, "high": low + 4},
        "kept_percent_by_seed": [low + 2] * seeds,
        "small_gain_percent_by_seed": [5.0] * seeds,
        "full_gain_percent_by_seed": [6.0] * seeds,
        "gains": {"full": [gains] * seeds, "small": [gains] * seeds},
        "full_bytes": 1000.0,
        "bytes": 10.0 * share,
        "seeds": seeds,
    }


@pytest.mark.parametrize(
    ("rows", "verdict", "named"),
    [
        ([fusion("a", 20, 95), fusion("b", 5, 90), fusion("c", 2, 80)], "holds", "b:"),
        ([fusion("a", 20, 95), fusion("b", 5, 84.9)], "not decided", "b:"),
        ([fusion("a", 20, 95), fusion("b", 5, 80)], "differs", "a:"),
        ([fusion("a", 20, 80), fusion("b", 5, 70)], "does not hold", "b:"),
        ([fusion("a", 20, 95), fusion("b", 5, 95, seeds=1)], "differs", "a:"),
    ],
)
def test_the_smallest_adapter_is_the_one_whose_interval_is_above(rows, verdict, named):
    claim = summarise_adapters(rows, kept_percent=85, bytes_percent=10).claims[0]
    assert claim.verdict == verdict
    assert named in claim.measured


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [((5.4, 5.4, 5.5), "holds"), ((4.9, 5.4, 5.9), "not decided"), ((4.0, 4.1, 4.2), "does not")],
)
def test_the_published_gain_has_its_own_reference(gains, verdict):
    labels, result = fusion("a", 5, 90)
    result["gains"]["small"] = [{"best_alone": 5.0, "best_specialist": gain} for gain in gains]
    claims = summarise_adapters([(labels, result)], kept_percent=85, bytes_percent=10).claims
    assert claims[1].verdict.startswith(verdict)


def test_an_adapter_that_keeps_enough_on_documents_alone_is_not_decided():
    labels, result = fusion("a", 5, 86)
    result["kept_percent_by_seed"] = [86.0, 92.0, 86.0]  # 88 on average, from 79.4 over seeds
    claim = summarise_adapters([(labels, result)], kept_percent=85, bytes_percent=10).claims[0]
    assert claim.verdict == "not decided"
    assert claim.unit == "training seed (3), and document cluster of the mean"


@pytest.mark.parametrize(
    ("loss", "seeds", "verdict"),
    [(3.9, 3, "does not hold"), (4.1, 3, "holds"), (3.9, 1, "not decided")],
)
def test_lora_that_improves_and_fuses_refutes_the_claim(loss, seeds, verdict):
    recipe = {
        "base_loss": 4.0,
        "loss": loss,
        "initial_loss": 4.0,
        "curve": [[10, loss]],
        "best_step": 10,
        "adapter_bytes": 5,
    }
    labels = {"size": "D=1", "part": "recipe", "recipe": "lora r4", "domain": "d"}
    trained = [({**labels, "seed": seed}, recipe) for seed in range(seeds)]
    rows = [fusion("lora r4", 5, 90), *trained]
    claims = summarise_adapters(rows, kept_percent=85, bytes_percent=10).claims
    assert claims[-1].verdict == verdict
