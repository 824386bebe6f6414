import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from cascade_helpers import Kept, answer_all, make_cascade
from hypothesis import given, settings
from hypothesis import strategies as st

from molora_fed import hookimpl
from molora_fed.cascade.contract import (
    EscalationPolicy,
    PolicyOptions,
    Sample,
    Verdict,
    open_judge,
)
from molora_fed.cascade.escalation import Lineup
from molora_fed.cascade.records import drop_times
from molora_fed.cascade.replay import Replayer, replay_trace
from molora_fed.cascade.retrieval import Example, Retrieval
from molora_fed.cascade.running import CascadeSettings
from molora_fed.cascade.session import run_in_folder
from molora_fed.cascade.summary import summarise_runs
from molora_fed.cascade.task_files import save_tasks
from molora_fed.errors import CascadeError
from molora_fed.plugins import load_plugins
from molora_fed.reporting.cascade import write_cascade_report
from molora_fed.storage.keys import build_public_pem, load_or_make_key
from molora_fed.testing import ScriptedModel, build_task
from molora_fed.tracing.reading import read_records
from molora_fed.tracing.verifying import verify


class TestPlugin:
    """A judge that asks and scores, under a name of its own."""

    __test__ = False

    @hookimpl
    def register_judges(self, register):
        register("asking", judge_by_asking, summary="Asks", source="test")

    @hookimpl
    def register_escalation_policies(self, register):
        register("filed", FiledPolicy, summary="Reads its mode", source="test")


class FiledPolicy(EscalationPolicy):
    """The mode that stands in a file."""

    class Options(PolicyOptions):
        table: Path

    def __init__(self, options):
        super().__init__(options)
        self.mode = options.table.read_text()

    def choose(self, evidence):
        return self.mode


def judge_by_asking(request):
    from molora_fed.cascade.contract import Request

    model = request.models["scorer"]
    (said,) = model.sample([Request(request.task.prompt, request.seed)])
    scores = model.score(said.text, [one.text for one in request.candidates])
    return Verdict(scores.index(max(scores)), f"after {said.text}")


class ScoringModel(ScriptedModel):
    def score(self, prompt, answers):
        return [float(len(answer)) for answer in answers]

    def count_scoring(self, prompt, answers):
        return Sample("", flops=7.0, seconds=0.5)


@cache
def plugins():
    return load_plugins([("test 1", TestPlugin())])


@pytest.fixture(scope="module")
def key(tmp_path_factory):
    return load_or_make_key(tmp_path_factory.mktemp("keys") / "key.pem")


def make_models(*probe):
    return {
        "probe": ScriptedModel("probe", *(probe or ("x", "y", "x"))),
        "a": ScriptedModel("a", "y"),
        "b": ScriptedModel("b", "z"),
        "c": ScriptedModel("c", "y"),
    }


def make_real(models=None, **more):
    """A cascade by the names of installed plugins, so that it can be replayed."""
    registered = plugins()
    given_parts = {
        "policy": registered.escalation_policies.resolve("sigma")(None),
        "judge": open_judge("majority", registered),
        "extractors": {"normalised-text": registered.extractors.resolve("normalised-text")},
    }
    return make_cascade(models or make_models(), **{**given_parts, **more})


def make_tasks(count=4):
    return [replace(build_task(n), extractor="normalised-text") for n in range(count)]


def run(folder, key, cascade=None, tasks=None, **more):
    return run_in_folder(
        cascade or make_real(), tasks or make_tasks(), folder, key=key, plugins=plugins(), **more
    )


def read(folder, kind="decision"):
    return [one.body for one in read_records(folder / "trace") if one.kind == kind]


def test_a_run_is_recorded_replayed_and_sealed(tmp_path, key):
    result = run(tmp_path, key)
    assert (result.totals.tasks, result.totals.correct) == (4, 4)
    assert result.replay.decisions == 4 and not result.replay.differences
    report = verify(tmp_path / "trace", build_public_pem(key), result.root)
    assert report.ok, report.problems
    assert [one["state"] for one in read(tmp_path, "state")] == [
        "PENDING",
        "EXECUTING",
        "VERIFYING",
        "COMPLETED",
    ]
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").open()]
    assert answers[0] == {
        "task": "t0",
        "answer": "x",
        "winner": "probe",
        "mode": "arena_lite",
        "state": "COMPLETED",
    }


