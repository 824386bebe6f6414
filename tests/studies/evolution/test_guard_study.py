"""The study of the guard: planted operators, populations that follow one another, verdicts."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from molora_studies.evolution.factorial import FactorialOptions, FactorialStudy
from molora_studies.evolution.guard import GuardOptions, GuardStudy
from molora_studies.evolution.guard_actions import Restore, Ruin, evolve_beside, wipe_slot
from molora_studies.evolution.guard_findings import measure_harm
from molora_studies.evolution.substrate_actions import evolve_population, open_replicate
from molora_studies.framework.contract import Cell, Summary, TaskContext
from molora_studies.framework.results import read_options
from study_tasks import DOMAINS, Run, running

from molora_fed.errors import ConfigError
from molora_fed.population.contract import Fitness, LifecycleState, OperatorOptions
from molora_fed.population.generations import evolve
from molora_fed.population.lifecycle import Step
from molora_fed.population.pooled import PooledData

TINY = GuardOptions(
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
    deltas=(0.002, -1.0),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Iterator[Run]:
    with running(tmp_path_factory.mktemp("studies")) as run_task:
        yield run_task


@pytest.fixture(scope="module")
def cells() -> dict[str, Cell]:
    own = [cell for cell in GuardStudy.plan(TINY) if cell.labels["seed"] == 1]
    return {cell.labels["what"]: cell for cell in own}


GUARDED, STRICT = "guarded lifecycle, delta 0.002", "guarded lifecycle, delta -1"


def test_following_another_evolution_changes_nothing(run, cells, tmp_path):
    task = cells["bare lifecycle"].task
    followed = run(task).result
    needs = tuple(run(need) for need in task.needs[:-1])
    alone = evolve_population(task.settings, TaskContext(tmp_path, needs, 1, tmp_path))
    assert {name: followed[name] for name in alone} == alone
    assert followed["comparisons"] == [] and followed["births"] == TINY.generations


def test_only_what_nothing_is_known_of_is_adapted(run, cells, monkeypatch, tmp_path):
    steps = []
    adapt = PooledData.adapt

    def count(self, branch, config, *others):
        steps.append(config.steps)
        return adapt(self, branch, config, *others)

    monkeypatch.setattr(PooledData, "adapt", count)
    task = cells["no lifecycle"].task
    needs = tuple(run(need) for need in task.needs)
    kept = run(task)
    assert (kept.folder / "evolution" / "generations").is_dir()
    followed = cells[STRICT].task
    context = TaskContext(tmp_path, (*needs, kept), 1, tmp_path)
    steps.clear()
    evolve_beside(followed.settings, context)
    assert steps == [TINY.steps] * TINY.generations  # the lifecycle branches, no twin


def test_a_guard_that_keeps_nothing_leaves_the_population_without_a_lifecycle(run, cells):
    none, strict = run(cells["no lifecycle"].task).result, run(cells[STRICT].task).result
    assert strict["clusters"] == none["clusters"] and strict["slots"] == none["slots"]
    assert strict["kept"] == [False] * TINY.generations
    levels = [one["level"] for one in strict["comparisons"]]
    assert levels == [1 - 0.05 / (TINY.generations * 2**k) for k in range(TINY.generations)]
    harm = measure_harm(strict["clusters"], none["clusters"])
    assert harm == {"effect": 0, "error": 0, "p": 1}


def test_planted_harm_is_what_an_evolution_with_that_operator_would_compare(run, cells, tmp_path):
    task = cells["planted operators"].task
    planted = run(task).result["planted"]
    expected = [(o, g) for g in range(1, TINY.generations + 1) for o in ("ruin", "restore")]
    assert [(one["operator"], one["generation"]) for one in planted] == expected
    replicate = open_replicate(task.settings, [run(need) for need in task.needs[:-1]], 1)
    evolved = evolve(
        replicate.start,
        replicate.data,
        (Step("ruin", Ruin(OperatorOptions())),),
        replicate.config,
        tmp_path,
        plugins=replicate.plugins,
    )
    assert evolved.compared[0].comparison == planted[0]["comparison"]


def test_measured_by_cluster_the_effect_is_that_of_the_balanced_loss(run, cells):
    none, bare = (run(cells[name].task).result for name in ("no lifecycle", "bare lifecycle"))
    harm = measure_harm(bare["clusters"], none["clusters"])
    means = [np.mean(list(one["held_out"].values())) for one in (none, bare)]
    assert harm["effect"] == pytest.approx(means[0] - means[1], abs=1e-9)
    assert harm["error"] > 0 and 0 < harm["p"] < 1


def make_state(run, cells):
    task = cells["planted operators"].task
    replicate = open_replicate(task.settings, [run(need) for need in task.needs[:-1]], 1)
    population = replicate.start.population
    shape = (population.num_slots, len(DOMAINS))
    values = np.array([0.1, 0.3, 0.2])
    fitness = Fitness("per-domain", values, values, np.zeros(shape), np.zeros(shape[1]))
    return LifecycleState(population, fitness, DOMAINS, 1)


def test_ruin_leaves_nothing_but_the_size_of_the_fittest_adapter(run, cells):
    state = make_state(run, cells)
    ruined = Ruin(OperatorOptions()).apply(state, 5)
    assert ruined.parents == {1: 1}
    before, after = state.population.slots[1].updates, ruined.population.slots[1].updates
    moved = 0
    for name, update in before.items():
        sizes = [torch.linalg.svdvals(u.product()) for u in (update, after[name])]
        assert torch.allclose(*sizes, atol=1e-5)
        moved += not torch.allclose(update.product(), after[name].product(), atol=1e-4)
    assert moved > 0
    again = Ruin(OperatorOptions()).apply(state, 5).population.slots[1].updates
    assert all(torch.equal(again[name].b, after[name].b) for name in after)


def test_what_is_wiped_is_restored(run, cells):
    state = make_state(run, cells)
    wiped = wipe_slot(state.population, 1, 7)
    assert all(not update.product().any() for update in wiped.slots[1].updates.values())
    back = Restore(1, state.population.slots[1].updates)
    restored = back.apply(replace(state, population=wiped), 0).population
    for name, update in state.population.slots[1].updates.items():
        assert torch.equal(restored.slots[1].updates[name].product(), update.product())
    assert restored.slots[1].birth.id == "g1-s1"


def test_ten_seeds_share_work_with_the_factorial_and_fit_into_ninety_minutes_of_a_core():
    options = GuardOptions()
    own = GuardStudy.plan(options)
    assert len({cell.name for cell in own}) == len({cell.task.key for cell in own}) == 50
    others = FactorialStudy.plan(FactorialOptions())
    done = {task.key for cell in others for task in cell.task.walk()}
    tasks = {task.key: task for cell in own for task in cell.task.walk()}
    assert sum(task.name.startswith(("base", "states")) for task in tasks.values()) == 20
    shared = [task for key, task in tasks.items() if key in done]
    assert sum(task.name.startswith(("base", "states")) for task in shared) == 12
    left = sum(task.seconds for key, task in tasks.items() if key not in done)
    assert left < 90 * 60


def test_a_lifecycle_that_divides_shares_what_has_no_lifecycle():
    whole, divided = (
        {cell.name: cell.task.key for cell in GuardStudy.plan(GuardOptions(divide=divide))}
        for divide in (False, True)
    )
    shared = {name for name in whole if whole[name] == divided[name]}
    assert len(shared) == 20  # no lifecycle, and planted operators
    assert not any("bare" in name or "guarded" in name for name in shared)


def test_fresh_guards_need_a_sample_a_generation(tmp_path):
    config = tmp_path / "guard.toml"
    config.write_text('guard = "fresh"\n')
    with pytest.raises(ConfigError, match="5 guard samples"):
        read_options(GuardStudy, "guard", config)
    config.write_text('guard = "fresh"\nguard_samples = 5\n')
    assert read_options(GuardStudy, "guard", config).guard_samples == 5


def compare(difference: float, error: float = 4e-4) -> dict[str, Any]:
    bound = difference + 2.5 * error
    return {
        "difference": difference,
        "error": error,
        "degrees": 50.0,
        "bound": bound,
        "level": 0.99,
        "delta": 0.002,
        "kept": bound <= 0.002,
    }


def summarise(harms: Mapping[str, float], *, ruin: float, help_: float) -> Summary:
    options = GuardOptions()
    random = np.random.default_rng(0)
    domain = np.repeat(np.arange(4), 20)

    def make(cell: Cell) -> dict[str, Any]:
        what, count = cell.labels["what"], options.generations
        if what == "planted operators":
            pairs = (("ruin", ruin), ("restore", help_))
            both = [{"operator": o, "comparison": compare(d)} for o, d in pairs]
            return {"planted": both * count}
        harm = harms.get(what, 0.0)
        rows = np.full(80, 300.0) + (harm * 100 + 0.1 * random.normal(size=80)) * (harm != 0)
        comparisons = [compare(harm / count)] * count if what.startswith("guarded") else []
        births = 0 if what == "no lifecycle" else count
        return {
            "held_out": {str(d): float(rows[domain == d].mean() / 100) for d in range(4)},
            "clusters": {"sums": rows, "tokens": np.full(80, 100.0), "domain": domain},
            "comparisons": comparisons,
            "births": births,
            "kept": [harm != 0] * births,
        }

    cells = GuardStudy.plan(options)
    summary = GuardStudy.summarise(options, {cell.name: make(cell) for cell in cells})
    for figure in summary.figures:
        figure.draw(Figure())
    return summary


def test_a_guard_that_decides_rightly_holds_what_is_claimed():
    harms = {"bare lifecycle": 0.02, GUARDED: 1e-9}
    summary = summarise(harms, ruin=0.02, help_=-0.01)
    verdicts = [claim.verdict for claim in summary.claims]
    # The second guard keeps nothing; and 50 of 50 do not show 95 %: their interval begins at 93 %.
    assert verdicts == ["differs", "holds", "by construction", "not decided", "holds"]
    assert "10.0 to 10.0 times delta" in summary.claims[3].measured
    planted = summary.findings["decisions"]
    assert planted["ruin"]["right"]["share"] == planted["restore"]["right"]["share"] == 1
    assert planted["ruin"]["right"]["low"] == pytest.approx(0.025 ** (1 / 50))  # none of 50
    assert summary.findings["decisions"][GUARDED]["kept"]["total"] == 50
    seeds = summary.findings["seeds"]["bare lifecycle"]
    assert all(row["p_holm"] < 0.05 and row["effect"] < 0 for row in seeds)


def test_seeds_that_are_worse_and_wrong_decisions_refute_it():
    harms = {"bare lifecycle": 0.02, GUARDED: 0.004}
    claims = summarise(harms, ruin=-0.02, help_=0.01).claims
    verdicts = {claim.claim: claim.verdict for claim in claims}
    assert verdicts[f"It does not with a guard ({GUARDED})"] == "does not hold"
    assert [claim.verdict for claim in claims[-2:]] == ["does not hold"] * 2
