"""A tiny real model behind the API, in this process, and a batch whose steps a test lets happen."""

import asyncio
import threading
from contextlib import contextmanager

import httpx
from fused_helpers import build_fused
from process_helpers import wait_until

from molora_fed.inference.fused_build import build_causal_lm
from molora_fed.models.base import load_base
from molora_fed.serving.api import Api, Limits
from molora_fed.serving.batch import RunningBatch
from molora_fed.serving.connections import Doorkeeper, build_server
from molora_fed.serving.metrics import Metrics
from molora_fed.serving.models import ServedModel
from molora_fed.serving.scheduler import Scheduler
from molora_fed.serving.server import listen

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if messages[-1]['role'] == 'assistant' %}{{ raise_exception('No answer to an answer') }}"
    "{% endif %}assistant:"
)
KEY = "sk-a-key-of-the-tests"


def build_model(folder, *, template=None):
    """A fused model of two specialists and the base."""
    base = load_base(folder)
    base.tokenizer.chat_template = template
    return build_causal_lm(build_fused(base, kinds=("lora", "lora", None)))


class HeldBatch(RunningBatch):
    """Takes a step only when it may; `free` lets all happen."""

    def __init__(self, model, **more):
        super().__init__(model, **more)
        self._may = threading.Semaphore(0)
        self._is_free = False

    def allow(self, steps=1):
        self._may.release(steps)

    def free(self):
        self._is_free = True
        self._may.release()

    def step(self, tokens):
        if not self._is_free:
            assert self._may.acquire(timeout=30)
        return super().step(tokens)


class RunningApi:
    """An API that answers, and what is behind it."""

    def __init__(
        self, model, batch, *, keys=(), limits=None, any_host=False, head_seconds=10.0, **more
    ):
        self.served = ServedModel(model)
        self.batch = batch
        self.metrics = Metrics(self.served.experts)
        self.log = []
        self.scheduler = Scheduler(
            batch,
            self.served.copy_tokenizer(),
            ends=self.served.ends,
            observer=self.metrics,
            **more,
        )
        self.doorkeeper = Doorkeeper(head_seconds=head_seconds)
        self.api = Api(
            self.served,
            self.scheduler,
            self.metrics,
            fingerprint=model.fingerprint,
            limits=limits or Limits(new_tokens=64, prompt_tokens=64),
            keys=frozenset(keys),
            any_host=any_host,
            on_request=self.doorkeeper.welcome,
            on_stuck=self.doorkeeper.drop,
            log=self.log.append,
        )
        self._socket = listen("127.0.0.1", 0)
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._server = build_server(
            self.api, host="127.0.0.1", port=self.port, doorkeeper=self.doorkeeper
        )
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._server.serve([self._socket]))
        )

    def start(self):
        self.scheduler.start()
        self._thread.start()
        wait_until(lambda: self._server.started, what="the server's start")

    def close(self):
        if isinstance(self.batch, HeldBatch):
            self.batch.free()
        self._server.should_exit = True
        self._thread.join()
        self.api.close()
        self.scheduler.stop()

    def client(self, **headers):
        return httpx.Client(base_url=self.url, headers=headers, timeout=30, trust_env=False)

    def ask(self, path="/v1/completions", **body):
        with self.client() as client:
            # A seed, so that no text ends by chance sooner than another time.
            return client.post(path, json={"model": "fused", "seed": 1, **body})

    @property
    def running(self):
        return self.read_metric("molora_api_running")

    def read_metric(self, name):
        lines = self.metrics.as_text().decode().splitlines()
        (found,) = [line for line in lines if line.startswith(f"{name} ")]
        return float(found.rpartition(" ")[2])


@contextmanager
def serving(model, *, held=False, **settings):
    """A running API."""
    running = RunningApi(model, (HeldBatch if held else RunningBatch)(model), **settings)
    running.start()
    try:
        yield running
    finally:
        running.close()