def test_a_finished_run_is_read_and_nobody_is_asked(tmp_path, key):
    first = run(tmp_path, key)
    models = make_models()
    again = run(tmp_path, key, make_real(models))
    assert again.totals == first.totals and again.root == first.root
    assert not any(model.asked for model in models.values())


def test_a_stopped_run_goes_on_where_it_stopped(tmp_path, key):
    class Stopping(ScriptedModel):
        def sample(self, requests):
            if len(self.asked) == 2:
                raise KeyboardInterrupt
            return super().sample(requests)

    models = {**make_models(), "b": Stopping("b", "z")}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", key, make_real(models), with_times=False, survey=True)
    again = make_models()
    result = run(tmp_path / "stopped", key, make_real(again), with_times=False, survey=True)
    whole = run(tmp_path / "whole", key, with_times=False, survey=True)
    assert result.totals == whole.totals
    assert len(again["probe"].asked) == 2
    for kind in ("run", "decision", "survey", "state"):
        assert read(tmp_path / "stopped", kind) == read(tmp_path / "whole", kind)


@pytest.mark.parametrize(
    "other",
    [
        {"settings": CascadeSettings(max_new_tokens=9)},
        {"lineup": Lineup("probe", ("b", "a", "c"))},
        {"environment": {"torch": "another"}},
    ],
)
def test_another_cascade_is_refused_in_its_folder(tmp_path, key, other):
    run(tmp_path, key)
    with pytest.raises(CascadeError, match="begun with, got others"):
        run(tmp_path, key, make_real(**other))


def test_without_times_the_same_inputs_give_the_same_records(tmp_path, key):
    for name in ("one", "two"):
        run(tmp_path / name, key, with_times=False)
    files = [sorted((tmp_path / name / "trace").glob("*.jsonl")) for name in ("one", "two")]
    assert files[0] and all(b'"seconds"' not in file.read_bytes() for file in files[0])
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]


def test_failing_models_are_recorded_and_the_run_goes_on(tmp_path, key):
    models = {name: ScriptedModel(name, "x", fails=True) for name in ("probe", "a", "b", "c")}
    result = run(tmp_path, key, make_real(models))
    assert result.totals.failed == 4 and not result.replay.differences
    body = read(tmp_path)[0]
    assert body["state"] == "FAILED_MODELS" and body["mode"] == "full_arena"
    assert {one["failure"] for one in body["samples"]} == {"RuntimeError: out of order"}


def test_a_judge_that_asks_replays_from_the_record_and_from_the_models(tmp_path, key):
    models = {**make_models("x", "y", "z"), "scorer": ScoringModel("scorer", "hm")}
    judge = open_judge("asking", plugins())
    cascade = make_real(models, judge=judge, judge_name="asking")
    result = run(tmp_path, key, cascade)
    assert not result.replay.differences
    body = read(tmp_path)[0]
    assert body["cost"]["flops"] == 10 * 7 + 7
    assert body["models"] == ["probe", "a", "b", "c", "scorer"]
    fresh = {**make_models("x", "y", "z"), "scorer": ScoringModel("scorer", "hm")}
    replayed = replay_trace(tmp_path / "trace", models=fresh, plugins=plugins())
    assert not replayed.differences and replayed.resampled == 4 * 6
    other = {**fresh, "scorer": ScoringModel("scorer", "aha")}
    replayed = replay_trace(tmp_path / "trace", models=other, plugins=plugins())
    assert "judge" in replayed.differences[0]


