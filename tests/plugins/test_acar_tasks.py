"""Task families: right answers, the same tasks for the same seed, no prompt in two splits."""

import json
import math
import random
from dataclasses import replace
from itertools import pairwise

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from molora_acar.code_answers import format_outcomes
from molora_acar.tasks import choices
from molora_acar.tasks.families import FAMILIES
from molora_acar.tasks.problems import Problem, compute_split, draw_problems
from molora_cli.cascade_tasks import tasks as tasks_command
from typer.testing import CliRunner

from molora_fed.cascade.contract import TASK_SPLITS, CascadeTask, draw_tasks, parse_levels
from molora_fed.cascade.task_files import load_tasks
from molora_fed.errors import ConfigError, PluginError, UnknownNameError
from molora_fed.plugins import load_plugins
from molora_fed.testing import check_task_family_conformance
from molora_fed.types import Document

PLUGINS = load_plugins()
APP = typer.Typer()
APP.command()(tasks_command)
WORDS = {
    "cpp": "template typename constexpr",
    "python": "self return lambda",
    "readme": "install usage licence",
    "science": "array shape axis",
}


@pytest.fixture(autouse=True)
def small_domains(monkeypatch):
    """Domains of made-up documents: reading the real ones takes seconds."""

    class Domains:
        def resolve(self, name):
            lines = [f"{WORDS[name]} line {'abcdefghij'[k % 10] * 9} {k}" for k in range(400)]
            return lambda: [
                Document(f"{k}.txt", "\n".join(lines[k * 20 : k * 20 + 20])) for k in range(20)
            ]

    choices._read_lines.cache_clear()
    monkeypatch.setattr(choices, "get_plugins", lambda: type("P", (), {"domains": Domains()}))
    yield
    choices._read_lines.cache_clear()


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_register_task_families(name):
    assert PLUGINS.task_families.resolve(name) is FAMILIES[name]


@pytest.mark.parametrize("name", sorted(FAMILIES))
@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_tasks_follow_from_their_seed_and_keep_their_split(name, level):
    family = FAMILIES[name]
    drawn = {split: family(level, 25, 3, split) for split in TASK_SPLITS}
    for split, tasks in drawn.items():
        assert tasks == family(level, 25, 3, split)
        assert tasks != family(level, 25, 4, split)
        assert {compute_split(task.prompt) for task in tasks} == {split}
        assert len({task.id for task in tasks}) == 25
        assert all(task.family == name and task.level == level for task in tasks)
        json.dumps([dict(task.details) for task in tasks])
    assert len({task.prompt for task in drawn["test"]}) == 25


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"code"}))
@pytest.mark.parametrize("level", [1, 2, 3])
def test_the_extractor_makes_the_answer_of_the_solution(name, level):
    family = FAMILIES[name]
    extract = PLUGINS.extractors.resolve(family.extractor)
    solutions = [problem.solution for problem in family.draw(level, 30, 5, "test")]
    for task, solution in zip(family(level, 30, 5), solutions, strict=True):
        assert extract(task, solution) == task.answer
        assert extract(task, f" {solution}\n") == task.answer


