"""Registered extractors, judges and policies keep their contracts; broken ones are caught."""

import random
from pathlib import Path

import pytest
from molora_acar.calibration import Observation, fit_calibration
from molora_acar.calibration_table import save_calibration
from molora_acar.judges import LikelihoodJudge, LikelihoodOptions, MajorityJudge, PairwiseJudge
from molora_acar.policies import AlwaysPolicy, SigmaPolicy
from pydantic import ConfigDict

from molora_fed.cascade.contract import (
    MODES,
    EscalationPolicy,
    Judge,
    JudgeOptions,
    PolicyOptions,
    Request,
    Sample,
    Verdict,
    open_judge,
)
from molora_fed.errors import CascadeError, PluginError
from molora_fed.hookspecs import check_callable
from molora_fed.plugins import load_plugins
from molora_fed.testing import (
    ScriptedModel,
    ScriptedScorer,
    build_evidence,
    build_judge_request,
    build_task,
    check_extractor_conformance,
    check_judge_conformance,
    check_policy_conformance,
    examine_extractor,
    examine_judge,
    examine_policy,
    extractors,
)

PLUGINS = load_plugins()


# Extractors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLUGINS.extractors.names())
def test_registered_extractor_conforms(name, monkeypatch):
    if name == "code-tests":  # it runs each text in a process of its own
        monkeypatch.setattr(extractors, "ODD", extractors.ODD[::4])
    check_extractor_conformance(PLUGINS.extractors.resolve(name))


def first_word(task, text):
    return next(iter(text.split()), None)


def first_character(task, text):
    return text[0]


def whole_number(task, text):
    return int(text) if text.isdecimal() else None


def by_chance(task, text):
    return random.choice("abcdefgh")


def counts_calls(task, text):
    counts_calls.calls += 1
    return str(counts_calls.calls)


counts_calls.calls = 0


def knows_the_answer(task, text):
    return task.answer or first_word(task, text)


def brackets(task, text):
    """Its own answer again for ordinary texts, but not where there is a bracket."""
    return f"{text.strip()}]" if "[[" in text else text.strip() or None


@pytest.mark.parametrize(
    ("extract", "reason"),
    [
        (first_character, "expected an answer or None from '', got IndexError"),
        (whole_number, "expected text or None from '7', got int"),
        (by_chance, "the same answer from the same text"),
        (counts_calls, "the same answer from the same text"),
        (brackets, r"canonical answer from '\[\[\[\[' to be itself"),
        ("extract", "expected a callable, got str"),
    ],
)
def test_broken_extractor_is_caught(extract, reason):
    with pytest.raises(PluginError, match=reason):
        check_extractor_conformance(extract)


def test_an_extractor_whose_time_grows_with_the_square_is_caught(monkeypatch):
    def count_pairs(task, text):
        return str(sum(1 for one in text[:3000] for other in text[:3000] if one < other))

    monkeypatch.setattr(extractors, "LIMIT_SECONDS", 0.05)
    with pytest.raises(PluginError, match=r"at most 0.05 s for a text, got .* to \d+ characters"):
        check_extractor_conformance(count_pairs)


def test_an_extractor_that_reads_the_right_answer_is_caught():
    assert all(one.problem is None for one in examine_extractor(knows_the_answer))
    with pytest.raises(PluginError, match="an answer that the right one does not change"):
        check_extractor_conformance(knows_the_answer, tasks=[build_task(answer="x")])


def test_an_extractor_of_another_kind_of_answers_may_differ_from_them():
    def length(task, text):
        return f"{len(text)} characters" if text.strip() else None

    check_extractor_conformance(length)


# Judges -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLUGINS.judges.names())
def test_registered_judge_conforms(name):
    check_judge_conformance(PLUGINS.judges.resolve(name))


@pytest.mark.parametrize(
    ("judge", "options"),
    [
        (LikelihoodJudge, LikelihoodOptions(model="scorer", per="character")),
        (PairwiseJudge, PairwiseJudge.Options(models=("m4", "scorer"))),
    ],
)
def test_judges_conform_with_other_options(judge, options):
    check_judge_conformance(judge, options)


def judge_last(request):
    answers = [one.answer is not None for one in request.candidates]
    places = [place for place, has_one in enumerate(answers) if has_one]
    return Verdict(places[-1] if places else 0, "the last")