def test_a_file_of_a_policy_travels_in_the_trace(tmp_path, key):
    table = tmp_path / "table.json"
    table.write_text("full_arena")
    policy = FiledPolicy(FiledPolicy.Options(table=table))
    run(tmp_path / "run", key, make_real(policy=policy, policy_name="filed"))
    table.unlink()
    (described,) = read(tmp_path / "run", "run")
    assert described["policy"]["options"] == {"table": "table.json"}
    report = replay_trace(tmp_path / "run" / "trace", plugins=plugins())
    assert report.decisions == 4 and not report.differences
    assert {body["mode"] for body in read(tmp_path / "run")} == {"full_arena"}


def test_models_that_say_something_else_now_are_reported(tmp_path, key):
    run(tmp_path, key)
    changed = {**make_models(), "a": ScriptedModel("a", "other")}
    report = replay_trace(tmp_path / "trace", models=changed, plugins=plugins())
    assert report.differences[0] == "task 't0': member 'a' sample 0 is not what the model says now"
    changed["a"].fingerprint = "another"
    report = replay_trace(tmp_path / "trace", models=changed, plugins=plugins())
    assert len(report.differences) == 1 and "fingerprint another" in report.differences[0]


def edit_answer(body):
    body["answer"] = "q"


def edit_mode(body):
    body["mode"] = "single_agent"


def edit_sigma(body):
    body["sigma"] = 0.25


def edit_text(body):
    body["samples"][0]["text"] = "w"


def edit_order(body):
    body["samples"][0], body["samples"][1] = body["samples"][1], body["samples"][0]


def edit_cost(body):
    body["cost"]["flops"] += 1


def edit_correct(body):
    body["correct"] = not body["correct"]


def edit_seed(body):
    body["samples"][1]["seed"] += 1


def edit_temperature(body):
    body["samples"][0]["temperature"] = 0.1


def edit_judge_seed(body):
    body["judge"]["seed"] += 1


def edit_prompt(body):
    body["asked"] = "another prompt"


def drop_sample(body):
    del body["samples"][-1]


def forget_judge(body):
    del body["judge"]


@pytest.mark.parametrize(
    "edit",
    [
        edit_answer,
        edit_mode,
        edit_sigma,
        edit_text,
        edit_cost,
        edit_correct,
        drop_sample,
        forget_judge,
        edit_order,
        edit_seed,
        edit_temperature,
        edit_judge_seed,
        edit_prompt,
    ],
)
def test_a_decision_that_does_not_follow_from_its_samples_is_reported(tmp_path, key, edit):
    run(tmp_path, key, tasks=make_tasks(1))
    (body,), (described,) = read(tmp_path), read(tmp_path, "run")
    edited = copy.deepcopy(body)
    edit(edited)
    replayer = Replayer(described, plugins=plugins())
    replayer.replay(body)
    assert not replayer.differences
    replayer.replay(edited)
    assert len(replayer.differences) == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_hostile_records_end_in_findings(data):
    kept = Kept()
    cascade = make_real()
    answer_all(make_tasks(1), cascade, kept)
    body = copy.deepcopy(kept.records[0][1])
    key = data.draw(st.sampled_from(sorted(body)))
    if isinstance(body[key], list | dict) and body[key] and data.draw(st.booleans()):
        inner = body[key][0] if isinstance(body[key], list) else body[key]
        if isinstance(inner, dict):
            inner[data.draw(st.sampled_from(sorted(inner)))] = data.draw(JSON)
    else:
        body[key] = data.draw(JSON)
    from molora_fed.cascade.session import describe_cascade

    replayer = Replayer(describe_cascade(cascade, plugins()), plugins=plugins())
    replayer.replay(body)
    assert replayer.decisions == 1
    assert all("\n" not in one for one in replayer.differences)


def test_times_are_dropped_and_details_kept():
    kept = Kept()
    task = replace(make_tasks(1)[0], details={"seconds": 3})
    answer_all([task], make_real(), kept)
    plain = drop_times(kept.records[0][1])
    assert plain["details"] == {"seconds": 3}
    assert "seconds" not in plain and "seconds" not in plain["samples"][0]
    assert "seconds" not in plain["cost"]