@given(st.integers(1, 5), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_solved_problems_are_right(level, seed):
    def draw(name):
        return FAMILIES[name].draw(level, 3, seed, "train")

    for problem in draw("arithmetic"):
        assert eval(problem.prompt.removesuffix("=")) == int(problem.solution)
    for problem in draw("sorting"):
        shown = problem.prompt.removeprefix("sort ").removesuffix(":")
        pieces = (shown.split(), problem.solution.split()) if level > 2 else (shown, problem.answer)
        assert sorted(pieces[0]) == list(pieces[1])
    for problem in draw("logic"):
        for text, letter in zip(problem.prompt[:-1].split(), problem.solution, strict=True):
            assert letter == ("T" if _read_logic(text) else "F")
    for problem in draw("code"):
        scope = {}
        exec(problem.details["before"] + problem.solution, scope)
        tests = [test["arguments"] for test in problem.details["tests"]]
        assert problem.answer == format_outcomes([scope["f"](*test) for test in tests])


def _read_logic(text):
    """Value of an expression without brackets, from the left."""
    value, operator, negated = None, None, False
    for letter in text:
        if letter == "~":
            negated = True
        elif letter in "TF":
            atom = (letter == "T") != negated
            negated = False
            value = {None: atom, "&": value and atom, "|": value or atom, "^": value != atom}[
                operator
            ]
        else:
            operator = letter
    return value


def test_sequences_go_on_as_they_began():
    for problem in FAMILIES["sequences"].draw(1, 50, 1, "train"):
        shown = [int(number) for number in problem.prompt.removeprefix("next ")[:-1].split()]
        steps = {b - a for a, b in zip(shown, [*shown[1:], int(problem.answer)], strict=True)}
        assert len(steps) == 1
    for problem in FAMILIES["sequences"].draw(3, 50, 1, "train"):
        shown = [int(number) for number in problem.prompt.removeprefix("next ")[:-1].split()]
        numbers = [*shown, int(problem.answer)]
        steps = [b - a for a, b in pairwise(numbers)]
        assert len({b - a for a, b in pairwise(steps)}) == 1


def test_solutions_of_code_are_written_in_more_than_one_way():
    solutions = {}
    for problem in FAMILIES["code"].draw(1, 2000, 1, "train"):
        solutions.setdefault(problem.prompt, set()).add(problem.solution)
    assert max(map(len, solutions.values())) == 2


def test_choices_are_from_documents_of_their_split():
    for split in ("test", "calibration"):
        for problem in FAMILIES["choices"].draw(2, 40, 1, split):
            name = problem.details["choices"]["ABCD".index(problem.answer)]
            piece = problem.prompt.split("|")[0]
            lines = [(text, own) for text, own in choices._read_lines(name) if piece in text]
            assert any(own == split for _, own in lines)


def _make_the_only_one(generator, level):
    return Problem("the only one", "1", "1")


def test_a_level_with_too_few_prompts_says_so():
    split = compute_split("the only one")
    if split == "train":
        assert len(draw_problems(_make_the_only_one, "one", 1, 5, 1, split)) == 5
        split = "test"
    with pytest.raises(ConfigError, match=r"different prompts, got [01]"):
        draw_problems(_make_the_only_one, "one", 1, 5, 1, split)
    with pytest.raises(ConfigError, match="expected a level from 1"):
        FAMILIES["sorting"](0, 5, 1)


def test_a_third_of_prompts_is_never_trained_on():
    prompts = [problem.prompt for problem in FAMILIES["strings"].draw(1, 2000, 1, "train")]
    assert all(compute_split(prompt) == "train" for prompt in prompts)
    splits = [compute_split(f"word {number}") for number in range(5000)]
    for split in ("test", "calibration", "validation"):
        assert math.isclose(splits.count(split) / 5000, 0.1, abs_tol=0.02)


def test_drawing_and_writing(tmp_path):
    tasks = draw_tasks(["sorting", "logic"], (2, 1), count=3, seed=1, split="test", plugins=PLUGINS)
    assert [(task.family, task.level) for task in tasks[::3]] == [
        ("sorting", 2), ("sorting", 1), ("logic", 2), ("logic", 1),
    ]  # fmt: skip
    file = tmp_path / "tasks.jsonl"
    options = ["--families", "sorting,logic", "--levels", "2,1", "--count", "3", "--seed", "1"]
    result = CliRunner().invoke(APP, ["--out", str(file), *options])
    assert result.exit_code == 0, result.output
    assert "wrote 12 tasks" in result.output
    assert load_tasks(file) == tasks
    with pytest.raises(ConfigError, match="one of the splits"):
        draw_tasks(["sorting"], (1,), count=3, seed=1, split="tests", plugins=PLUGINS)
    with pytest.raises(UnknownNameError):
        draw_tasks(["sortin"], (1,), count=3, seed=1, split="test", plugins=PLUGINS)


def test_levels_from_text():
    assert parse_levels("2, 1,2") == (2, 1)
    for text in ("", "0", "1,x", "-1"):
        with pytest.raises(ConfigError, match="whole numbers from 1"):
            parse_levels(text)


# The kit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLUGINS.task_families.names())
def test_registered_family_conforms(name):
    check_task_family_conformance(PLUGINS.task_families.resolve(name), plugins=PLUGINS)


def echo(level, count, seed, split="test"):
    """A family of one level that is as it should be."""
    if level != 1:
        raise ConfigError(f"Cannot draw echoes at level {level}: expected level 1. Use it.")
    words = [f"{split} {seed} {number}" for number in range(count)]
    return [CascadeTask(word, "echo", f"say {word}:", "normalised-text", word) for word in words]


def spoil(**changes):
    """The family with something wrong in its last task."""

    def spoiled(level, count, seed, split="test"):
        tasks = echo(level, count, seed, split)
        return [*tasks[:-1], *(replace(one, **changes) for one in tasks[-1:])]

    return spoiled


def draws_too_few(level, count, seed, split="test"):
    return echo(level, count, seed, split)[:1]


def draws_by_chance(level, count, seed, split="test"):
    return echo(level, count, random.randrange(10**6), split)


def forgets_the_split(level, count, seed, split="test"):
    return echo(level, count, seed)


def splits_by_seed(level, count, seed, split="test"):
    """One prompt is in another split under another seed."""
    return echo(level, count, 0, TASK_SPLITS[(TASK_SPLITS.index(split) + seed) % 4])


def has_every_level(level, count, seed, split="test"):
    return [replace(task, level=level, id=f"{level}-{task.id}") for task in echo(1, count, seed)]


def names_all_alike(level, count, seed, split="test"):
    return [replace(task, id="echo") for task in echo(level, count, seed, split)]


def draws_for_training(level, count, seed, split="train"):
    return echo(level, count, seed, split)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        (draws_too_few, "expected 4 CascadeTasks at level 1, split train, seed 0, got 1, of Casc"),
        (draws_by_chance, "expected the same tasks at level 1, split train, seed 0, got others"),
        (forgets_the_split, "in one split whatever the seed and level, got 'say test 0 0:' in tr"),
        (splits_by_seed, "in one split whatever the seed and level, got 'say validation 0 0:' in"),
        (has_every_level, "expected ConfigError at level 0, got tasks"),
        (draws_for_training, "expected the split 'test' where none is named"),
        (spoil(prompt="say it"), "expected a prompt in one split"),
        (names_all_alike, "expected ids that differ over all levels, got 'echo' twice at level 1"),
        (spoil(level=3), "expected tasks of a named family at .*, got level 3 of 'echo'"),
        (spoil(answer=None), "expected a known answer at level 1, split test, seed 0, got None"),
        (spoil(answer="Test 0"), "got 'Test 0', of which it makes 'test 0'"),
        (spoil(extractor="unheard-of"), "expected a registered extractor, got 'unheard-of'"),
        (lambda level, count: [], "TypeError"),
        (lambda *_, **__: ["task"] * 4, "of str"),
    ],
)
def test_broken_family_is_caught(family, reason):
    with pytest.raises(PluginError, match=reason):
        check_task_family_conformance(family, plugins=PLUGINS)


def test_a_family_of_one_level_conforms():
    check_task_family_conformance(echo, plugins=PLUGINS)
