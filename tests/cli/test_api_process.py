"""`molora api` in a process of its own: OpenAI's client, curl, a cascade, signals, bad starts."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from contextlib import contextmanager

import openai
import pytest
from page_helpers import find_blocks, read_page
from process_helpers import wait_until

from molora_fed.errors import PortTakenError

KEY = "sk-only-for-these-tests"
SECONDS = 60

pytestmark = pytest.mark.processes


class Server:
    """A running `molora api`."""

    def __init__(self, folder, *options):
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "molora_cli.main", "api", str(folder), "--port", "0",
                "--threads", "1", "--log-requests", *map(str, options),
            ],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        line = self.process.stdout.readline()
        found = re.match(r"serving (\S+): (.*)", line)
        if found is None:
            pytest.fail(f"it did not start: {self.process.stderr.read()}")
        self.url, self.names = found[1], found[2].split(", ")

    def client(self, kind=openai.OpenAI, key="none", **more):
        return kind(base_url=self.url, api_key=key, max_retries=0, timeout=SECONDS, **more)

    def read_metric(self, name):
        url = self.url.removesuffix("/v1") + "/metrics"
        with urllib.request.urlopen(url, timeout=SECONDS) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    def end(self, number=signal.SIGTERM):
        """Exit code and what was logged."""
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, err.splitlines()


@contextmanager
def serving(folder, *options):
    server = Server(folder, *options)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.communicate()


@pytest.fixture(scope="module")
def server(fused_once):
    with serving(fused_once / "out", "--base", fused_once / "tiny" / "base") as running:
        yield running


def test_the_code_of_the_page(server, capsys):
    (session,) = find_blocks(read_page("serving.md"), "console")
    (code,) = find_blocks(read_page("serving.md"), "python")
    assert re.search(r"^serving http://127.0.0.1:8000/v1: fused, base, ", session, re.MULTILINE)
    exec(code.replace("http://127.0.0.1:8000/v1", server.url).replace("def main(", "abc"), {})
    assert "{'base': " in capsys.readouterr().out


def test_the_client_of_openai(server):
    client = server.client()
    names = [model.id for model in client.models.list()]
    assert names == server.names and {"fused", "base"} <= set(names)
    settings = {"model": "fused", "prompt": "abc", "max_tokens": 12, "seed": 4, "temperature": 1.0}
    whole = client.completions.create(**settings, extra_body={"molora_gates": True})
    assert whole.usage.completion_tokens == 12 and whole.choices[0].finish_reason == "length"
    assert sum(whole.choices[0].molora_gates.values()) == pytest.approx(1.0, abs=1e-4)
    stream = client.completions.create(
        **settings, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].text and chunks[-1].usage == whole.usage
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model="fused", messages=[{"role": "user", "content": "a"}])
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="gpt-9", prompt="a")
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="fused", prompt="a", echo=True)
    assert refused.value.param == "echo"


def test_experts_are_chosen_after_the_prompt(molora, fused_once):
    """The API's texts are those of `molora generate`."""
    folder, base = fused_once / "out", fused_once / "tiny" / "base"
    with serving(folder, "--base", base, "--experts", "merged") as running:
        asked = {"prompt": "abc dab", "max_tokens": 12, "temperature": 0}
        said = running.client().completions.create(model="fused", **asked)
        alone = running.client().completions.create(model="base", **asked)
    told = ["--prompt", "abc dab", "--max-new-tokens", 12, "--experts", "merged"]
    ran = molora("generate", folder, "--base", base, *told)
    assert ran.out.removesuffix("\n") == "abc dab" + said.choices[0].text
    assert alone.choices[0].finish_reason == "length"


def test_many_streams_at_once_are_the_texts_they_are_alone(server):
    """Every text of 64 streams, each with its own seed and length of prompt, and again alone."""

    async def ask(client, number):
        parts = []
        async for chunk in await client.completions.create(
            model=server.names[number % len(server.names)],
            prompt="abc " * (1 + number % 9),
            max_tokens=20 + number % 13,
            seed=number,
            stream=True,
        ):
            parts += [choice.text for choice in chunk.choices]
        return "".join(parts)

    async def ask_all():
        async with server.client(openai.AsyncOpenAI) as client:
            together = await asyncio.gather(*(ask(client, number) for number in range(64)))
            alone = [await ask(client, number) for number in range(0, 64, 7)]
        return together, alone

    together, alone = asyncio.run(ask_all())
    assert together[::7] == alone
    assert len(set(together)) == 64


