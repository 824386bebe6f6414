"""The API over real connections: forms as OpenAI's, refusals by name, limits, clients that go."""

import asyncio
import hashlib
import json
import socket
import threading

import pytest
from process_helpers import wait_until
from serving_helpers import KEY, TEMPLATE, build_model, serving

from molora_fed.errors import ConfigError
from molora_fed.serving.api import Limits, load_keys

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return build_model(tiny_checkpoint("llama"), template=TEMPLATE)


@pytest.fixture(scope="module")
def api(model):
    with serving(model) as running:
        yield running


def read_events(response):
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def get_error(response, status, code):
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code), error
    assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
    return error


# -- answers --------------------------------------------------------------------------------


def test_models_are_the_fused_one_its_specialists_and_the_base(api):
    with api.client() as client:
        listed = client.get("/v1/models").json()
        assert [one["id"] for one in listed["data"]] == ["fused", "expert-0", "expert-1", "base"]
        assert client.get("/v1/models/base").json() == listed["data"][-1]
        get_error(client.get("/v1/models/nobody"), 404, "model_not_found")


def test_a_completion_and_its_stream_are_one_text(api):
    body = {"prompt": "Hello", "max_tokens": 20, "seed": 3, "temperature": 1.2}
    whole = api.ask(**body).json()
    assert whole["object"] == "text_completion" and whole["model"] == "fused"
    (choice,) = whole["choices"]
    assert choice["finish_reason"] == "length" and choice["logprobs"] is None
    assert whole["usage"] == {"prompt_tokens": 5, "completion_tokens": 20, "total_tokens": 25}
    response = api.ask(**body, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last = read_events(response)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == choice["text"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == [] and last["usage"] == whole["usage"]


def test_a_chat_and_its_stream_are_one_text(api):
    body = {"messages": MESSAGES, "max_completion_tokens": 12, "seed": 1}
    whole = api.ask("/v1/chat/completions", **body).json()
    message = whole["choices"][0]["message"]
    assert message["role"] == "assistant"
    assert whole["usage"]["prompt_tokens"] == len("user: hello\nassistant:")
    chunks = read_events(api.ask("/v1/chat/completions", **body, stream=True))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant" and deltas[-1] == {}
    assert "".join(delta.get("content", "") for delta in deltas) == message["content"]
    assert "usage" not in chunks[0]


def test_several_prompts_and_copies_have_their_indices(api):
    found = api.ask(prompt=["ab", "cd"], n=2, seed=5, max_tokens=6).json()["choices"]
    assert [choice["index"] for choice in found] == [0, 1, 2, 3]
    alone = api.ask(prompt="cd", n=2, seed=5, max_tokens=6).json()["choices"]
    assert [choice["text"] for choice in found[2:]] == [choice["text"] for choice in alone]
    first, second = (list(api.served.encode(prompt)) for prompt in ("ab", "cd"))
    ids = api.ask(prompt=second, seed=5, max_tokens=6).json()["choices"]
    assert ids[0]["text"] == alone[0]["text"]
    both = api.ask(prompt=[first, second], n=2, seed=5, max_tokens=6).json()["choices"]
    assert [one["text"] for one in both] == [one["text"] for one in found]


def test_gates_are_told_where_they_are_asked_for(api):
    fused = api.ask(prompt="a", max_tokens=4, molora_gates=True).json()["choices"][0]
    assert fused["molora_gates"].keys() == {"expert-0", "expert-1", "base"}
    assert sum(fused["molora_gates"].values()) == pytest.approx(1.0, abs=1e-5)
    body = {"model": "expert-1", "messages": MESSAGES, "max_tokens": 4, "molora_gates": True}
    *chunks, last = read_events(api.ask("/v1/chat/completions", **body, stream=True))
    assert last["choices"][0]["molora_gates"] == {"expert-0": 0.0, "expert-1": 1.0, "base": 0.0}
    assert all("molora_gates" not in chunk["choices"][0] for chunk in chunks)
    assert "molora_gates" not in api.ask(prompt="a", max_tokens=1).json()["choices"][0]


def test_probabilities_of_tokens(api):
    body = {"prompt": "ab", "max_tokens": 5, "temperature": 0}
    told = api.ask(**body, logprobs=3).json()["choices"][0]["logprobs"]
    assert len(told["tokens"]) == 5 and told["text_offset"][0] == 0
    for log_prob, top in zip(told["token_logprobs"], told["top_logprobs"], strict=True):
        assert log_prob == max(top.values()) <= 0.0 and len(top) <= 3
    streamed = read_events(api.ask(**body, logprobs=3, stream=True))
    parts = [chunk["choices"][0]["logprobs"] for chunk in streamed]
    assert [t for part in parts if part for t in part["tokens"]] == told["tokens"]
    chat = {"messages": MESSAGES, "max_tokens": 2, "logprobs": True, "top_logprobs": 2}
    content = api.ask("/v1/chat/completions", **chat).json()["choices"][0]["logprobs"]["content"]
    assert [len(one["top_logprobs"]) for one in content] == [2, 2]
    assert content[0]["bytes"] in (None, list(content[0]["token"].encode()))


def test_a_stop_string_ends_the_text(api):
    body = {"prompt": "ab", "max_tokens": 16, "temperature": 0}
    text = api.ask(**body).json()["choices"][0]["text"]
    choice = api.ask(**body, stop=[text[5:7], "never"]).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["text"] == text[: text.find(text[5:7])]


def test_an_empty_prompt_begins_a_document(api):
    assert api.ask(prompt="", max_tokens=2).json()["usage"]["prompt_tokens"] == 1


# -- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"echo": True}, "echo", "unsupported_parameter"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter"),
        ({"presence_penalty": 0.5}, "presence_penalty", "unsupported_parameter"),
        ({"tempreature": 1}, "tempreature", "unknown_parameter"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 65}, "max_tokens", "invalid_value"),
        ({"n": 17}, "n", "invalid_value"),
        ({"stop": ["a"] * 5}, "stop", "invalid_value"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"prompt": [1, 9999]}, "prompt", "invalid_value"),
        ({"prompt": {}}, "prompt", "invalid_value"),
        ({"prompt": "x" * 65}, "prompt", "context_length_exceeded"),
        ({"stream_options": {"include_usage": True}}, None, "invalid_value"),
    ],
)
def test_a_parameter_that_is_wrong_is_named(api, body, param, code):
    error = get_error(api.ask(**body), 400, code)
    assert (error["param"] or "").partition(".")[0] == (param or "")
    assert error["type"] == "invalid_request_error"


