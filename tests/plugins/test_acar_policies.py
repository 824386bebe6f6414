"""Policies: the paper's rule, fixed modes, a table that keeps its budget on tasks it never saw."""

import json
import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from molora_acar.calibration import Observation, fit_calibration
from molora_acar.calibration_table import load_calibration, save_calibration
from molora_acar.policies import AlwaysPolicy, CalibratedPolicy, SigmaPolicy

from molora_fed.cascade.contract import (
    MODES,
    CascadeTask,
    PolicyOptions,
    ProbeEvidence,
    compute_sigma,
)
from molora_fed.errors import ConfigError, StorageError

COST = {"single_agent": 3.0, "arena_lite": 11.0, "full_arena": 15.0}


def evidence(answers, family="easy", task_id="t", prompt="prompt"):
    task = CascadeTask(task_id, family, prompt, "number")
    answers = tuple(answers)
    return ProbeEvidence(task, answers, tuple(map(str, answers)), compute_sigma(answers))


def draw(count, seed, name):
    """Three families: one the probe knows, one it is confidently wrong on, one nobody knows."""
    rng = random.Random(seed)
    skill = {"easy": 0.9, "biased": 0.4, "hopeless": 0.15}
    members = {"easy": 0.9, "biased": 0.9, "hopeless": 0.2}
    observations = []
    for number in range(count):
        family = rng.choice(sorted(skill))
        wrong = "w" if family == "biased" else None
        answers = ["r" if rng.random() < skill[family] else wrong or str(rng.randrange(4))
                   for _ in range(3)]  # fmt: skip
        first = max(set(answers), key=lambda one: (answers.count(one), -answers.index(one)))
        seen = evidence(answers, family, f"{name}-{number}", "x" * rng.randrange(5, 30))
        chances = {"arena_lite": members[family] - 0.05, "full_arena": members[family]}
        correct = {mode: rng.random() < chance for mode, chance in chances.items()}
        observations.append(Observation(seen, {"single_agent": first == "r", **correct}, COST))
    return observations


def measure(policy, observations):
    modes = [policy.choose(one.evidence) for one in observations]
    pairs = list(zip(observations, modes, strict=True))
    cost = np.mean([one.cost[mode] for one, mode in pairs])
    return float(cost), float(np.mean([one.correct[mode] for one, mode in pairs]))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("calibration") / "table.json"
    save_calibration(path, fit_calibration(draw(500, 1, "fit")))
    return path


def calibrated(table, budget=None):
    return CalibratedPolicy(CalibratedPolicy.Options(table=table, budget=budget))


@pytest.mark.parametrize(
    ("answers", "mode"),
    [
        ("aaa", "single_agent"),
        ("aab", "arena_lite"),
        ("abc", "full_arena"),
        ("aaaab", "arena_lite"),
        (["a", "a", None], "arena_lite"),
        ([None, None, None], "full_arena"),
    ],
)
def test_sigma(answers, mode):
    assert SigmaPolicy(PolicyOptions()).choose(evidence(answers)) == mode


@pytest.mark.parametrize("mode", MODES)
def test_always(mode):
    policy = AlwaysPolicy(AlwaysPolicy.Options(mode=mode))
    assert {policy.choose(evidence(one)) for one in ("aaa", "aab", "abc")} == {mode}


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="mod"):
        AlwaysPolicy.Options(mod="full_arena")


def test_calibrated_beats_sigma_at_the_same_cost(table):
    fresh = draw(2000, 2, "fresh")
    sigma_cost, sigma_right = measure(SigmaPolicy(PolicyOptions()), fresh)
    cost, right = measure(calibrated(table), fresh)
    assert cost == pytest.approx(sigma_cost, rel=0.1)
    assert right > sigma_right + 0.05


def test_it_escalates_agreement_that_is_often_wrong_and_spares_what_nobody_knows(table):
    policy = calibrated(table)
    assert policy.choose(evidence("www", "biased")) != "single_agent"
    assert policy.choose(evidence("www", "easy")) == "single_agent"
    assert policy.choose(evidence("abc", "hopeless")) == "single_agent"


@pytest.mark.parametrize("budget", [3.0, 5.0, 8.0, 12.0, 15.0])
def test_budgets_are_kept_on_fresh_tasks(table, budget):
    cost, _ = measure(calibrated(table, budget), draw(2000, 3, "other"))
    assert cost <= budget * 1.1


def test_frontier_rises_in_rate_and_falls_in_cost(table):
    frontier = load_calibration(table).frontier
    assert all(a.rate < b.rate for a, b in pairwise(frontier))
    assert frontier[-1].cost == COST["single_agent"]
    assert frontier[0].cost > 8


