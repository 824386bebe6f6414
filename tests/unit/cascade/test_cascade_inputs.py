import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molora_fed.cascade.asking import compute_seed
from molora_fed.cascade.config import PromptTemplate, load_config
from molora_fed.cascade.records import ArtifactState, RunState, advance, store_artifact
from molora_fed.cascade.retrieval import Example, Retrieval
from molora_fed.cascade.task_files import hash_tasks, load_examples, load_tasks, save_tasks
from molora_fed.errors import CascadeError
from molora_fed.testing import build_task

GOOD = '{"id": "t", "family": "f", "prompt": "p", "extractor": "number"}'


def test_a_seed_follows_from_all_it_depends_on():
    base = ("task", "template", "model", 0)
    seed = compute_seed(*base)
    assert seed == compute_seed(*base) and 0 <= seed < 2**31
    others = {
        compute_seed("other", *base[1:]),
        compute_seed("task", "other", "model", 0),
        compute_seed("task", "template", "other", 0),
        compute_seed("task", "template", "model", 1),
        compute_seed(*base, environment="other"),
        compute_seed(*base, run_seed=1),
    }
    assert len(others | {seed}) == 7


@given(st.text(), st.lists(st.tuples(st.text(), st.text()), max_size=3))
def test_text_of_tasks_is_never_taken_for_places(prompt, examples):
    template = PromptTemplate("Q: {prompt} {x} A:", "{prompt}={answer};")
    shown = "".join(f"{p}={a};" for p, a in examples)
    assert template.render(prompt, examples) == f"{shown}Q: {prompt} {{x}} A:"


def test_examples_stand_where_the_template_says():
    template = PromptTemplate("Solve.\n{examples}{prompt}", "{answer}<{prompt}\n")
    assert template.render("{answer}", [("{examples}", "{prompt}")]) == (
        "Solve.\n{prompt}<{examples}\n{answer}"
    )
    assert template.hash != PromptTemplate("Solve.\n{examples}{prompt}").hash


@pytest.mark.parametrize("text", ["", "{prompt}{prompt}", "{prompt}{examples}{examples}"])
def test_a_template_without_its_places_is_refused(text):
    with pytest.raises(CascadeError, match="expected"):
        PromptTemplate(text)


def test_states_go_forward_only():
    state = advance(RunState.PENDING, RunState.EXECUTING)
    assert advance(state, RunState.VERIFYING) is RunState.VERIFYING
    for now, following in [
        (RunState.COMPLETED, RunState.PENDING),
        (RunState.VERIFYING, RunState.EXECUTING),
        (RunState.PENDING, RunState.COMPLETED),
        (ArtifactState.STORED, ArtifactState.CREATED),
    ]:
        with pytest.raises(CascadeError, match="Cannot go from state"):
            advance(now, following)


def test_a_file_of_a_run_passes_all_its_states(tmp_path):
    records = []
    store_artifact(tmp_path / "f", b"data", lambda kind, body: records.append((kind, body)))
    assert [str(body["state"]) for _, body in records] == [
        "CREATED",
        "STORING",
        "STORED",
        "VERIFIED",
    ]
    assert (tmp_path / "f").read_bytes() == b"data"


def test_tasks_survive_a_file(tmp_path):
    tasks = [build_task(1, details={"b": [1, 2], "a": None}, level=3), build_task(2, answer=None)]
    save_tasks(tasks, tmp_path / "t.jsonl")
    assert load_tasks(tmp_path / "t.jsonl") == tasks
    assert hash_tasks(tasks) != hash_tasks(tasks[::-1])
    assert load_examples(tmp_path / "t.jsonl") == [Example("t1", "prompt 1", "x")]


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "{",
        '{"id": "t"}',
        GOOD[:-1] + ', "more": 1}',
        GOOD[:-1] + ', "level": 0}',
        GOOD[:-1] + ', "details": {"x": NaN}}',
        GOOD.replace('"p"', '"\\ud800"'),
        GOOD.replace('"p"', "7"),
        GOOD + "\n" + GOOD,
        "[" * 100_000,
        GOOD[:-1] + ', "answer": "' + "x" * 300_000 + '"}',
        "",
    ],
)
def test_bad_tasks_are_one_readable_error(tmp_path, line):
    (tmp_path / "t.jsonl").write_text(line)
    with pytest.raises(CascadeError, match="Cannot read tasks") as caught:
        load_tasks(tmp_path / "t.jsonl")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1_000


def test_bytes_that_are_no_text_are_one_readable_error(tmp_path):
    (tmp_path / "t.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(CascadeError, match="line 1"):
        load_tasks(tmp_path / "t.jsonl")
    with pytest.raises(CascadeError, match="No such file"):
        load_tasks(tmp_path / "missing.jsonl")


def write_config(tmp_path, **cascade):
    path = tmp_path / "c.toml"
    lines = [f"{key} = {json.dumps(value)}" for key, value in cascade.items()]
    path.write_text("[cascade]\n" + "\n".join(lines) + '\n[models.m]\nkind = "base"\npath = "b"\n')
    return path


def test_a_description_with_defaults(tmp_path):
    config = load_config(write_config(tmp_path, probe="m"))
    assert config.cascade.samples == 3 and config.cascade.retrieval is None
    assert config.models["m"].kind == "base"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[cascade]\nwrong = 1\n[models.m]\nkind='base'\npath='b'", "cascade.wrong"),
        ("[cascade]\n[models.m]\nkind='other'", "models.m"),
        ("[cascade]\n[models.m]\nkind='specialist'\npath='a'", "cooperative and contributor"),
        ("[cascade]\n[models.m]\nkind='endpoint'\nmodel='x'\nurl='http://u:p@h/v1'", "password"),
        ("[cascade]\n[models.m]\nkind='endpoint'\nmodel='x'\nurl='file:///x'", "url"),
        ("[cascade]\nsamples = 99\n[models.m]\nkind='base'\npath='b'", "samples"),
        ("[cascade", "TOML"),
    ],
)
def test_a_wrong_description_names_what_is_wrong(tmp_path, text, said):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(CascadeError, match="Cannot read cascade") as caught:
        load_config(tmp_path / "c.toml")
    assert said in str(caught.value)


def test_retrieval_finds_the_similar_and_nothing_else():
    known = [
        Example(str(n), text, f"a{n}") for n, text in enumerate(["12+3=", "sort: cab", "12+4="])
    ]
    retrieval = Retrieval(known, threshold=0.3, count=2)
    found = retrieval.find("12+5=")
    assert {one.id for one in found} == {"0", "2"}
    assert [one.similarity for one in found] == sorted(one.similarity for one in found)
    assert retrieval.find("completely different words") == ()
    assert "1" not in {one.id for one in retrieval.find("sort: cab")}  # the task itself
    assert Retrieval(known, threshold=1.0).find("12+5=") == ()


def test_retrieval_refuses_what_cannot_be():
    with pytest.raises(CascadeError, match="Cannot retrieve"):
        Retrieval([], threshold=0.7)
    with pytest.raises(CascadeError, match="Cannot retrieve"):
        Retrieval([Example("1", "p", "a")], threshold=1.5)