def counts_from_one(request):
    return Verdict(len(request.candidates), "out of range")


def chooses_the_first(request):
    return Verdict(0, "the first")


def says_nothing(request):
    return Verdict(judge_last(request).chosen, "")


def rolls_dice(request):
    return Verdict(judge_last(request).chosen, f"rolled {random.random()}")


def ask(request, name):
    return request.models[name].sample([Request("which?", request.seed, max_new_tokens=2)])


def asks_in_silence(request):
    ask(request, "scorer")
    return judge_last(request)


def asks_the_first_member(request):
    verdict = judge_last(request)
    name = request.candidates[0].model
    said = ask(request, name)
    return Verdict(verdict.chosen, verdict.reason, tuple((name, one) for one in said))


def reads_failed_samples(request):
    (said,) = ask(request, "scorer")
    chosen = judge_last(request).chosen
    return Verdict(chosen, f"starts with {said.text[0]}", (("scorer", said),))


def empties_the_models(request):
    request.models.clear()
    return judge_last(request)


def judge_nothing(request):
    return None


@pytest.mark.parametrize(
    ("judge", "reason"),
    [
        (counts_from_one, "expected a candidate from 0 to 0, got 1 for candidates that answer a"),
        (chooses_the_first, "a candidate with an answer for candidates that answer None, a, None"),
        (says_nothing, "expected one line as reason, got ''"),
        (rolls_dice, "the same verdict on candidates that answer a, got another"),
        (asks_in_silence, "expected the 1 samples it asked for in Verdict.samples"),
        (asks_the_first_member, "models that are not there', got KeyError: 'm0'"),
        (reads_failed_samples, "copes with models that fail', got IndexError"),
        (empties_the_models, "expected the request as it was"),
        (judge_nothing, "expected a Verdict, got NoneType"),
    ],
)
def test_broken_judge_is_caught(judge, reason):
    with pytest.raises(PluginError, match=reason):
        check_judge_conformance(judge)


def test_a_judge_that_remembers_is_caught_by_replay():
    class Alternating(Judge):
        seen: list[int] = []  # noqa: RUF012

        def __call__(self, request):
            self.seen.append(1)
            return Verdict(judge_last(request).chosen, f"number {len(self.seen)}")

    broken = {one.name for one in examine_judge(Alternating) if one.problem}
    assert {"follows from what models say", "replays from what was recorded"} <= broken


def test_a_function_that_judges_conforms_with_options_of_its_requests():
    def named(request):
        return Verdict(judge_last(request).chosen, f"as {request.options['who']} says")

    assert examine_judge(named, {"who": "she"})[1].problem is None
    assert "KeyError" in str(examine_judge(named)[1].problem)


class Patient(Judge):
    """A judge with an option."""

    class Options(JudgeOptions):
        patience: int = 1
        who: str = "nobody"

    def __call__(self, request):
        return Verdict(judge_last(request).chosen, f"{self.options.who}, {self.options.patience}")


def load_judge(target):
    class Plugin:
        def register_judges(self, register):
            register("patient", target, summary="Waits", source="test")

    from molora_fed import hookimpl

    Plugin.register_judges = hookimpl(Plugin.register_judges)
    return load_plugins([("test 1", Plugin())])


def test_options_of_a_judge_are_checked_when_it_is_opened():
    plugins = load_judge(Patient)
    judge = open_judge("patient", plugins, {"patience": 3, "who": "she"})
    assert judge(build_judge_request()).reason == "she, 3"
    with pytest.raises(CascadeError) as caught:
        open_judge("patient", plugins, {"patience": "long", "whom": "her"})
    assert str(caught.value) == (
        "Cannot use judge 'patient': expected valid values among the keys patience, who, got "
        "patience: Input should be a valid integer, unable to parse string as an integer; whom: "
        "Extra inputs are not permitted. Correct [cascade.judge_options]."
    )


def test_a_class_that_judges_is_looked_at():
    class Uncallable:
        Options = JudgeOptions

    class Open(Patient):
        class Options(JudgeOptions):
            model_config = ConfigDict(extra="allow")

    assert check_callable(Patient) is None and check_callable(judge_last) is None
    assert check_callable(Judge) == "expected a class without abstract methods, got __call__"
    assert "got one without '__call__'" in str(check_callable(Uncallable))
    assert "extra='forbid'" in str(check_callable(Open))
    with pytest.raises(PluginError, match="without abstract methods"):
        open_judge("patient", load_judge(Judge))