def test_a_budget_below_the_probe_is_refused(table):
    with pytest.raises(ConfigError, match=r"budget of 2 a task: expected at least 3"):
        calibrated(table, 2.0)


def test_probabilities_are_calibrated_and_have_intervals(table):
    calibration = load_calibration(table)
    fresh = draw(3000, 4, "checked")
    for family in ("easy", "biased", "hopeless"):
        rows = [one for one in fresh if one.evidence.task.family == family]
        chances = [calibration.probability(one.evidence) for one in rows]
        assert all(0 <= one.low <= one.point <= one.high <= 1 for one in chances)
        right = np.mean([one.correct["single_agent"] for one in rows])
        assert np.mean([one.point for one in chances]) == pytest.approx(right, abs=0.08)


def test_agreement_counts_for_what_it_is_worth_in_each_family(table):
    calibration = load_calibration(table)
    easy, biased = (
        calibration.probability(evidence("rrr", family)) for family in ("easy", "biased")
    )
    apart = calibration.probability(evidence("rst", "easy"))
    assert easy.point > 0.9 > apart.point
    assert biased.high < easy.low


def test_cells_count_every_observation(table):
    calibration = load_calibration(table)
    assert sum(one.tasks for one in calibration.cells) == 500 == calibration.num_tasks
    assert all(one.low <= one.right / one.tasks <= one.high for one in calibration.cells)


def test_an_unknown_family_is_predicted_from_what_all_share(table):
    chance = load_calibration(table).probability(evidence("aaa", "never seen"))
    assert 0 < chance.point < 1 and chance.high - chance.low > 0.05


@given(st.lists(st.none() | st.text(max_size=5), min_size=1, max_size=7), st.text(max_size=50))
def test_any_evidence_gets_a_mode(answers, prompt):
    seen = evidence(answers, "biased", prompt=prompt)
    assert ANY.choose(seen, 0.01) in MODES
    assert 0 <= ANY.probability(seen).point <= 1


ANY = fit_calibration(draw(100, 5, "any"))


def test_order_of_observations_changes_nothing(tmp_path):
    rows = draw(120, 6, "order")
    files = []
    for number, order in enumerate((rows, rows[::-1])):
        path = tmp_path / f"{number}.json"
        save_calibration(path, fit_calibration(order))
        files.append(path.read_bytes())
    assert files[0] == files[1]
    assert load_calibration(tmp_path / "0.json") == fit_calibration(rows)


def test_too_few_or_unfinished_observations_are_refused():
    rows = draw(60, 7, "few")
    with pytest.raises(ConfigError, match="at least 50 observations"):
        fit_calibration(rows[:49])
    with pytest.raises(ConfigError, match="at least 50 observations"):
        fit_calibration([rows[0]] * 60)  # one task
    lacking = Observation(rows[0].evidence, {"single_agent": True}, COST)
    with pytest.raises(ConfigError, match="'few-0': expected the modes"):
        fit_calibration([lacking, *rows[1:]])
    dear = Observation(rows[0].evidence, rows[0].correct, {**COST, "full_arena": float("nan")})
    with pytest.raises(ConfigError, match="expected costs from 0 up"):
        fit_calibration([dear, *rows[1:]])


def test_one_sided_tasks_can_be_fitted():
    rows = [
        Observation(one.evidence, dict.fromkeys(MODES, True), COST) for one in draw(60, 8, "sure")
    ]
    assert fit_calibration(rows).probability(rows[0].evidence).point > 0.9


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"[]",
        lambda data: data.replace(b'"format": 1', b'"format": 2'),
        lambda data: edit(data, lambda value: value.update(extra=1)),
        lambda data: edit(data, lambda value: value["coefficients"]["full_arena"].pop()),
        lambda data: edit(data, lambda value: value["covariance"].pop("arena_lite")),
        lambda data: edit(data, lambda value: value["costs"]["arena_lite"].pop("")),
        lambda data: edit(data, lambda value: value.update(frontier=[])),
        lambda data: data.replace(b'"strength": ', b'"strength": NaN, "x": '),
    ],
)
def test_damaged_tables_are_refused_in_one_line(table, tmp_path, change):
    path = tmp_path / "damaged.json"
    path.write_bytes(change(table.read_bytes()))
    with pytest.raises(ConfigError, match=r"damaged.json.*Fit it again") as caught:
        calibrated(path)
    assert "\n" not in str(caught.value)


def edit(data, change):
    value = json.loads(data)
    change(value)
    return json.dumps(value).encode()


def test_a_missing_table_is_told(tmp_path):
    with pytest.raises(StorageError, match=r"none\.json"):
        calibrated(tmp_path / "none.json")
