"""The studies `routers` and `monolithic` from plan to summary, on the smallest models."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure as Canvas
from molora_studies.framework.contract import Summary
from molora_studies.framework.fusions import load_evaluation, open_fusion
from molora_studies.framework.registry import load_studies
from molora_studies.framework.substrate import BaseSettings
from molora_studies.kalavai.comparisons import Replicated
from molora_studies.kalavai.merge_tuning import TRIES
from molora_studies.kalavai.method_table import MethodRow, tabulate
from molora_studies.kalavai.monolithic import MonolithicOptions, MonolithicStudy
from molora_studies.kalavai.rivals import RivalOptions, claim_rivals, wide_base
from molora_studies.kalavai.routers import RoutersOptions, RoutersStudy
from molora_studies.verdicts import Span
from study_tasks import DOMAINS, Run, running

from molora_fed.plugins import load_plugins
from molora_fed.storage.options import open_callable

SHARED: Mapping[str, Any] = {
    "base": BaseSettings(
        hidden=32, layers=2, heads=2, vocab_size=290, steps=8, domains=DOMAINS
    ).model_dump(),
    "domains": DOMAINS,
    "steps": 12,
    "calibration": 10,
    "held_out": 10,
    "seeds": (1, 2),
}
ROUTERS = RoutersOptions(
    **SHARED,
    joint_steps=4,
    rivals=("monolithic", "joint"),
    routers={
        "evidence": {},
        "statistics": {},
        "linear": {"steps": 5},
        "linear-base": {"router": "linear", "input": "base_hidden", "steps": 5},
        "dispatch": {},
        "uniform": {},
    },
    published={
        label: {} if label == "uniform" else {"steps": 3}
        for label in ("uniform", "linear", "linear-noncausal", "mlp", "hard")
    },
)
MONOLITHIC = MonolithicOptions(**SHARED, rivals=("base_continued", "monolithic"), shares=(0.5,))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with running(tmp_path_factory.mktemp("tasks")) as run_task:
        yield run_task


def summarise(study: Any, options: Any, run: Run) -> Summary:
    results = {cell.name: run(cell.task).result for cell in study.plan(options)}
    summary: Summary = study.summarise(options, results)
    again: Summary = study.summarise(options, json.loads(json.dumps(results)))
    assert json.dumps(summary.findings, allow_nan=False) == json.dumps(again.findings)
    assert (summary.claims, summary.tables) == (again.claims, again.tables)
    for figure in summary.figures:
        figure.draw(Canvas())
    return summary


def test_routers_study_lists_every_method_once_and_judges_the_paper(run: Run) -> None:
    summary = summarise(RoutersStudy, ROUTERS, run)
    names = [row[0] for row in summary.tables[0].rows]
    assert len(names) == len(set(names))
    expected = {*ROUTERS.routers, "monolithic", "joint", "weight_average", "ties", "dare"}
    assert expected < set(names)
    assert {"base", "domain_oracle"} < set(names)
    assert any(name.startswith("best specialist") for name in names)
    losses = [float(row[2].split()[0]) for row in summary.tables[0].rows]
    assert losses == sorted(losses)
    assert all(len(row) == len(summary.tables[0].columns) for row in summary.tables[0].rows)
    claims = {claim.claim for claim in summary.claims}
    assert {
        "Equal gates lose against the best specialist",
        "A linear router gains against the best specialist",
        "Averaging weights loses against the best specialist",
        "Dispatch to one specialist loses against the best specialist",
        "MLP and hard routing are as good as the linear router",
        "Joint training of experts and router beats our fusion",
    } < claims
    assert all("2 seeds" in claim.measured for claim in summary.claims)


def test_differences_are_those_of_the_mean_over_seeds(run: Run) -> None:
    cells = {cell.name: cell.task for cell in RoutersStudy.plan(ROUTERS)}
    found = run(cells["ours, differences"]).result["differences"]["fused:evidence - joint"]
    fusions = [load_evaluation(run(cells[f"ours seed {seed}"]).folder) for seed in (1, 2)]
    each = [e.equal_weight("fused:evidence") - e.equal_weight("joint") for e in fusions]
    assert found["seeds"] == pytest.approx(each)
    assert found["point"] == pytest.approx(sum(each) / 2)
    assert found["low"] <= found["point"] <= found["high"]


def test_monolithic_study_shares_its_trainings_with_the_other(run: Run) -> None:
    summary = summarise(MonolithicStudy, MONOLITHIC, run)
    assert summary.findings["steps"] == {
        "base_continued": 24,
        "monolithic": 24,
        "monolithic-12": 12,
        "evidence": 24,
        "linear": 24,
    }
    assert len(summary.claims) == 3
    keys = [
        {task.key for cell in study.plan(options) for task in cell.task.walk()}
        for study, options in ((RoutersStudy, ROUTERS), (MonolithicStudy, MONOLITHIC))
    ]
    trained = [
        task
        for cell in MonolithicStudy.plan(MONOLITHIC)
        for task in cell.task.walk()
        if task.name.startswith("pooled") and task.settings["steps"] == 24
    ]
    assert trained and all(task.key in keys[0] & keys[1] for task in trained)


def test_default_plans_are_registered_and_within_the_hour():
    registry = load_studies().registry
    for name in ("routers", "monolithic"):
        study = registry.resolve(name)
        cells = study.plan(study.Options())
        assert len({cell.name for cell in cells}) == len(cells)
        tasks = {task.key: task for cell in cells for task in cell.task.walk()}
        assert sum(task.seconds for task in tasks.values()) < 4 * 3600


def test_a_base_from_elsewhere_has_no_wider_one():
    options = RivalOptions(base=BaseSettings(source="folder/of/a/base"))
    assert options.chosen == ("base_continued", "monolithic", "joint")
    assert wide_base(RivalOptions()).hidden == 264


def test_rivals_whose_recipe_was_not_tuned_carry_no_verdict():
    sure = Replicated([-0.1, -0.11, -0.1], [Span(-0.12, -0.09)], -0.1)
    claims = claim_rivals({("evidence", "wider"): sure, ("evidence", "joint"): sure})
    assert [claim.verdict for claim in claims] == ["not tuned"] * 2
    assert all("no verdict until" in claim.reason for claim in claims)
    assert all("-0.1000 nats" in claim.measured for claim in claims)


def test_tables_say_what_is_trained_and_what_was_not_tuned():
    loss = {"point": 3.0, "low": 2.9, "high": 3.1}
    kinds = {"monolithic-12": "trained", "base_continued": "trained", "wider": "trained",
             "joint": "trained", "ties": "merge", "weight_average": "merge"}  # fmt: skip
    rows = [MethodRow(name, kind, loss, [3.0], None, None) for name, kind in kinds.items()]
    shown = {row[0]: row[1] for row in tabulate("t", rows, {}).rows}
    assert shown["monolithic-12"] == "trained: linear layers, pooled text"
    assert shown["base_continued"] == "trained: all parameters, pooled text"
    assert shown["weight_average"] == "merge"
    assert all(shown[name].endswith("; not tuned") for name in ("wider", "joint", "ties"))


def test_merges_are_tuned_on_calibration_text_alone_and_judged_over_seeds(run: Run):
    cells = {cell.name: cell for cell in RoutersStudy.plan(ROUTERS)}
    results = [run(cells[f"tuned merges seed {seed}"].task).result for seed in ROUTERS.seeds]
    for result in results:
        for name, tries in TRIES.items():
            found = result["merges"][name]
            assert [{k: t[k] for k in ("density", "scale")} for t in found["tries"]] == list(tries)
            best = min(found["tries"], key=lambda one: one["loss"])
            assert found["chosen"] == {"density": best["density"], "scale": best["scale"]}
            assert found["loss"] not in [one["loss"] for one in found["tries"]]
            assert found["difference"]["low"] <= found["difference"]["high"]
    # As many tries as ours: the default study has six evidence routers.
    ours = [label for label in RoutersOptions().routers if label.startswith("evidence")]
    assert {len(tries) for tries in TRIES.values()} == {len(ours)}
    claims = {c.claim: c for c in summarise(RoutersStudy, ROUTERS, run).claims}
    claim = claims["Our fusion beats `ties` with tuned density and scale"]
    assert claim.unit == "training seed (2), and document cluster at every seed"


def test_a_merge_as_registered_is_one_of_its_tries(run: Run):
    fusion = {cell.name: cell for cell in RoutersStudy.plan(ROUTERS)}["ours seed 1"].task
    done = run(fusion)
    adapters = open_fusion(fusion.settings, [run(need) for need in fusion.needs], done.folder)
    merges = load_plugins().merges
    plain, same, half = (
        open_callable(merges, "ties", chosen)(adapters.load_adapters(), name="ties", seed=1)
        for chosen in ({}, {"density": 0.2, "scale": 1.0}, {"density": 0.2, "scale": 0.5})
    )
    assert plain.hash == same.hash != half.hash
    for module, update in plain.updates.items():
        assert torch.equal(half.updates[module].product(), 0.5 * update.product())
    assert {"density": 0.2, "scale": 1.0} in TRIES["ties"]