def test_a_judge_without_defaults_asks_for_options():
    class Demanding(MajorityJudge):
        class Options(JudgeOptions):
            model: str

    (result,) = examine_judge(Demanding)
    assert "expected options that are given or have a default, got " in str(result.problem)
    assert not any(one.problem for one in examine_judge(Demanding, Demanding.Options(model="m0")))


# Policies -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """Options of the calibrated policy: a table fitted on made-up tasks."""
    generator, rows = random.Random(3), []
    for number in range(60):
        answers = generator.choices("ab", k=3)
        seen = build_evidence(answers, task=build_task(number, None))
        correct = {mode: generator.random() < 0.5 for mode in MODES}
        rows.append(Observation(seen, correct, dict(zip(MODES, (1.0, 2.0, 3.0), strict=True))))
    path: Path = tmp_path_factory.mktemp("calibration") / "table.json"
    save_calibration(path, fit_calibration(rows))
    return {"table": path}


@pytest.mark.parametrize("name", PLUGINS.escalation_policies.names())
def test_registered_policy_conforms(name, calibrated):
    policy = PLUGINS.escalation_policies.resolve(name)
    options = calibrated if "table" in policy.Options.model_fields else {}
    check_policy_conformance(policy, policy.Options(**options))


def test_a_policy_without_defaults_asks_for_options():
    (result,) = examine_policy(PLUGINS.escalation_policies.resolve("calibrated"))
    assert "expected options that are given or have a default, got table" in str(result.problem)


class Everyone(EscalationPolicy):
    def choose(self, evidence):
        return "everyone"


class NeedsThree(EscalationPolicy):
    def choose(self, evidence):
        return "full_arena" if evidence.answers[2] is None else "single_agent"


class GetsTired(EscalationPolicy):
    def __init__(self, options):
        super().__init__(options)
        self.left = 5

    def choose(self, evidence):
        self.left -= 1
        return "full_arena" if self.left > 0 else "single_agent"


class RollsDice(EscalationPolicy):
    def choose(self, evidence):
        return random.choice(MODES)


class Scribbles(SigmaPolicy):
    def choose(self, evidence):
        evidence.task.details["seen"] = True
        return super().choose(evidence)


class KnowsTuples(EscalationPolicy):
    """A trace holds JSON, where a tuple is a list."""

    def choose(self, evidence):
        is_tuple = isinstance(evidence.task.details.get("choices"), tuple)
        return "full_arena" if is_tuple else "single_agent"


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (Everyone, "expected one of single_agent, .* for the answers 'a' at level 1.*'everyone'"),
        (NeedsThree, "expected a mode for the answers 'a' at level 1 of 'fam', got IndexError"),
        (GetsTired, "expected the same mode for .* in any order, got full_arena and single_agent"),
        (RollsDice, "the same mode"),
        (Scribbles, "expected the evidence as it was"),
        (KnowsTuples, "the recorded mode full_arena from the trace, got single_agent"),
    ],
)
def test_broken_policy_is_caught(policy, reason):
    with pytest.raises(PluginError, match=reason):
        check_policy_conformance(policy)


def test_options_of_a_policy_reach_it():
    check_policy_conformance(AlwaysPolicy, AlwaysPolicy.Options(mode="single_agent"))
    assert isinstance(AlwaysPolicy.Options(), PolicyOptions)


# Builders -----------------------------------------------------------------------------------------


def test_scripted_models_say_their_texts_and_remember_what_they_were_asked():
    model = ScriptedModel("one", "a", "b")
    asked = [Request("p", seed) for seed in range(3)]
    assert [sample.text for sample in model.sample(asked)] == ["a", "b", "a"]
    assert model.asked == [asked]
    scorer = ScriptedScorer("two", "b")
    assert scorer.score("p", ["ccc", "b\n"]) == [-3.0, 0.0]
    assert scorer.count_scoring("p", ["b"]) == Sample("", flops=7.0, seconds=0.5)


def test_built_evidence_has_its_sigma():
    assert build_evidence(("a", "b", "b")).sigma == 0.5
    assert build_evidence((None,)).texts == ("",)
