"""Real processes: a server under a hostile node, beside a contributor that is good."""

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from hostile import build_charter
from process_helpers import find_processes, wait_until

from molora_fed.charter import write_charter
from molora_fed.federation import contributor as joining
from molora_fed.federation.contributor import join
from molora_fed.federation.homes import ContributorHome, CoordinatorHome
from molora_fed.federation.join_settings import JoinSettings
from molora_fed.federation.messages import describe_folder
from molora_fed.federation.supervise import build_flower_environment
from molora_fed.federation.worker_mail import (
    offer_contribution,
)
from molora_fed.serving.addresses import find_free_port, is_healthy
from molora_fed.storage.keys import build_public_pem, key_fingerprint, load_or_make_key

HERE = Path(__file__).parent
FEDERATION = HERE.parent / "federation"

pytestmark = pytest.mark.processes


@pytest.fixture
def root(tmp_path):
    """A folder; whatever still works in it when the test ends is killed."""
    yield tmp_path
    for process in find_processes(tmp_path):
        with contextlib.suppress(psutil.Error):
            process.kill()


class Server:
    """`molora serve` in a process of its own."""

    def __init__(self, root):
        self.home, self.port = CoordinatorHome(root / "server"), find_free_port()
        self.home.base.mkdir(parents=True)
        (self.home.base / "model.safetensors").write_bytes(os.urandom(1_000))
        write_charter(build_charter(expected=1), self.home.charter)
        self.process = None

    def start(self):
        own = {"MOLORA_HOLD_SECONDS": "1", "MOLORA_MESSAGE_BYTES": "4000000"}
        env = {**os.environ, "PYTHONPATH": str(HERE), **own}
        with (self.home.root / "serve.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "serve_quoting", str(self.home.root), str(self.port)],
                env=env, stdout=log, stderr=log,
            )  # fmt: skip
        wait_until(lambda: is_healthy("127.0.0.1", self.port), what="the server")

    def end(self):
        self.process.terminate()
        return self.process.wait(timeout=60)


class HostileNode:
    """A node that answers every other message with something else."""

    def __init__(self, root, port):
        self.home, self.port = ContributorHome(root / "hostile"), port
        key = load_or_make_key(self.home.key)
        load_or_make_key(self.home.node_key)
        self.fingerprint = key_fingerprint(build_public_pem(key))
        JoinSettings("hostile", "python").save(self.home.settings_file)
        self.home.contribution.mkdir()
        (self.home.contribution / "adapter.bin").write_bytes(b"adapter")
        offer_contribution(self.home)

    def start(self):
        env = build_flower_environment(self.home.root, MOLORA_TEST_HOSTILE="1")
        env["PYTHONPATH"] = str(HERE / "hostile_site")
        command = [
            sys.executable, "-P", "-m", "molora_fed.federation.flower.node", str(self.home.root),
            f"127.0.0.1:{self.port}", str(self.home.node_key),
        ]  # fmt: skip
        with (self.home.root / "node.log").open("ab") as log:
            return subprocess.Popen(command, env=env, stdout=log, stderr=log)


def test_a_good_contributor_is_admitted_beside_a_hostile_node(root, monkeypatch):
    server = Server(root)
    server.start()
    hostile = HostileNode(root, server.port)
    mailbox = server.home.contributor(hostile.fingerprint)
    node = hostile.start()
    # It is let in, its upload is refused with a megabyte quoted, and its nonsense is skipped.
    wait_until(mailbox.list_acknowledgements, seconds=120, what="the refusal of its upload")
    wait_until(mailbox.fault_file.exists, seconds=60, what="a skipped message")
    assert server.process.poll() is None
    node.terminate()
    node.wait(timeout=60)
    mailbox.state_file.write_text('{"phase": "TRAINING", "loss": 1' + "0" * 400 + "}")
    assert server.end() == 130

    server.start()
    node = hostile.start()
    monkeypatch.setattr(joining, "WORKER_MODULE", "fake_worker")
    monkeypatch.setenv("PYTHONPATH", str(FEDERATION))
    stop = threading.Event()
    timer = threading.Timer(150, stop.set)
    timer.start()
    try:
        answer = join(
            f"127.0.0.1:{server.port}", JoinSettings("alpha", "python"), root / "alpha",
            consent=lambda charter: True, wait_seconds=60.0, stop=stop,
        )  # fmt: skip
    finally:
        timer.cancel()
    assert answer.get("state") == "ADMITTED"
    sent = describe_folder(root / "alpha" / "contribution")
    assert describe_folder(root / "alpha" / "result" / "fused") == sent
    assert server.process.poll() is None
    node.terminate()
    node.wait(timeout=60)
    assert server.end() == 130
    log = (server.home.root / "serve.log").read_text()
    assert "\x1b" not in log and "Traceback" not in log
