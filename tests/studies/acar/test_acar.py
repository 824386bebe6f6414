"""The study `acar` on models of a few numbers: its tasks, its statistics, its summary."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from molora_acar.tasks.problems import Problem, compute_split
from molora_studies.acar import answers, recipe
from molora_studies.acar.acar import AcarStudy
from molora_studies.acar.batched import sample_in_batches
from molora_studies.acar.cases import open_case
from molora_studies.acar.findings import Findings
from molora_studies.acar.measures import (
    Sampled,
    compare_correlation,
    estimate,
    integrate,
    pack_numbers,
    unpack_numbers,
)
from molora_studies.acar.models import (
    build_tokenizer,
    draw_training_problems,
    pack_problems,
    train_on_answers,
)
from molora_studies.acar.outcomes import decide_all
from molora_studies.framework.action_ids import load_action
from molora_studies.framework.contract import Done, TaskContext
from molora_studies.framework.registry import load_studies
from pydantic import ValidationError
from scipy.stats import spearmanr

from molora_fed.cascade.contract import Request
from molora_fed.cascade.local import LocalModel
from molora_fed.inference.fused_build import build_causal_lm
from molora_fed.inference.opening import PlainModel
from molora_fed.models.base import load_base

SEED = 5
TRAINING = recipe.TrainingSettings(families={"logic": 1, "sorting": 1}, steps=30, problems=60)
OPTIONS = recipe.AcarOptions(
    seeds=(SEED,),
    levels={"logic": (1,), "sorting": (1, 2)},
    members={"one": {"logic": 1}, "two": {"sorting": 1}, "three": {"logic": 1, "sorting": 1}},
    base=recipe.ModelSettings(hidden=32, layers=1),
    probe=recipe.ModelSettings(hidden=16, layers=1),
    base_training=TRAINING,
    probe_training=TRAINING,
    specialist_training=TRAINING,
    tasks=14,
    calibration=22,
    examples=10,
)


def _do(task, folder, done=()):
    own = folder / task.key[:8]
    own.mkdir(parents=True, exist_ok=True)
    needs = tuple(done)
    context = TaskContext(folder=own, needs=needs, threads=1, cache=folder)
    return Done(task, own, load_action(task.action)(dict(task.settings), context))


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> dict[str, Done]:
    """Every task of one seed, done."""
    folder = tmp_path_factory.mktemp("acar")
    found: dict[str, Done] = {}
    (cell,) = AcarStudy.plan(OPTIONS)
    for task in cell.task.walk():
        if task.key not in found:
            found[task.key] = _do(task, folder, [found[one.key] for one in task.needs])
    return {done.task.name.split(" seed")[0].split(" D=")[0]: done for done in found.values()}


def test_the_study_is_registered():
    assert load_studies().registry.resolve("acar") is AcarStudy


def test_full_size_asks_enough_tasks_and_a_small_probe():
    options = recipe.AcarOptions()
    cells = sum(map(len, options.levels.values()))
    assert cells * options.tasks >= 1500
    assert len(options.levels) >= 4
    assert len(options.seeds) == 3
    sizes = [recipe._count_numbers(one) for one in (options.probe, options.base)]
    assert 4 * sizes[0] <= sizes[1]
    assert {name for own in options.members.values() for name in own} == set(options.levels)


def test_options_name_families_that_have_levels():
    with pytest.raises(ValidationError, match="without levels: riddles"):
        recipe.AcarOptions(probe_training={"families": {"riddles": 1}})
    with pytest.raises(ValidationError, match="expected 3 members"):
        recipe.AcarOptions(members={"one": {"code": 1}})
    plain = recipe.AcarOptions(base_training={"steps": 5})
    families = recipe.plan_base(plain, 1).settings["training"]["families"]
    assert families == dict.fromkeys(plain.levels, 1.0)


def test_nothing_that_is_tested_is_trained_on(study):
    tested = {row["task"]["prompt"] for row in study["answers"].result["test"]}
    calibrated = {row["task"]["prompt"] for row in study["answers"].result["calibration"]}
    assert not tested & calibrated
    assert {compute_split(prompt) for prompt in tested} == {"test"}
    trained = {one.prompt for one in draw_training_problems(TRAINING, OPTIONS.levels, SEED)}
    assert not tested & trained
    assert {compute_split(prompt) for prompt in trained} == {"train"}


def test_blocks_hold_whole_problems_and_weigh_answers():
    problems = [Problem(f"sort {k}:", str(k) * 3, "") for k in range(9)]
    tokens, weights = pack_problems(problems, build_tokenizer(), block_size=32, prompt_weight=0.25)
    tokenizer = build_tokenizer()
    rows = list(zip(tokens, weights, strict=True))
    text = "".join(tokenizer.decode(row[weight > 0]) for row, weight in rows)
    assert text == "".join(f"{one.prompt}{one.solution}\n" for one in problems)
    answers = "".join(tokenizer.decode(row[weight == 1]) for row, weight in rows)
    assert answers == "".join(f"{one.solution}\n" for one in problems)


def test_training_lowers_the_loss_and_repeats(study):
    base = load_base(study["base"].folder / "base")
    problems = draw_training_problems(TRAINING, OPTIONS.levels, 1)
    blocks = pack_problems(problems, base.tokenizer, block_size=128, prompt_weight=0.05)

    def train(steps):
        model = load_base(study["base"].folder / "base").model.requires_grad_(True)
        chosen = TRAINING.model_copy(update={"steps": steps})
        loss = train_on_answers(model, list(model.parameters()), *blocks, chosen, seed=2)
        return loss, torch.cat([one.detach().flatten() for one in model.parameters()])

    first, again, longer = train(12), train(12), train(60)
    assert first[0] == again[0]
    assert torch.equal(first[1], again[1])
    assert longer[0] < first[0]


def test_a_batch_of_prompts_says_what_prompts_alone_say(study):
    engine = build_causal_lm(PlainModel(load_base(study["base"].folder / "base")))
    alone = LocalModel("base", engine)
    requests = [
        Request(prompt, seed, 12, temperature, ("\n",))
        for seed, prompt in enumerate(["sort 312:", "T&F F|T ~T:", "sort 999:", "sort 12345:"] * 2)
        for temperature in (0.0, 0.9)
    ]
    batched = sample_in_batches(engine, requests)
    for one, request in zip(batched, requests, strict=True):
        (expected,) = alone.sample([request])
        assert one == replace(expected, seconds=0.0)


def test_answers_hold_every_model_on_every_task(study):
    result = study["answers"].result
    assert [len(result[split]) for split in ("calibration", "test")] == [66, 42]
    assert 0 < result["parameters"]["probe"] < result["parameters"]["member"]
    for row in result["test"]:
        assert len(row["probe"]) == 3
        assert sorted(row["members"]) == ["one", "three", "two"]
        assert 0 <= row["retrieved"]["similarity"] <= 1
        assert "details" not in row["task"]
        answers = {one[1] for one in row["members"].values() if one[1] is not None}
        assert all(bool(scores) == (len(answers) > 1) for scores in row["scores"].values())


def test_outcomes_follow_from_answers(study):
    rows = study["answers"].result["test"]
    result = study["outcomes"].result
    names = [*result["outcomes"]]
    found = {name: _read(result, name) for name in names}
    for name, one in found.items():
        assert len(one["correct"]) == len(one["cost"]) == len(one["mode"]) == len(rows), name
    for name in result["members"]:
        right = [row["members"][name][1] == row["task"]["answer"] for row in rows]
        assert found[f"single {name}"]["correct"].tolist() == right
        costs = np.array([row["members"][name][4] for row in rows])
        unit = np.mean([row["members"][result["members"][0]][4] for row in rows])
        assert found[f"single {name}"]["cost"] == pytest.approx(costs / unit)
    for at, row in enumerate(rows):
        answers = [one[1] for one in row["probe"]]
        distinct = len({one for one in answers if one is not None}) + answers.count(None)
        expected = {1: 0, 2: 1, 3: 2}[distinct]
        assert found["ACAR-U"]["mode"][at] == (2 if answers == [None] * 3 else expected)
        costs = [found[f"probe, {mode}"]["cost"][at] for mode in
                 ("single_agent", "arena_lite", "full_arena")]  # fmt: skip
        assert found["ACAR-U"]["cost"][at] == costs[int(found["ACAR-U"]["mode"][at])]
        others = [found[f"single {name}"]["correct"][at] for name in result["members"]]
        assert found["oracle"]["correct"][at] == max(
            *others, found["probe, single_agent"]["correct"][at]
        )
        near = row["retrieved"]["similarity"] >= OPTIONS.threshold
        source = found["ACAR-UJ always" if near else "ACAR-U"]
        assert found["ACAR-UJ"]["correct"][at] == source["correct"][at]
    assert decide_all(dict(study["outcomes"].task.settings), _context(study)) == result


def _read(result, name):
    reader = Findings([result])._read[0]
    return {key: reader.take(name, key) for key in ("correct", "cost", "mode")}


def _context(study):
    done = study["answers"]
    return TaskContext(folder=Path(), needs=(done,), threads=1, cache=Path())


def test_leave_one_out_is_the_arena_less_the_arena_without(study):
    result, rows = study["outcomes"].result, study["answers"].result["test"]
    members = result["members"]
    left = [name for name in members if name != members[2]]
    pair = f"pair {left[0]} {left[1]}"
    expected = _read(result, "arena-3")["correct"] - _read(result, pair)["correct"]
    assert unpack_numbers(result["attribution"]["arena"][members[2]]).tolist() == expected.tolist()
    assert len(unpack_numbers(result["attribution"]["cascade"]["probe"])) == len(rows)


def test_a_case_hides_the_answer_from_the_policy(study):
    case = open_case(*[study["answers"].result["test"][0]] * 2)
    assert case.task.answer is not None
    assert case.find_evidence().task.answer is None


def test_summary(study):
    results = {"seed 5": study["outcomes"].result}
    summary = AcarStudy.summarise(OPTIONS, results)
    again = AcarStudy.summarise(OPTIONS, results)
    assert summary.findings == again.findings
    assert len(summary.claims) >= 9
    for table in summary.tables:
        assert all(len(row) == len(table.columns) for row in table.rows), table.title
    accuracy = summary.findings["accuracy"]["single"]
    right = study["outcomes"].result["outcomes"]["single"]["correct"]
    assert accuracy["point"] == pytest.approx(right.count("1") / len(right))
    assert accuracy["low"] <= accuracy["point"] <= accuracy["high"]
    assert summary.findings["relative_cost"]["single"]["point"] == pytest.approx(1)


def test_the_rule_judged_by_each_judge_costs_what_its_modes_cost(study):
    result = study["outcomes"].result
    derived = _read(result, "ACAR-U")
    decided = _read(result, f"ACAR-U by {result['judge']}")
    assert all((derived[key] == decided[key]).all() for key in derived)


def test_a_calibrated_policy_with_hidden_families_chooses_by_agreement_alone(study):
    result = study["outcomes"].result
    assert set(result["frontiers"]) == {"calibrated", "calibrated, families hidden"}
    for lines in result["frontiers"].values():
        costs = [Findings([result])._read[0].by_mode(one, "cost").mean() for one in lines]
        assert costs[0] == min(costs)


def test_figures_are_drawn(study):
    from matplotlib.figure import Figure

    summary = AcarStudy.summarise(OPTIONS, {"seed 5": study["outcomes"].result})
    for one in summary.figures:
        figure = Figure()
        one.draw(figure)
        assert figure.axes


def test_equal_cost_of_a_fixed_configuration_is_no_gain(study):
    found = Findings([study["outcomes"].result])
    assert found.at_equal_cost("arena-2").point == pytest.approx(0, abs=1e-12)


def test_intervals_are_paired_and_cover():
    generator = np.random.default_rng(1)
    left = [(generator.random(400) < 0.6).astype(float) for _ in range(3)]
    sampled = Sampled([400] * 3)
    whole = estimate(*sampled.mean(left))
    assert whole.point == pytest.approx(np.mean(left))
    error = np.sqrt(0.24 / 1200)
    assert whole.high - whole.low == pytest.approx(2 * 1.96 * error, rel=0.15)
    same = estimate(*sampled.mean([one - one for one in left]))
    assert (same.low, same.point, same.high) == (0, 0, 0)
    assert whole.scale(-2).low == -2 * whole.high


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_correlation_is_spearmans(seed):
    generator = np.random.default_rng(seed)
    one = generator.integers(-1, 2, 60).astype(float)
    other = one + generator.normal(size=60)
    found = compare_correlation(Sampled([60]), [one], [other])
    assert found.point == pytest.approx(spearmanr(one, other).statistic, abs=1e-9)
    assert found.low <= found.point <= found.high
    assert compare_correlation(Sampled([60]), [np.zeros(60)], [other]).point == 0


def test_the_rule_is_on_its_own_frontier(study):
    found = Findings([study["outcomes"].result])
    lines, _ = found.frontiers()
    rule = found.mean("ACAR-U", "cost").point, found.mean("ACAR-U").point
    assert any(point == pytest.approx(rule) for point in lines["plain rule"])
    ends = [found.mean(f"probe, {mode}", "cost").point for mode in ("single_agent", "full_arena")]
    assert [lines["plain rule"][at][0] for at in (0, -1)] == pytest.approx(ends)


@given(st.lists(st.floats(-1e12, 1e12, allow_nan=False), max_size=20))
@settings(max_examples=30, deadline=None)
def test_numbers_come_back(numbers):
    assert unpack_numbers(pack_numbers(numbers)) == pytest.approx(numbers, rel=1e-9)


def test_area_under_a_frontier():
    cost, right = np.array([[1.0, 2.0, 3.0]]), np.array([[0.2, 0.8, 0.6]])
    ends = np.array([1.0]), np.array([3.0])
    assert integrate(cost, right, *ends)[0] == pytest.approx(0.65, abs=0.005)
    line = integrate(cost[:, :2], right[:, :2], *ends)[0]
    assert line == pytest.approx(0.65, abs=0.005)  # what is left over is not spent


def test_models_of_the_table_are_those_of_a_cascade(study):
    names = answers.SCORERS
    assert set(study["answers"].result["test"][0]["scores"]) == set(names)