def test_retrieved_examples_are_shown_and_recorded(tmp_path, key):
    retrieval = Retrieval([Example("e", "prompt 17", "x")], threshold=0.5)
    models = make_models()
    run(tmp_path, key, make_real(models, retrieval=retrieval))
    assert models["probe"].asked[0][0].prompt == "prompt 17x\nprompt 0"
    body = read(tmp_path)[0]
    assert body["examples"][0]["id"] == "e" and body["asked"].endswith("prompt 0")
    assert not replay_trace(tmp_path / "trace", plugins=plugins()).differences


def test_a_survey_compares_configurations_and_attributes(tmp_path, key):
    run(tmp_path / "u", key, survey=True)
    summary = summarise_runs([tmp_path / "u"])
    shown = summary["configurations"]
    assert set(shown) == {
        "ACAR-U",
        "arena-2",
        "arena-3",
        "oracle",
        "single:a",
        "single:b",
        "single:c",
    }
    assert shown["ACAR-U"]["flops"] == 50 and shown["arena-3"]["flops"] == 30
    assert shown["ACAR-U"]["accuracy"]["point"] == 1 and shown["arena-3"]["accuracy"]["point"] == 0
    values = {name: one["value"]["point"] for name, one in summary["attribution"]["models"].items()}
    assert values == {"probe": 1.0, "a": 0.0, "b": 1.0, "c": 0.0}
    assert summary["sigma"] == [{"sigma": 0.5, "tasks": 4}]
    page = write_cascade_report(summary, tmp_path / "report")
    assert "100.0 % right" in page.read_text() and (tmp_path / "report" / "costs.png").is_file()


def test_agreement_on_a_wrong_answer_is_counted(tmp_path, key):
    run(tmp_path / "u", key, make_real(make_models("y")))
    retrieval = Retrieval([Example("e", "prompt 17", "x")], threshold=0.99)
    run(tmp_path / "uj", key, make_real(make_models("x"), retrieval=retrieval))
    summary = summarise_runs([tmp_path / "u", tmp_path / "uj"])
    assert summary["agreement"]["wrong"] == summary["agreement"]["kept"] == 4
    assert summary["families"]["fam"]["modes"]["single_agent"] == 4
    assert set(summary["configurations"]) == {"ACAR-U", "ACAR-UJ"}
    run(tmp_path / "other", key, tasks=make_tasks(2))
    with pytest.raises(CascadeError, match="tasks of"):
        summarise_runs([tmp_path / "u", tmp_path / "other"])


CONFIG = """
[cascade]
probe = "small"
members = ["a", "b", "c"]
temperature = 0.5
max_new_tokens = 4
[models.small]
kind = "base"
path = "m0"
[models.a]
kind = "base"
path = "m1"
[models.b]
kind = "base"
path = "m2"
[models.c]
kind = "base"
path = "m3"
"""


@pytest.mark.processes
def test_two_processes_give_the_same_bytes_and_replay_each_other(tmp_path, tiny_checkpoint, key):
    load_or_make_key(tmp_path / "key.pem")
    for seed in range(4):
        (tmp_path / f"m{seed}").symlink_to(tiny_checkpoint("gpt_neox", seed))
    (tmp_path / "c.toml").write_text(CONFIG)
    save_tasks(make_tasks(3), tmp_path / "t.jsonl")
    started = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "molora_cli.main", "cascade", "run"),
                *(str(tmp_path / "c.toml"), "--tasks", str(tmp_path / "t.jsonl")),
                *("--out", str(tmp_path / name), "--key", str(tmp_path / "key.pem")),
                *("--no-times", "--survey"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for name in ("one", "two")
    ]
    said = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert "replayed 3 decisions" in said[0]
    files = [sorted(Path(tmp_path / name / "trace").glob("*.jsonl")) for name in ("one", "two")]
    assert len(files[0]) >= 2
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]
    from molora_fed.cascade.building import build_models
    from molora_fed.cascade.config import load_config

    models = build_models(load_config(tmp_path / "c.toml"), tmp_path, plugins())
    report = replay_trace(tmp_path / "two" / "trace", models=models, plugins=plugins())
    assert not report.differences and report.resampled >= 9