def test_what_asks_for_nothing_is_taken(api):
    neutral = {"echo": False, "logit_bias": None, "presence_penalty": 0, "user": "me", "n": 1}
    assert api.ask(prompt="a", max_tokens=1, **neutral).status_code == 200


def test_unknown_models_paths_methods_and_names_are_refused(api):
    get_error(api.ask(model="gpt-9"), 404, "model_not_found")
    get_error(api.ask("/v1/embeddings"), 404, "not_found")
    with api.client() as client:
        get_error(client.get("/v1/completions"), 405, "method_not_allowed")
    with api.client(Host="evil.example") as client:
        get_error(client.get("/v1/models"), 421, "wrong_host")


@pytest.mark.parametrize(
    ("content", "sort", "status"),
    [
        (b"{", "application/json", 400),
        (b"[" * 5_000, "application/json", 400),
        (b'{"model": "\\ud800"}', "application/json", 400),
        (b'{"model": "fused", "temperature": NaN}', "application/json", 400),
        (b"\xff", "application/json", 400),
        (b"[]", "application/json", 400),
        (b"{}", "text/plain", 415),
    ],
)
def test_malformed_bodies_are_refused(api, content, sort, status):
    with api.client() as client:
        headers = {"Content-Type": sort}
        response = client.post("/v1/completions", content=content, headers=headers)
        get_error(response, status, "invalid_json")


def test_a_base_without_a_chat_template_says_so(tiny_checkpoint):
    with serving(build_model(tiny_checkpoint("llama"))) as plain:
        response = plain.ask("/v1/chat/completions", messages=MESSAGES)
        error = get_error(response, 400, "no_chat_template")
        assert "/v1/completions" in error["message"]


