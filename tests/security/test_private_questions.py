"""What a coordinator can have answered on texts that stay with a contributor, and how often."""

import json
from dataclasses import replace

import pytest
from adaptation_helpers import build_population, build_router
from private_helpers import MEMBERS, PLUGINS, RULES, Stage, build_charter, build_texts

from molora_fed.errors import PopulationError, QuestionRefusedError
from molora_fed.models.base import load_base
from molora_fed.population.asked import AskedQuestions, begin_anew
from molora_fed.population.evolution import Branch
from molora_fed.population.private_member import PrivateMember, carve_own
from molora_fed.population.questions import Question
from molora_fed.population.rounds import MIN_ADAPTATION_BLOCKS, plan_rounds

BASE_SETTINGS = {
    "steps": 1, "batch": 1, "seed": 7, "learning_rate": 1.0, "router_learning_rate": 0.0,
    "first_step": 0, "total_steps": 1, "warmup": 1, "clip_norm": 1e9, "checkpoint_every": 1,
    "trained_factors": "b",
}  # fmt: skip


@pytest.fixture
def base(tiny_checkpoint):
    return load_base(tiny_checkpoint("gpt_neox"))


@pytest.fixture
def person(base, tmp_path):
    return Stage(base, tmp_path).people["anna"]


def build_start(base, shift=0.0):
    branch = Branch(build_population(base), build_router())
    if shift:
        slots = tuple(
            replace(slot, updates={n: replace(u, b=u.b + shift) for n, u in slot.updates.items()})
            for slot in branch.population.slots
        )
        branch = Branch(replace(branch.population, slots=slots), branch.router)
    return branch


@pytest.mark.parametrize(
    "settings",
    [BASE_SETTINGS, {"first_step": 0, "steps": 1}, {"first_step": 1}, {"first_step": 10**30},
     {"first_step": True}, {"first_step": "0"}, {"first_step": None}, {}],
    ids=["one step on one block", "more", "off", "far", "bool", "text", "none", "nothing"],
)  # fmt: skip
def test_a_letter_decides_nothing_but_the_place(base, person, settings):
    with pytest.raises(QuestionRefusedError):
        person.answer(Question("adapt", settings, (build_start(base),)))


def test_a_round_is_the_charters_whatever_is_asked(base, person, monkeypatch):
    seen = []

    def note(base, population, router, states, config, folder, **more):
        seen.append((config, more["trained_factors"]))
        return population, router

    monkeypatch.setattr("molora_fed.population.private_member.adapt", note)
    person.answer(Question("adapt", {"first_step": 4}, (build_start(base),)))
    ((config, factor),) = seen
    assert (config.steps, config.batch, config.first_step, factor) == (4, 2, 4, "a")
    assert config.learning_rate == RULES.learning_rate and config.total_steps == 24


def ask_often(person, base, kind, times, settings=None, branches=1):
    """How many of these different questions were answered."""
    answered = 0
    for number in range(times):
        both = tuple(build_start(base, 0.01 * number + 0.1 * n) for n in range(branches))
        try:
            person.answer(Question(kind, settings or {}, both))
            answered += 1
        except QuestionRefusedError as error:
            assert "\n" not in str(error) and kind in str(error)
    return answered


def test_every_question_is_answered_as_often_as_the_charter_says(base, person):
    assert ask_often(person, base, "held-out", 3, branches=2) == 1
    assert ask_often(person, base, "fitness", 4) == RULES.generations
    assert ask_often(person, base, "gates", 5) == RULES.generations + 1
    assert ask_often(person, base, "guard", 2, {"sample": 0}, branches=2) == 1
    assert ask_often(person, base, "guard", 1, {"sample": 2}, branches=2) == 0


def test_each_branch_is_adapted_once_at_each_place(base, person, monkeypatch):
    monkeypatch.setattr(
        "molora_fed.population.private_member.adapt", lambda b, population, router, *a, **k: (
            population, router,
        )
    )  # fmt: skip
    assert ask_often(person, base, "adapt", 3, {"first_step": 0}) == 1
    assert ask_often(person, base, "adapt", 4, {"first_step": 8}) == 2  # and its twin


def test_the_count_outlives_the_process(base, tmp_path):
    def open_member():
        charter = build_charter(base)
        return PrivateMember(
            base, build_texts(MEMBERS[0]), charter, tmp_path, threads=1, plugins=PLUGINS
        )

    first = Question("held-out", {}, (build_start(base), build_start(base)))
    answer = open_member().answer(first)
    other = Question("held-out", {}, (build_start(base, 0.5), build_start(base)))
    with pytest.raises(QuestionRefusedError, match="'held-out' 1 times"):
        open_member().answer(other)
    # The same question is the same answer, however often it is asked.
    assert open_member().answer(first).figures == answer.figures


def test_a_new_amendment_or_a_new_join_begins_a_new_count(tmp_path):
    def admit(amendment, question):
        AskedQuestions(tmp_path, amendment, {"held-out": 1}).admit("held-out", question)

    admit(1, "a")
    for amendment, question in ((1, "b"), (0, "c")):  # an amendment before it is none
        with pytest.raises(QuestionRefusedError):
            admit(amendment, question)
    admit(2, "b")
    begin_anew(tmp_path)
    admit(2, "c")
    with pytest.raises(QuestionRefusedError, match="2 in earlier evolutions"):
        admit(2, "d")
    kept = json.loads((tmp_path / "asked.json").read_text())
    assert kept["earlier"] == {"held-out": 2}


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"amendment": 1, "asked": {"x": 1}}'])
def test_a_count_that_cannot_be_read_answers_nothing(tmp_path, content):
    (tmp_path / "asked.json").write_text(content)
    with pytest.raises(PopulationError, match=r"asked\.json"):
        AskedQuestions(tmp_path, 1, {"gates": 9}).admit("gates", "a")


@pytest.mark.parametrize(
    "changes",
    [{"steps": 1, "blocks_per_domain": 1}, {"rounds": 8}, {"start_steps": 3},
     {"blocks_per_domain": 1, "rounds": 4}],
)  # fmt: skip
def test_a_charter_that_adapts_on_few_blocks_is_refused_before_training(base, changes):
    charter = build_charter(base, RULES.model_copy(update=changes))
    with pytest.raises(PopulationError, match=f"{MIN_ADAPTATION_BLOCKS} blocks"):
        carve_own(build_texts(MEMBERS[0]), charter)


@pytest.mark.parametrize("changes", [{"generations": 10**12}, {"rounds": 10**12}])
def test_a_charter_of_endless_rounds_is_refused(base, changes):
    with pytest.raises(PopulationError, match="rounds"):
        carve_own(build_texts(MEMBERS[0]), build_charter(base, RULES.model_copy(update=changes)))


def test_a_question_brings_no_router_of_its_own(base, person):
    branch = Branch(build_population(base), build_router(floor=0.3))
    with pytest.raises(PopulationError, match="the charter's router"):
        person.answer(Question("gates", {}, (branch,)))


def test_both_sides_find_the_same_rounds_in_the_charter(base):
    rounds = plan_rounds(build_charter(base).amendment, threads=1)
    assert list(rounds) == [0, 4, 8, 12, 16, 20]
    assert [one.branches for one in rounds.values()] == [1, 1, 2, 2, 2, 2]
    assert {one.config.first_step + one.config.steps for one in rounds.values()} == {
        4, 8, 12, 16, 20, 24,
    }  # fmt: skip
