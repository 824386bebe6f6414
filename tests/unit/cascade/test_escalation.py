import pytest
from cascade_helpers import LINEUP, RULES, SigmaLike, extract, judge
from hypothesis import given
from hypothesis import strategies as st

from molora_fed.cascade.attribution import (
    compute_entropy,
    compute_similarities,
    decide_without,
    leave_one_out,
)
from molora_fed.cascade.contract import Sample, Verdict
from molora_fed.cascade.escalation import Lineup, Rules, decide, find_majority, list_asked
from molora_fed.errors import CascadeError
from molora_fed.testing import build_task

TEXTS = st.sampled_from(["x", "y", "z", ""])


def say(*texts):
    return [Sample(text, flops=1.0) for text in texts]


def settle(probe, members, task=None, lineup=LINEUP, rules=RULES, **more):
    spoken = dict(zip("abc", say(*members), strict=False))
    return decide(task or build_task(), lineup, say(*probe), spoken, rules, **more)


@pytest.mark.parametrize(
    ("probe", "members", "mode", "answer", "winner"),
    [
        ("xxx", "yyy", "single_agent", "x", "probe"),
        ("xxy", "yy", "arena_lite", "y", "a"),
        ("xxy", "yz", "arena_lite", "x", "probe"),
        ("xxy", "xy", "arena_lite", "x", "probe"),
        ("xxy", "xx", "arena_lite", "x", "probe"),
        ("xyz", "yzz", "full_arena", "z", "b"),
        ("yxz", ["", "", ""], "full_arena", "y", "probe"),
        (["", "", ""], ["", "", ""], "full_arena", None, None),
        (["", "", ""], "yzz", "full_arena", "z", "b"),
    ],
)
def test_each_mode_decides_as_defined(probe, members, mode, answer, winner):
    decision = settle(probe, members)
    assert (decision.mode, decision.answer, decision.winner) == (mode, answer, winner)
    assert decision.correct == (answer == "x")


def test_members_that_are_not_asked_cost_nothing():
    assert settle("xxx", "yyy").cost.flops == 3
    assert settle("xxy", "yyy").cost.flops == 5
    assert settle("xyz", "yyy").cost.flops == 6


def test_a_member_that_is_asked_must_be_there():
    with pytest.raises(CascadeError, match="got none of c"):
        settle("xyz", "yz")


def test_a_single_verifier_cannot_overrule_the_probe():
    decision = settle("xxy", "y", lineup=Lineup("probe", ("a",)))
    assert decision.answer == "x"


def test_arena_lite_takes_a_member_where_the_probe_is_silent():
    class AlwaysLite(SigmaLike):
        def choose(self, evidence):
            return "arena_lite"

    rules = Rules(extract, AlwaysLite(None), judge)
    assert settle(["", ""], ["", "z"], rules=rules).answer == "z"
    assert settle(["", ""], ["", ""], rules=rules).answer is None


@pytest.mark.parametrize(("members", "answer"), [("y", "y"), ("yz", "y"), ("zyy", "y")])
def test_without_a_probe_every_member_answers(members, answer):
    lineup = Lineup(None, tuple("abc"[: len(members)]))
    decision = settle("", members, lineup=lineup)
    assert (decision.answer, decision.sigma) == (answer, None)
    assert decision.mode == ("single_agent" if len(members) == 1 else "full_arena")


def test_a_failed_sample_has_no_answer_and_counts_as_disagreement():
    probe = [*say("x", "x"), Sample("x", failure="timed out")]
    decision = decide(
        build_task(), LINEUP, probe, dict(zip("ab", say("x", "x"), strict=True)), RULES
    )
    assert decision.probe_answers == ("x", "x", None)
    assert decision.mode == "arena_lite"


def test_a_judge_that_chooses_nobody_is_refused():
    rules = Rules(extract, SigmaLike(None), lambda request: Verdict(3, "nobody"))
    with pytest.raises(CascadeError, match="from 0 to 2, got 3"):
        settle("xyz", "xyz", rules=rules)


def test_a_judge_sees_its_options_and_its_calls_are_counted():
    class Scores:
        name, fingerprint, is_local = "s", "f", True

        def sample(self, requests):
            return say(*("q" for _ in requests))

        def score(self, prompt, answers):
            return [float("-inf") for _ in answers]

        def count_scoring(self, prompt, answers):
            return Sample("", flops=100.0)

    def asks(request):
        assert request.options == {"model": "s"}
        scores = request.models["s"].score("p", ["x", "y"])
        assert all(score < -1e20 for score in scores)
        return Verdict(1, "scored")

    rules = Rules(extract, SigmaLike(None), asks, {"model": "s"})
    decision = settle("xyz", "xyz", rules=rules, models={"s": Scores()})
    assert decision.answer == "y"
    assert decision.cost.flops == 106
    assert decision.calls[0].sort == "score"


@given(st.lists(TEXTS, min_size=1, max_size=6), st.lists(TEXTS, min_size=3, max_size=3))
def test_deciding_is_pure_and_its_answer_was_given_by_someone(probe, members):
    decision = settle(probe, members)
    assert decision == settle(probe, members)
    given_answers = {*decision.probe_answers, *decision.member_answers.values()}
    assert decision.answer in given_answers | {None}
    assert list(decision.member_answers) == list(list_asked(decision.mode, LINEUP))
    if decision.answer is None:
        assert decision.winner is None
        assert given_answers == {None}
    elif decision.winner != "probe":
        assert decision.member_answers[decision.winner] == decision.answer


@given(st.lists(st.sampled_from(["x", "y", None]), max_size=7))
def test_majority_is_the_earliest_of_the_commonest(answers):
    at = find_majority(answers)
    given_answers = [one for one in answers if one is not None]
    if at is None:
        assert not given_answers
    else:
        most = max(map(given_answers.count, given_answers))
        assert answers.count(answers[at]) == most
        assert all(answers.count(one) < most or one is None for one in answers[:at])


@given(st.lists(TEXTS, min_size=3, max_size=3), st.lists(TEXTS, min_size=3, max_size=3))
def test_leave_one_out_is_the_difference_to_the_cascade_without_the_model(probe, members):
    spoken = dict(zip("abc", say(*members), strict=True))
    given_samples = (build_task(), LINEUP, say(*probe), spoken, RULES)
    values = leave_one_out(*given_samples)
    assert set(values) == {"probe", "a", "b", "c"}
    whole = bool(decide(*given_samples).correct)
    for name, value in values.items():
        assert value == whole - bool(decide_without(name, *given_samples).correct)


def test_proxies_of_texts_that_agree():
    alike = compute_similarities({"a": "the answer", "b": "the answer", "c": "???"})
    assert alike["a"] > alike["c"]
    assert compute_entropy(["x", "x"]) == 0
    assert compute_entropy(["x", "y", None]) == pytest.approx(1.0986, abs=1e-4)
    assert compute_entropy([]) == 0