def test_messages_that_the_template_refuses(api):
    wrong = [*MESSAGES, {"role": "assistant", "content": "hi"}]
    error = get_error(api.ask("/v1/chat/completions", messages=wrong), 400, "invalid_value")
    assert "No answer to an answer" in error["message"]
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    get_error(api.ask("/v1/chat/completions", messages=image), 400, "invalid_value")


# -- limits ---------------------------------------------------------------------------------


def test_bodies_that_are_too_large_are_not_read(api, model):
    with serving(model, limits=Limits(body_bytes=1_000)) as small:
        get_error(small.ask(prompt="x" * 2_000), 413, "request_too_large")
        with small.client() as client:
            pieces = (b"x" * 300 for _ in range(9))
            headers = {"Content-Type": "application/json"}
            response = client.post("/v1/completions", content=pieces, headers=headers)
            get_error(response, 413, "request_too_large")


def send_slowly(port, body_bytes=100):
    """A request whose body never ends; returns what comes back."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
        connection.sendall(f"{head}\r\nContent-Length: {body_bytes}\r\n\r\n{{".encode())
        parts = []
        while part := connection.recv(65_536):
            parts.append(part)
    return b"".join(parts)


def test_a_slow_body_is_not_waited_for(model):
    with serving(model, limits=Limits(body_seconds=0.2)) as hasty:
        answer = send_slowly(hasty.port)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "timeout"


def test_an_answer_that_takes_too_long_ends_with_an_error(model):
    with serving(model, held=True, limits=Limits(request_seconds=0.5)) as slow:
        get_error(slow.ask(prompt="a"), 504, "timeout")
        lines = slow.ask(prompt="a", stream=True).text.strip().split("\n\n")
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout"


def test_too_many_requests_are_told_when_to_come_again(model):
    with serving(model, held=True, max_texts=1, max_waiting=1) as busy:
        answers = []
        body = {"prompt": "a", "max_tokens": 3}
        asking = [threading.Thread(target=lambda: answers.append(busy.ask(**body))) for _ in "ab"]
        asking[0].start()
        wait_until(lambda: len(busy.batch) == 1)
        asking[1].start()
        wait_until(lambda: len(busy.scheduler._waiting) == 1)
        refused = busy.ask(**body)
        error = get_error(refused, 429, "rate_limit_exceeded")
        assert error["type"] == "rate_limit_error" and int(refused.headers["retry-after"]) >= 1
        busy.batch.free()
        for thread in asking:
            thread.join()
        assert [answer.status_code for answer in answers] == [200, 200]


def test_a_later_answer_on_a_connection_may_take_longer_than_a_head(model):
    """Heads have a time; once one is there, even the second of a connection, it is over."""
    with serving(model, held=True, head_seconds=0.3) as api, api.client() as client:
        body = {"model": "fused", "prompt": "a", "max_tokens": 2, "seed": 1}
        api.batch.allow(1)
        assert client.post("/v1/completions", json=body).status_code == 200
        threading.Timer(1.0, api.batch.free).start()
        assert client.post("/v1/completions", json=body).status_code == 200
        with socket.create_connection(("127.0.0.1", api.port), timeout=30) as silent:
            silent.sendall(b"POST /v1/completions HTTP/1.1\r\nHost:")
            assert silent.recv(1) == b""


def test_a_client_that_does_not_read_is_not_waited_for(model, monkeypatch):
    """Neither its answer nor its error goes out; then its connection is closed."""
    monkeypatch.setattr("molora_fed.serving.api.REFUSAL_SECONDS", 0.1)
    body = json.dumps({"model": "fused", "prompt": "a", "seed": 1, "stream": True}).encode()
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
    stuck = []

    async def ask(api):
        messages = [{"type": "http.request", "body": body}]
        never = asyncio.Event()

        async def receive():
            if messages:
                return messages.pop()
            await never.wait()

        async def send(message):
            await never.wait()

        await api({**scope, "client": ("127.0.0.1", 9)}, receive, send)

    with serving(model, limits=Limits(request_seconds=0.3)) as api:
        api.api._on_stuck = stuck.append
        asyncio.run(ask(api.api))
        assert stuck == [("127.0.0.1", 9)]
        wait_until(lambda: len(api.batch) == 0 and api.running == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_place(model, stream):
    with serving(model, held=True, max_texts=1) as api:
        asked = {"model": "fused", "prompt": "a", "max_tokens": 60, "seed": 1, "stream": stream}
        body = json.dumps(asked)
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
        gone = socket.create_connection(("127.0.0.1", api.port))
        gone.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        wait_until(lambda: len(api.batch) == 1)
        gone.close()
        wait_until(lambda: any(" 499 " in line for line in api.log), what="noticing")
        api.batch.allow(1)
        wait_until(lambda: len(api.batch) == 0 and api.running == 0, what="the free place")
        api.batch.free()
        assert api.ask(prompt="b", max_tokens=2).status_code == 200


# -- keys, health, metrics ------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked(model):
    with serving(model, keys=[hashlib.sha256(KEY.encode()).digest()]) as running:
        yield running


@pytest.mark.parametrize(
    "header", [None, "Bearer wrong", f"Basic {KEY}", "Bearer é", f"Bearer {KEY}x"]
)
def test_without_a_key_nothing_is_told_but_health(locked, header):
    headers = {} if header is None else {"Authorization": header.encode()}
    with locked.client(**headers) as client:
        response = client.get("/v1/models")
        error = get_error(response, 401, "invalid_api_key")
        assert error["type"] == "authentication_error"
        assert response.headers["www-authenticate"] == "Bearer"
        get_error(client.post("/v1/completions", json={}), 401, "invalid_api_key")
        assert client.get("/healthz").json() == {"status": "ok"}


def test_a_key_opens(locked):
    with locked.client(Authorization=f"Bearer {KEY}", Host="any.example") as client:
        assert client.get("/v1/models").status_code == 200


def test_keys_of_a_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# of the team\n{KEY}\n\n")
    assert load_keys(file) == {hashlib.sha256(KEY.encode()).digest()}
    file.write_text("short\n")
    with pytest.raises(ConfigError, match="at least 16 characters, got key 1"):
        load_keys(file)
    file.write_text("\n")
    with pytest.raises(ConfigError, match="got 0 keys"):
        load_keys(file)
    with pytest.raises(ConfigError, match="No such file"):
        load_keys(tmp_path / "none")


def test_metrics_count_what_was_done(model):
    with serving(model) as api:
        api.ask(prompt="abcd", max_tokens=6)
        api.ask(prompt="a", model="nobody")
        api.ask("/secret/path")
        with api.client() as client:
            text = client.get("/metrics").text
    assert 'molora_api_requests_total{path="/v1/completions",status="200"} 1.0' in text
    assert 'molora_api_requests_total{path="/v1/completions",status="404"} 1.0' in text
    assert 'molora_api_requests_total{path="other",status="404"} 1.0' in text
    assert 'molora_api_tokens_total{kind="prompt"} 4.0' in text
    assert 'molora_api_tokens_total{kind="completion"} 6.0' in text
    gates = [line for line in text.splitlines() if line.startswith("molora_api_gates_total")]
    assert sum(float(line.rpartition(" ")[2]) for line in gates) == pytest.approx(6.0, abs=1e-3)
    assert "secret" not in text


def test_logs_hold_no_prompt_and_no_text(api):
    text = api.ask(prompt="a very private prompt", max_tokens=9).json()["choices"][0]["text"]
    api.ask(prompt="private", max_tokens=1_000)
    assert any("21 + 9 tokens" in line for line in api.log)
    assert not any("private" in line or text in line for line in api.log)


def test_who_stops_answers_no_more(model):
    with serving(model) as api:
        api.api.is_closing = True
        refused = api.ask(prompt="a")
        get_error(refused, 503, "closing")
        with api.client() as client:
            assert client.get("/healthz").status_code == 503
