"""The study of a pretrained base on the smallest base there is, from its plan to its page."""

import pytest
from molora_studies.framework.contract import Cell
from molora_studies.framework.substrate import BaseSettings
from molora_studies.kalavai.real_base import RealBaseOptions, RealBaseStudy
from study_tasks import DOMAINS, running

TINY = RealBaseOptions(
    seeds=(1, 2),
    base=BaseSettings(
        hidden=32, layers=2, heads=2, vocab_size=400, steps=60, domains=DOMAINS[:2],
        dtype="bfloat16",
    ),
    known=DOMAINS[:1],
    foreign=DOMAINS[1:2],
    steps=10,
    rank=2,
    lora={"rates": (1e-3, 3e-3), "rate": 3e-3},
    pooled_lora={"rates": (3e-3,), "rate": 3e-3},
    base_continued={"rates": (1e-3,), "rate": 1e-3},
    svd={"rates": (1e-3,), "rate": 1e-3},
    validation=2,
    pilot_blocks=4,
    merge_blocks=2,
    calibration=8,
    held_out=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with running(tmp_path_factory.mktemp("tasks")) as run_task:
        yield run_task


@pytest.fixture(scope="module")
def cells() -> dict[str, Cell]:
    return {cell.name: cell for cell in RealBaseStudy.plan(TINY)}


@pytest.fixture(scope="module")
def results(cells, run):
    return {name: run(cell.task).result for name, cell in cells.items()}


def test_rivals_take_as_many_tokens_as_all_specialists_together(cells, results, run):
    fusion = cells["lora seed 2"].task
    specialists = [task for task in fusion.needs if task.action == "train-domain"]
    rivals = [t for t in fusion.needs if t.action in ("train-pooled", "continue-whole")]
    tokens = sum(run(task).result["tokens"] for task in specialists)
    assert len(specialists) == len(rivals) == 2
    assert [run(task).result["tokens"] for task in rivals] == [tokens, tokens]
    kinds = {run(task).result.get("kind") for task in rivals}
    assert kinds == {"lora", None}  # of the base continued there is no adapter


def test_every_rate_is_tried_at_the_first_seed_and_one_is_taken(cells):
    tried = [cell for cell in cells.values() if "rate" in cell.labels]
    assert {cell.task.settings["seed"] for cell in tried} == {1}
    assert len(tried) == 2 * 2 + 1 + 1 + 2  # two domains for specialists, all text for rivals
    trained = {t.key for t in cells["lora seed 1"].task.needs if t.action == "train-domain"}
    assert trained == {c.task.key for n, c in cells.items() if n.startswith("lora ")
                       and n.endswith("at 0.003")}  # fmt: skip


def test_all_methods_are_measured_on_the_same_blocks(results):
    for seed in TINY.seeds:
        losses = results[f"lora seed {seed}"]["evaluation"]["equal_weight"]
        assert {"pooled_lora", "base_continued", "weight_average", "fused:evidence-mixed",
                "domain_oracle"} <= set(losses)  # fmt: skip
        assert set(results[f"tuned merges seed {seed}"]["merges"]) == {"ties", "dare", "dare-ties"}
        assert set(results[f"lora seed {seed}"]["clusters"]) == set(DOMAINS[:2])


def test_the_page_states_verdict_unit_and_rival(results):
    summary = RealBaseStudy.summarise(TINY, results)
    texts = {claim.claim: claim for claim in summary.claims}
    assert all("training seed (2)" in c.unit or "condition (1)" in c.unit for c in texts.values())
    rivals = [claim for text, claim in texts.items() if "everybody's text" in text]
    assert len(rivals) == 2
    assert all("at the best of 1 rates" in claim.reason for claim in rivals)
    # Nothing is judged against a rival whose rate is not the best of those that were tried.
    better = {**results, "pooled_lora everybody's text at 0.5": {"loss": 0.0}}
    pooled = {**TINY.pooled_lora.model_dump(), "rates": (3e-3, 0.5)}
    other = RealBaseOptions.model_validate({**TINY.model_dump(), "pooled_lora": pooled})
    found = [c.verdict for c in RealBaseStudy.summarise(other, better).claims if "LoRA" in c.claim]
    assert found == ["not tuned"]
    stages = {line["stage"] for line in summary.findings["forecasts"]}
    assert stages == {"pilots", "before fusing"}
    assert set(summary.findings["bytes"]) == set(DOMAINS[:2])
    table = next(t for t in summary.tables if t.title.startswith("Every router"))
    kinds = {row[0]: row[1] for row in table.rows}
    assert kinds["pooled_lora"] == "trained: one LoRA adapter, pooled text"
    assert kinds["base_continued"] == "trained: all parameters, pooled text"
