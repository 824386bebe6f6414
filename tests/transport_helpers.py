"""A server of stand-in workers in processes of its own, and what an attacker asks of its port."""

import asyncio
import contextlib
import os
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import psutil
from process_helpers import find_processes, wait_until

from molora_fed.charter import Amendment, BaseIdentity, Charter, Identity, write_charter
from molora_fed.errors import FederationError
from molora_fed.federation import contributor as joining
from molora_fed.federation.acceptance import read_connection
from molora_fed.federation.homes import CoordinatorHome
from molora_fed.federation.join_settings import JoinSettings
from molora_fed.serving.addresses import find_free_port
from molora_fed.serving.connections import build_server, run_server

FEDERATION_TESTS = Path(__file__).parent / "federation"

__all__ = [
    "CLOSED_PATHS",
    "Detour",
    "Joining",
    "StandInServer",
    "find_processes",
    "make_cooperative",
    "serving",
    "wait_until",
]

CLOSED_PATHS = (
    ("POST", "/v1/control/start-run"),
    ("POST", "/v1/control/list-runs"),
    ("POST", "/v1/control/register-node"),
    ("POST", "/v1/runtime/acquire-task"),
    ("POST", "/v1/runtime/pull-task-input"),
    ("POST", "/v1/fleet/register-node"),
    ("POST", "/v1/fleet/get-fab"),
    ("POST", "/v1/responses"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
    ("GET", "/redoc"),
    ("GET", "/"),
)
"""What Flower serves on the same port and nobody needs from outside."""


def make_cooperative(root):
    """A coordinator's home without a real base."""
    home = CoordinatorHome(root)
    home.base.mkdir(parents=True)
    (home.base / "model.safetensors").write_bytes(os.urandom(1_000))
    base = BaseIdentity(id="tiny", weights="0" * 64, tokenizer="1" * 64)
    charter = Charter(identity=Identity(name="test", base=base), amendment=Amendment(expected=1))
    write_charter(charter, home.charter)
    return home


@contextlib.contextmanager
def serving(app, doorkeeper, certificate=None):
    """The port of an ASGI application that a thread of this process serves."""
    port = find_free_port()
    server = build_server(
        app, host="127.0.0.1", port=port, doorkeeper=doorkeeper, certificate=certificate
    )
    thread = threading.Thread(target=run_server, args=(server,))
    thread.start()
    try:
        wait_until(lambda: server.started, what="the server")
        yield port
    finally:
        server.should_exit = True
        thread.join(timeout=20)


class Joining:
    """`molora join` with a stand-in worker, in a thread."""

    def __init__(self, home, name, domain="python", server=""):
        self.home = home
        self.stop = threading.Event()
        self.events, self.answers, self.errors = [], [], []
        connection = read_connection(home)
        self.thread = threading.Thread(
            target=self._run, args=(server or connection.server, name, domain)
        )
        self.thread.start()

    def _run(self, server, name, domain):
        try:
            self.answers.append(
                joining.join(
                    server, JoinSettings(name, domain), self.home.root,
                    self.events.append, consent=lambda charter: True,
                    authority=self.home.authority_file, wait_seconds=60.0, stop=self.stop,
                )
            )  # fmt: skip
        except FederationError as error:
            self.errors.append(error)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.stop.set()
        self.thread.join(timeout=60)


class Detour:
    """Passes connections on to a port of this machine, which sees them come from an address."""

    def __init__(self, port, address):
        self._port, self._address = port, address
        self.port = find_free_port()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self):
        self._thread.start()
        start = asyncio.start_server(self._pass, "127.0.0.1", self.port)
        asyncio.run_coroutine_threadsafe(start, self._loop).result(20)
        return self

    def __exit__(self, *exception):
        async def end():
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _pass(self, reader, writer):
        to = await asyncio.open_connection("127.0.0.1", self._port, local_addr=(self._address, 0))
        await asyncio.gather(_pump(reader, to[1]), _pump(to[0], writer))


async def _pump(reader, writer):
    with contextlib.suppress(OSError):
        while piece := await reader.read(2**16):
            writer.write(piece)
            await writer.drain()
    writer.close()


class StandInServer:
    """`molora serve` with a stand-in worker, in a process of its own; plain, or for members."""

    def __init__(self, root, *mode):
        self.home = make_cooperative(root)
        self.port = find_free_port()
        self.mode = mode
        self.process = None

    @property
    def url(self):
        return f"http{'s' if self.mode else ''}://127.0.0.1:{self.port}"

    def __enter__(self):
        env = {**os.environ, "PYTHONPATH": str(FEDERATION_TESTS)}
        with (self.home.root / "serve.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "serve_stand_in", str(self.home.root), str(self.port),
                    *self.mode,
                ],
                env=env, stdout=log, stderr=log,
            )  # fmt: skip
        wait_until(self.home.pulse.read, what="mail")
        return self

    def __exit__(self, *exception):
        self.process.terminate()
        self.process.wait()

    def ask(self, method, path, **options):
        """The status of a request to its port."""
        options = {"content": b"", "headers": {"content-type": "application/x-protobuf"}, **options}
        verify = False
        if self.mode:
            verify = ssl.create_default_context(cafile=str(self.home.root / "tls/authority.pem"))
        url = self.url + path
        return httpx.request(method, url, timeout=5.0, verify=verify, **options).status_code

    def processes(self):
        """The processes it started, by the module they run."""
        found = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            words = process.cmdline()
            if "-m" in words:
                found[words[words.index("-m") + 1].rpartition(".")[2]] = process
        return found