def test_curl_and_a_client_that_goes(server):
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("no curl on this machine")
    body = {"model": "fused", "prompt": "abc", "max_tokens": 100, "stream": True}
    command = [curl, "-sN", f"{server.url}/completions", "-H", "Content-Type: application/json"]
    done = subprocess.run(
        [*command, "-d", json.dumps({**body, "max_tokens": 5, "seed": 1})],
        capture_output=True, text=True, check=True, timeout=SECONDS,
    )  # fmt: skip
    assert done.stdout.startswith('data: {"id":"cmpl-')
    assert done.stdout.endswith("data: [DONE]\n\n")
    # Many texts at once make the first of them slow enough to leave.
    going = [
        subprocess.Popen([*command, "-d", json.dumps({**body, "n": 16})], stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    for process in going:
        assert process.stdout.read(6) == b"data: "
        process.kill()
        process.communicate()
    wait_until(lambda: server.read_metric("molora_api_running ") == 0, what="free places")
    gone = server.read_metric('molora_api_requests_total{path="/v1/completions",status="499"}')
    assert gone >= 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_after_what_runs(fused_once, number):
    with serving(fused_once / "out", "--base", fused_once / "tiny" / "base") as server:
        stream = server.client().completions.create(
            model="fused", prompt="abc", max_tokens=100, n=16, seed=1, stream=True
        )
        first = next(stream)
        server.process.send_signal(number)
        chunks = [first, *stream]
        finished = [c for chunk in chunks for c in chunk.choices if c.finish_reason is not None]
        assert len(finished) == 16
        _, err = server.process.communicate(timeout=SECONDS)
        assert server.process.returncode == 0
        lines = err.splitlines()
        assert lines[-1] == "stopped" and "POST /v1/completions 200" in lines[-2]
        assert not any("abc" in line for line in lines)


def test_texts_that_take_too_long_after_a_signal_end_with_an_error(fused_once):
    base = fused_once / "tiny" / "base"
    with serving(fused_once / "out", "--base", base, "--finish-seconds", 0) as server:
        stream = server.client().completions.create(
            model="fused", prompt="abc", max_tokens=100, n=16, seed=1, stream=True
        )
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="the server stops"):
            list(stream)
        server.process.communicate(timeout=SECONDS)
        assert server.process.returncode == 0


def test_keys(fused_once, tmp_path):
    (tmp_path / "keys").write_text(f"{KEY}\n")
    with serving(fused_once / "tiny" / "base", "--key-file", tmp_path / "keys") as server:
        assert server.names == ["base"]
        assert [model.id for model in server.client(key=KEY).models.list()] == ["base"]
        with pytest.raises(openai.AuthenticationError):
            server.client(key=KEY[:-1]).models.list()


def test_a_cascade_asks_it_as_a_member(molora, server, tmp_path):
    (tmp_path / "c.toml").write_text(
        f"""
        [cascade]
        probe = "fused"
        members = ["specialist", "base"]
        temperature = 1.0
        max_new_tokens = 4
        [models.fused]
        kind = "endpoint"
        url = "{server.url}"
        model = "fused"
        api = "completions"
        [models.specialist]
        kind = "endpoint"
        url = "{server.url}"
        model = "{server.names[1]}"
        api = "completions"
        [models.base]
        kind = "endpoint"
        url = "{server.url}"
        model = "base"
        api = "completions"
        """
    )
    tasks = [
        {"id": f"t{n}", "family": "f", "prompt": f"abc {n} ", "extractor": "normalised-text"}
        for n in range(3)
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    ran = molora(
        "cascade", "run", tmp_path / "c.toml", "--tasks", tmp_path / "t.jsonl",
        "--out", tmp_path / "run",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert "of 3 tasks" in ran.out
    verified = molora(
        "trace", "verify", tmp_path / "run" / "trace", "--key", tmp_path / "run" / "public.pem"
    )
    assert verified.code == 0, verified.err
    replayed = molora("trace", "replay", tmp_path / "run" / "trace")
    assert "0 differences" in replayed.out


def test_a_start_that_fails_is_one_line(molora, fused_once, tmp_path):
    base = fused_once / "tiny" / "base"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ran = molora("api", base, "--port", taken.getsockname()[1])
    assert ran.code == PortTakenError.exit_code and "choose another with --port" in ran.err
    (tmp_path / "keys").write_text("short\n")
    for arguments, said in (
        ([tmp_path], "Cannot open a model in"),
        ([tmp_path / "none"], "Cannot open a model in"),
        ([base, "--host", "0.0.0.0"], "Cannot serve on 0.0.0.0 without keys"),
        ([base, "--key-file", tmp_path / "keys"], "at least 16 characters"),
    ):
        ran = molora("api", *arguments, "--port", "0")
        assert ran.code and said in ran.err and len(ran.err.splitlines()) == 1, ran.err
