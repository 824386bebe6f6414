"""What endpoints, models and files tell a cascade, and what its trace keeps of it."""

import json

import pytest
from cascade_helpers import make_cascade
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from molora_acar.sandbox import _read_outcome

from molora_fed import hookimpl
from molora_fed.cascade.config import EndpointSource
from molora_fed.cascade.contract import CascadeTask, Request, open_extractor, open_judge
from molora_fed.cascade.endpoint import EndpointModel
from molora_fed.cascade.session import run_in_folder
from molora_fed.cascade.task_files import load_examples, load_tasks
from molora_fed.errors import CascadeError
from molora_fed.plugins import load_plugins
from molora_fed.storage.keys import build_public_pem, load_or_make_key
from molora_fed.testing import ScriptedModel
from molora_fed.testing.endpoints import serve_faults
from molora_fed.tracing.verifying import verify
from molora_fed.tracing.writing import TraceWriter

SECRET = "sk-very-secret-0123"


class Plugin:
    @hookimpl
    def register_extractors(self, register):
        register("unescaping", unescape, summary="Reads a JSON text", source="test")


def unescape(task, text):
    return json.loads(f'"{text}"')


@pytest.fixture(scope="module")
def plugins():
    return load_plugins([("test 1", Plugin())])


@pytest.mark.parametrize("text", ["\\ud800", "\ud800", "a\udcffb"])
def test_half_a_character_stops_no_run(tmp_path, plugins, text):
    """Whether a model writes it, or an extractor makes it of what a model wrote."""
    key = load_or_make_key(tmp_path / "key.pem")
    cascade = make_cascade(
        {"a": ScriptedModel("a", text)},
        extractors={"unescaping": open_extractor("unescaping", plugins)},
        policy=plugins.escalation_policies.resolve("sigma")(None),
        judge=open_judge("majority", plugins),
    )
    tasks = [CascadeTask(f"t{n}", "f", "prompt", "unescaping", "x") for n in range(2)]
    result = run_in_folder(cascade, tasks, tmp_path / "run", key=key, plugins=plugins)
    assert result.totals.tasks == 2 and not result.replay.differences
    lines = (tmp_path / "run" / "answers.jsonl").read_text().splitlines()
    assert "\\" in json.loads(lines[0])["answer"]


def test_a_program_that_writes_half_a_character_is_an_outcome():
    """A program can write anything where the harness writes outcomes."""
    assert _read_outcome(b'"a\\ud800"').encode() == b"a\\ud800"
    assert _read_outcome(b'"gr\\u00f6\\u00dfe"') == "größe"


@pytest.fixture(scope="module")
def server():
    with serve_faults() as found:
        yield found


def build(url, **more):
    return EndpointModel("model", EndpointSource(kind="endpoint", url=url, model="echo", **more))


def test_a_key_that_is_echoed_stays_out_of_the_sample(server, monkeypatch):
    monkeypatch.setenv("MOLORA_TEST_KEY", SECRET)
    model = build(server.url, api_key_env="MOLORA_TEST_KEY")
    (sample,) = model.sample([Request("p", 1)])
    assert sample.failure is None and "[key]" in sample.text and SECRET not in str(sample)


def test_a_word_that_serves_as_key_changes_no_text(server, monkeypatch):
    monkeypatch.setenv("MOLORA_TEST_KEY", "e")
    model = build(server.url, api_key_env="MOLORA_TEST_KEY")
    assert model.sample([Request("p", 1)])[0].text == "Bearer e"


@pytest.mark.parametrize(
    "url",
    ["http://models.example/v1", "http://10.0.0.7", "http://localhost.example", "http://0x7f.1.2",
     "http://[2001:db8::1]/v1", "http://127.0.0.1.example/"],
)  # fmt: skip
def test_a_key_is_never_sent_in_the_clear_to_another_host(monkeypatch, url):
    monkeypatch.setenv("MOLORA_TEST_KEY", SECRET)
    with pytest.raises(CascadeError, match="expected https") as caught:
        build(url, api_key_env="MOLORA_TEST_KEY")
    assert SECRET not in str(caught.value)
    build(url)  # without a key it is the user's own affair


@pytest.mark.parametrize(
    "url", ["https://models.example", "http://localhost:1/v1", "http://127.0.0.9", "http://[::1]:1"]
)
def test_a_key_may_go_over_tls_or_to_this_machine(monkeypatch, url):
    monkeypatch.setenv("MOLORA_TEST_KEY", SECRET)
    build(url, api_key_env="MOLORA_TEST_KEY")


def test_names_of_torn_files_are_shown_without_what_terminals_obey(tmp_path):
    key = load_or_make_key(tmp_path / "key.pem")
    with TraceWriter(tmp_path / "trace", key=key, run_id="run") as writer:
        writer.append("decision", {})
    for number in range(300):
        (tmp_path / "trace" / f"\x1b]0;{number}\x07\u202e\n.torn").touch()
    notes = verify(tmp_path / "trace", build_public_pem(key)).notes
    assert len(notes) <= 101 and all(note.isprintable() for note in notes)


PIECES = st.sampled_from(
    [b'{"id": "a", "family": "f", "prompt": "p", "extractor": "e"}', b'"answer": "\\ud800"',
     b"{", b"}", b'"id"', b":", b",", b"[" * 3_000, b"9" * 5_000, b"NaN", b"1e999", b"\n", b"\xff",
     b"\x00", b'"details": {"x": [1]}', b"null"]
)  # fmt: skip


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(PIECES | st.binary(max_size=20), max_size=12).map(b"".join))
def test_whatever_a_file_of_tasks_holds_ends_in_one_line(tmp_path, data):
    (tmp_path / "tasks.jsonl").write_bytes(data)
    for load in (load_tasks, load_examples):
        try:
            load(tmp_path / "tasks.jsonl")
        except CascadeError as error:
            assert "\n" not in str(error) and len(str(error)) < 2_500


def test_a_task_of_deep_or_endless_numbers_is_refused(tmp_path):
    for details in ('{"x": ' + "[" * 90_000 + "]" * 90_000 + "}", '{"x": ' + "9" * 4_000 + "}"):
        line = '{"id": "a", "family": "f", "prompt": "p", "extractor": "e", "details": %s}'
        (tmp_path / "tasks.jsonl").write_text(line % details)
        with pytest.raises(CascadeError, match="line 1"):
            load_tasks(tmp_path / "tasks.jsonl")
