"""Studies of evolved populations: plans that share work, tiny runs, verdicts on made-up figures."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from molora_studies.evolution.base_perturbation import (
    BasePerturbationOptions,
    BasePerturbationStudy,
)
from molora_studies.evolution.factorial import FactorialOptions, FactorialStudy
from molora_studies.evolution.inheritance import InheritanceOptions, InheritanceStudy
from molora_studies.evolution.substrate import LIFECYCLE, EvolutionSettings, plan_evolution
from molora_studies.evolution.substrate_actions import evolve_population
from molora_studies.framework.contract import Cell, Summary, Task, TaskContext
from study_tasks import DOMAINS, Run, running

from molora_fed.models.fingerprints import fingerprint_tokenizer

TINY = FactorialOptions(
    seeds=(1, 2),
    domains=DOMAINS,
    hidden=32,
    layers=2,
    block_size=16,
    vocabularies=(300,),
    base_steps=12,
    specialist_steps=6,
    slots=3,
    rank=2,
    start_steps=3,
    generations=2,
    steps=2,
    train_blocks=12,
    calibration=60,
    held_out=8,
    parts=False,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Iterator[Run]:
    with running(tmp_path_factory.mktemp("studies")) as run_task:
        yield run_task


def plan_tiny(**changes: Any) -> Task:
    settings = EvolutionSettings(**{"batch": 2, "lifecycle": LIFECYCLE, **changes})
    return plan_evolution(TINY, settings, seed=1, vocabulary=300)


def test_a_bare_lifecycle_replaces_one_adapter_a_generation(run):
    done = run(plan_tiny())
    found = done.result
    assert found["births"] == TINY.generations and found["kept"] == [True, True]
    assert found["steps"] == TINY.start_steps + TINY.generations * TINY.steps
    assert found["fitness_measurements"] == TINY.generations
    assert sum(slot.startswith("g0") for slot in found["slots"]) >= 1
    assert set(found["held_out"]) == set(found["base"]) == set(DOMAINS)
    assert not (done.folder / "evolution").exists()


def test_evolving_again_gives_the_same_figures(run, tmp_path):
    task = plan_tiny(router="softmax-embedding-mean", lifecycle=())
    first = run(task).result
    context = TaskContext(tmp_path, tuple(run(need) for need in task.needs), 1, tmp_path)
    assert evolve_population(task.settings, context) == first
    assert first["births"] == 0


def test_the_vocabulary_is_the_same_at_all_seeds(run):
    bases = [
        plan_evolution(TINY, EvolutionSettings(), seed=seed, vocabulary=300).needs[0]
        for seed in TINY.seeds
    ]
    found = {fingerprint_tokenizer(run(base).folder / "base") for base in bases}
    assert len({base.key for base in bases}) == 2 and len(found) == 1


def test_noise_on_the_base_changes_it_and_its_adapters_are_transplanted(run):
    task = plan_evolution(
        TINY, EvolutionSettings(batch=2), seed=1, vocabulary=300, perturbation=0.3
    )
    found = run(task).result
    unmoved = run(plan_tiny(lifecycle=())).result
    assert found["base"] != unmoved["base"]
    assert all(np.isfinite(loss) for loss in found["held_out"].values())


def test_the_design_has_all_cells_and_shares_what_is_one_population():
    options = FactorialOptions()
    cells = FactorialStudy.plan(options)
    design = [cell for cell in cells if "router" in cell.labels]
    assert len(design) == 8 * len(options.seeds) * len(options.vocabularies)
    assert len({cell.task.key for cell in design}) == len(design) * 6 // 8
    assert len(cells) - len(design) == 8 * len(options.seeds)
    assert {cell.task.settings["start_steps"] for cell in cells} == {250}
    total = options.start_steps + options.generations * options.steps
    assert total >= 1000 and len(options.seeds) >= 5
    ratios = [options.hidden / v for v in options.vocabularies]
    assert ratios == pytest.approx([0.047, 0.094], abs=5e-4)


def test_all_three_studies_share_work_and_fit_into_ninety_minutes_of_four_cores():
    cells = {
        study: study.plan(study.Options())
        for study in (FactorialStudy, InheritanceStudy, BasePerturbationStudy)
    }
    keys = {study: {cell.task.key for cell in own} for study, own in cells.items()}
    seeds = len(FactorialOptions().seeds)
    # alpha = 0.5 and no lifecycle; no noise with and without a lifecycle
    assert len(keys[FactorialStudy] & keys[InheritanceStudy]) == 2 * seeds
    assert len(keys[FactorialStudy] & keys[BasePerturbationStudy]) == 2 * seeds
    tasks = {t.key: t for own in cells.values() for cell in own for t in cell.task.walk()}
    assert sum(task.seconds for task in tasks.values()) < 4 * 90 * 60


def make_summary(loss: Callable[[Mapping[str, Any], str], float], **changes: Any) -> Summary:
    options = FactorialOptions(seeds=(1, 2, 3, 4, 5, 6), **changes)

    def make(cell: Cell) -> dict[str, Any]:
        random = np.random.default_rng([cell.labels["seed"], len(cell.name)])
        wiggle = 5e-4 * random.normal()
        return {
            "base": dict.fromkeys(options.domains, 4.5),
            "held_out": {d: loss(cell.labels, d) + wiggle for d in options.domains},
            "births": 5 if cell.labels.get("lifecycle") else 0,
            "steps": 1000,
            "fitness_measurements": 5,
        }

    cells = FactorialStudy.plan(options)
    summary = FactorialStudy.summarise(options, {cell.name: make(cell) for cell in cells})
    for figure in summary.figures:
        figure.draw(Figure())
    return summary


def test_figures_like_the_papers_hold():
    def loss(labels: Mapping[str, Any], domain: str) -> float:
        if "router" not in labels:
            return 4.0
        return 4.0 - 0.0426 * labels["router"] + 0.028 * labels["lifecycle"]

    claims = {claim.claim: claim for claim in make_summary(loss).claims}
    ratio = "(D/V = 0.047)"
    assert claims[f"The rewritten router helps {ratio}"].verdict in ("holds", "differs")
    assert claims[f"The fitness scope makes no difference {ratio}"].verdict == "holds"
    assert claims[f"The bare lifecycle harms {ratio}"].verdict in ("holds", "differs")
    assert claims["An arithmetic aggregator can flip a conclusion"].verdict == "not decided"


def test_the_aggregators_can_disagree_on_an_effect():
    def loss(labels: Mapping[str, Any], domain: str) -> float:
        if not labels.get("router"):
            return 3.0
        return 4.2 if domain == "science" else 2.55  # better on the mean loss, else worse

    summary = make_summary(loss, vocabularies=(2048,))
    effects = summary.findings["effects"]
    assert effects["2048 balanced"]["router"]["mean"] > 0.03
    assert effects["2048 arithmetic"]["router"]["mean"] < -0.1
    assert summary.claims[-1].verdict == "holds"


def summarise_simply(
    study: Any, options: Any, loss: Callable[[Mapping[str, Any]], float]
) -> Summary:
    def make(cell: Cell) -> dict[str, Any]:
        random = np.random.default_rng([cell.labels["seed"], len(cell.name)])
        nats = loss(cell.labels) + 5e-4 * random.normal()
        return {"base": {"a": 4.5, "b": 4.6}, "held_out": {"a": nats, "b": nats}, "births": 5}

    cells = study.plan(options)
    summary = study.summarise(options, {cell.name: make(cell) for cell in cells})
    for figure in summary.figures:
        figure.draw(Figure())
    return summary


def test_inheritance_that_matters_refutes_the_paper_and_shows_its_trend():
    options = InheritanceOptions()
    summary = summarise_simply(
        InheritanceStudy, options, lambda labels: 4.0 - 0.1 * (labels["alpha"] or 0.0)
    )
    assert summary.findings["trend_per_unit_of_alpha"]["mean"] == pytest.approx(0.1, abs=2e-3)
    assert summary.claims[0].verdict == "does not hold"
    same = summarise_simply(InheritanceStudy, options, lambda labels: 4.0)
    assert same.claims[0].verdict == "holds"  # shown to lie within the margin
    assert same.claims[0].unit == "seed of everything but the documents (6)"


def test_a_lifecycle_that_only_perturbed_bases_need_depends_on_the_base():
    options = BasePerturbationOptions()
    same = summarise_simply(
        BasePerturbationStudy, options, lambda labels: 4.0 + 0.03 * labels["lifecycle"]
    )
    assert [claim.verdict for claim in same.claims] == ["holds", "holds"]
    needed = summarise_simply(
        BasePerturbationStudy,
        options,
        lambda labels: 4.0 - labels["lifecycle"] * labels["perturbation"],
    )
    assert [claim.verdict for claim in needed.claims] == ["does not hold", "does not hold"]
    assert needed.findings["change"]["noise 0.2"]["mean"] == pytest.approx(0.2, abs=2e-3)
