"""Judges choose a candidate, let nobody judge an own answer, and do not look at the order."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from molora_acar.judges import (
    LikelihoodJudge,
    LikelihoodOptions,
    MajorityJudge,
    PairwiseJudge,
    PairwiseOptions,
)

from molora_fed.cascade.asking import playback_models, recording_models
from molora_fed.cascade.contract import (
    Candidate,
    CascadeTask,
    JudgeOptions,
    JudgeRequest,
    Sample,
    Scorer,
    Verdict,
    open_judge,
)
from molora_fed.errors import CascadeError, ConfigError
from molora_fed.plugins import load_plugins
from molora_fed.testing import build_judge_request

JUDGES = ("likelihood", "majority", "pairwise")
TASK = CascadeTask("t", "family", "2 + 2 =", "number")


class Judging:
    """Says the letter of the answer it finds best, and remembers what it was asked."""

    fingerprint, is_local = "f", True

    def __init__(self, name, ranking, *, letter=None, failure=None):
        self.name, self.ranking, self.letter, self.failure = name, ranking, letter, failure
        self.asked = []

    def sample(self, requests):
        self.asked += [(one.prompt, one.seed) for one in requests]
        return [
            Sample(self.letter or self._best(one.prompt), flops=5.0, failure=self.failure)
            for one in requests
        ]

    def _best(self, prompt):
        first, second = (prompt.split(f"Answer {one}:\n")[1].split("\n\n")[0] for one in "AB")
        return " A" if self.ranking.index(first) < self.ranking.index(second) else "B)"


class Scoring(Judging):
    """Scores texts from a table."""

    def __init__(self, name, scores):
        super().__init__(name, [])
        self.scores, self.calls = scores, []

    def score(self, prompt, answers):
        self.calls.append((prompt, list(answers)))
        return [self.scores[answer] for answer in answers]


def judge_by_majority(asked):
    return MajorityJudge(JudgeOptions())(asked)


def judge_by_likelihood(asked):
    return LikelihoodJudge(LikelihoodOptions(**asked.options))(asked)


def judge_by_pairs(asked):
    return PairwiseJudge(PairwiseOptions(**asked.options))(asked)


def request(answers, voices=(), /, **options):
    return build_judge_request(answers, models=voices, options=options, task=TASK)


@pytest.mark.parametrize(
    ("answers", "chosen"),
    [("aba", 0), ("abb", 1), ("abc", 0), ([None, "a", None], 1), ([None, None], 0)],
)
def test_majority(answers, chosen):
    assert judge_by_majority(request(answers)).chosen == chosen


@pytest.mark.parametrize("name", JUDGES)
def test_nobody_is_asked_where_one_answer_stands_alone(name):
    judge = open_judge(name, load_plugins())
    for answers, chosen in ((["a", "a"], 0), ([None, "a"], 1), ([None, None], 0), (["a"], 0)):
        verdict = judge(request(answers, [Scoring("fused", {})]))
        assert (verdict.chosen, verdict.samples) == (chosen, ())


@pytest.mark.parametrize("name", JUDGES)
def test_unknown_options_are_refused(name):
    with pytest.raises(CascadeError, match=f"judge '{name}'.*end_: .*modle: ") as caught:
        open_judge(name, load_plugins(), {"end_": 1, "modle": "x"})
    assert str(caught.value).endswith("Correct [cascade.judge_options].")
    assert "\n" not in str(caught.value)


def test_likelihood_takes_the_likeliest_text_with_its_end():
    fused = Scoring("fused", {"1\n": -3.0, "12\n": -2.0, "7\n": -9.0})
    verdict = judge_by_likelihood(request(["1", "12", "7", "1"], [fused]))
    assert verdict.chosen == 1
    assert fused.calls == [("2 + 2 =", ["1\n", "12\n", "7\n"])]
    assert "answer 2" in verdict.reason


def test_likelihood_by_character_and_with_another_end():
    fused = Scoring("fused", {"ab.": -4.0, "abcdefghi.": -10.0})
    asked = request(["ab", "abcdefghi"], [fused], end=".", per="character")
    assert judge_by_likelihood(asked).chosen == 1
    assert judge_by_likelihood(request(["ab", "abcdefghi"], [fused], end=".")).chosen == 0


def test_an_answer_is_as_likely_as_its_likeliest_text():
    candidates = (
        Candidate("a", "1/2", "0.5"),
        Candidate("b", "3", "3"),
        Candidate("c", "1/2", "1/2"),
    )
    fused = Scoring("fused", {"0.5\n": -9.0, "3\n": -5.0, "1/2\n": -1.0})
    verdict = judge_by_likelihood(JudgeRequest(TASK, candidates, {"fused": fused}, 0))
    assert verdict.chosen == 0


def test_equal_likelihoods_leave_the_first():
    fused = Scoring("fused", {"a\n": -math.inf, "b\n": -math.inf})
    assert judge_by_likelihood(request("ab", [fused])).chosen == 0


def test_likelihood_needs_one_model_that_scores_and_is_no_candidate():
    scores = {"a\n": 0.0, "b\n": -1.0}
    one, other, member = (Scoring(name, scores) for name in ("one", "other", "m0"))
    assert judge_by_likelihood(request("ab", [one, member])).chosen == 0
    assert judge_by_likelihood(request("ab", [one, other], model="other")).chosen == 0
    for models, options in (
        ([], {}), ([member], {}), ([one, other], {}), ([one], {"model": "two"}),
        ([Judging("plain", [])], {"model": "plain"}),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="'t' by likelihood"):
            judge_by_likelihood(request("ab", models, **options))


def test_pairs_are_judged_in_both_orders_by_a_model_that_gave_neither():
    members = [Judging(f"m{place}", "cba") for place in range(3)]
    verdict = judge_by_pairs(request("abc", members))
    assert verdict.chosen == 2
    assert verdict.reason == "2 of 2 pairs won"
    assert [name for name, _ in verdict.samples] == ["m2", "m2", "m1", "m1", "m0", "m0"]
    for member, own in zip(members, "abc", strict=True):
        assert len(member.asked) == 2
        assert all(f":\n{own}\n" not in prompt for prompt, _ in member.asked)
    seeds = [seed for member in members for _, seed in member.asked]
    assert len(set(seeds)) == 6


def test_every_author_of_an_answer_is_left_out():
    members = [Judging(f"m{place}", "ab") for place in range(3)]
    verdict = judge_by_pairs(request("aba", members))
    assert (verdict.chosen, verdict.samples) == (0, ())  # all three gave one of the two
    assert "1 without anybody to judge" in verdict.reason
    outside = Judging("z-probe", "ba")
    verdict = judge_by_pairs(request("aba", [*members, outside]))
    assert verdict.chosen == 1 and len(outside.asked) == 2


@pytest.mark.parametrize("letter", ["A", "B", "neither", ""])
def test_a_judge_that_looks_at_the_place_decides_nothing(letter):
    biased = Judging("z", "", letter=letter or None, failure=None if letter else "no answer")
    if not letter:
        biased.ranking = "ba"
    verdict = judge_by_pairs(request("baa", [biased]))
    assert verdict.chosen == 1  # more candidates gave it


def test_named_jury():
    first, second = Judging("x", "ab"), Judging("y", "ba")
    assert judge_by_pairs(request("ab", [first, second], models=["y"])).chosen == 1
    assert not first.asked
    with pytest.raises(ConfigError, match=r"by pairs.*nobody.*x, y"):
        judge_by_pairs(request("ab", [first, second], models=["nobody"]))


@given(st.permutations(["a", "b", "c", "d"]))
def test_the_order_of_candidates_does_not_choose_between_judged_answers(order):
    outside = Judging("z", "dbca")
    verdict = judge_by_pairs(request(order, [outside]))
    assert order[verdict.chosen] == "d"
    scores = {f"{letter}\n": -float(place) for place, letter in enumerate("cabd")}
    fused = Scoring("fused", scores)
    assert order[judge_by_likelihood(request(order, [fused])).chosen] == "c"


@given(st.lists(st.none() | st.sampled_from("abc"), min_size=1, max_size=6))
def test_a_candidate_with_an_answer_wins_where_there_is_one(answers):
    models = [Scoring("fused", dict.fromkeys(("a\n", "b\n", "c\n"), 0.0)), Judging("z", "abc")]
    for judge in (judge_by_majority, judge_by_likelihood, judge_by_pairs):
        options = {"models": ["z"]} if judge is judge_by_pairs else {}
        verdict = judge(request(answers, models, **options))
        assert isinstance(verdict, Verdict)
        assert answers[verdict.chosen] is not None or set(answers) == {None}


@pytest.mark.parametrize("judge", [judge_by_likelihood, judge_by_pairs])
def test_a_verdict_is_repeated_from_what_was_recorded(judge):
    fused = Scoring("fused", {"a\n": -2.0, "b\n": -1.0, "c\n": -3.0})
    members = [Judging(f"m{place}", "bca") for place in range(3)]
    models = {one.name: one for one in (fused, *members)}
    calls = []
    asked = request("abc")
    live = JudgeRequest(TASK, asked.candidates, recording_models(models, calls), 7)
    verdict = judge(live)
    fingerprints = {name: one.fingerprint for name, one in models.items()}
    scorers = [name for name, one in models.items() if isinstance(one, Scorer)]
    played = playback_models(fingerprints, calls, scorers)
    again = judge(JudgeRequest(TASK, asked.candidates, played, 7))
    assert again == verdict and verdict.chosen == 1
    assert list(itertools.chain(*(call.samples for call in calls))) == [
        sample for _, sample in verdict.samples
    ]
