"""A real HTTP server on loopback that does everything wrong a server can."""

import time
import tracemalloc

import pytest
from cascade_helpers import Kept, answer_all, make_cascade

from molora_fed.cascade.config import EndpointSource
from molora_fed.cascade.contract import Request
from molora_fed.cascade.endpoint import EndpointModel
from molora_fed.errors import CascadeError
from molora_fed.testing import ScriptedModel, build_task
from molora_fed.testing.endpoints import serve_faults


@pytest.fixture(scope="module")
def server():
    with serve_faults() as found:
        yield found


def build(server, model, **more):
    given = {
        "kind": "endpoint",
        "url": server.url,
        "model": model,
        "timeout_seconds": 0.4,
        "deadline_seconds": 0.8,
        "retries": 1,
        "backoff_seconds": 0.01,
    }
    return EndpointModel(model, EndpointSource(**{**given, **more}))


FAULTS = {
    "silent": ("nothing within 0.4 s", 2),
    "broken": ("status 500", 2),
    "denied": ("status 401", 1),
    "malformed": ("malformed JSON", 2),
    "strange": ("without a text", 2),
    "empty": ("empty answer", 2),
    "wordless": ("empty text", 2),
    "huge": ("more than 1048576 bytes", 1),
    "long": ("more than 32768 characters", 1),
    "packed": ("compressed", 1),
    "dripping": ("no whole answer within 0.8 s", 2),
    "cut": ("connection failed", 2),
    "elsewhere": ("status 302", 1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_a_failed_sample_in_time(server, fault):
    started = time.monotonic()
    (sample,) = build(server, fault).sample([Request("p", 1)])
    said, attempts = FAULTS[fault]
    assert said in sample.failure and "\n" not in sample.failure
    assert (sample.text, sample.attempts) == ("", attempts)
    assert time.monotonic() - started < 5


def test_nobody_there_is_a_failed_sample(server):
    model = build(server, "good", url="http://127.0.0.1:1/v1")
    assert "connection failed" in model.sample([Request("p", 1)])[0].failure


def test_a_huge_answer_is_never_held(server):
    model = build(server, "huge")
    model.sample([Request("p", 1)])
    tracemalloc.start()
    model.sample([Request("p", 1)])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5 * 2**20


def test_a_good_answer_with_its_price(server):
    model = build(
        server, "good", price_per_million_prompt=2.0, price_per_million_new=4.0, api="completions"
    )
    (sample,) = model.sample([Request("say x", 11, 5, 0.5, ("\n",))])
    assert (sample.text, sample.prompt_tokens, sample.new_tokens) == ("x", 7, 3)
    assert sample.price == pytest.approx((7 * 2 + 3 * 4) / 1e6)
    path, _, body = server.seen[-1]
    assert path == "/v1/completions"
    assert body == {
        "model": "good",
        "max_tokens": 5,
        "temperature": 0.5,
        "stream": False,
        "seed": 11,
        "stop": ["\n"],
        "prompt": "say x",
    }


def test_tokens_of_failed_tries_cost_too(server):
    (sample,) = build(server, "wordless", price_per_million_new=1.0).sample([Request("p", 1)])
    assert sample.new_tokens == 6 and sample.price == pytest.approx(6e-6)


def test_a_busy_endpoint_is_asked_again(server):
    (sample,) = build(server, "busy", retries=3).sample([Request("p", 1)])
    assert (sample.text, sample.attempts) == ("x", 3)


def test_text_that_is_no_text_and_counts_that_are_none(server):
    assert build(server, "surrogate").sample([Request("p", 1)])[0].text == "a?b"
    (sample,) = build(server, "lying").sample([Request("p", 1)])
    assert (sample.prompt_tokens, sample.new_tokens) == (0, 0)


def test_the_key_is_sent_and_written_nowhere_else(server, monkeypatch):
    with pytest.raises(CascadeError, match="MOLORA_TEST_KEY"):
        build(server, "good", api_key_env="MOLORA_TEST_KEY")
    monkeypatch.setenv("MOLORA_TEST_KEY", "sk-very-secret")
    model = build(server, "good", api_key_env="MOLORA_TEST_KEY")
    (sample,) = model.sample([Request("p", 1)])
    assert server.seen[-1][1]["Authorization"] == "Bearer sk-very-secret"
    assert "secret" not in repr(sample) + model.fingerprint


def test_several_samples_are_asked_at_once(server):
    started = time.monotonic()
    found = build(server, "silent", retries=0).sample([Request("p", n) for n in range(4)])
    assert all(one.failure for one in found) and time.monotonic() - started < 1.5


def test_a_run_over_faults_goes_on_and_the_record_says_what_happened(server):
    faults = ("broken", "malformed", "huge")
    models = {
        "probe": ScriptedModel("probe", "x", "y", "z"),
        **dict(zip("abc", (build(server, one, retries=0) for one in faults), strict=True)),
    }
    kept = Kept()
    answer_all([build_task(1), build_task(2)], make_cascade(models), kept)
    assert len(kept.records) == 2
    for _, body in kept.records:
        failures = [one["failure"] for one in body["samples"] if one["role"] == "member"]
        assert failures == ["status 500", "malformed JSON", "answer of more than 1048576 bytes"]
        assert (body["winner"], body["answer"], body["state"]) == ("probe", "x", "COMPLETED")
