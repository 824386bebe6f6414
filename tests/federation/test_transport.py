"""Real Flower processes with stand-in workers: servers killed, disks full, nothing left behind."""

import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from process_helpers import find_processes, wait_until

from molora_fed.charter import Amendment, BaseIdentity, Charter, Identity, write_charter
from molora_fed.federation.contributor import join
from molora_fed.federation.homes import CoordinatorHome
from molora_fed.federation.join_settings import JoinSettings
from molora_fed.federation.messages import describe_folder
from molora_fed.federation.supervise import parse_answer
from molora_fed.serving.addresses import find_free_port

HERE = Path(__file__).parent

pytestmark = pytest.mark.processes

MESSAGE_BYTES = 800_000


class Server:
    """`molora serve` in a process of its own."""

    def __init__(self, root):
        self.home = CoordinatorHome(root / "server")
        self.port = find_free_port()
        self.home.base.mkdir(parents=True)
        (self.home.base / "model.safetensors").write_bytes(os.urandom(1_000))
        base = BaseIdentity(id="tiny", weights="0" * 64, tokenizer="1" * 64)
        charter = Charter(
            identity=Identity(name="test", base=base), amendment=Amendment(expected=1)
        )
        write_charter(charter, self.home.charter)
        self.process = None

    def start(self):
        env = {
            **os.environ,
            "PYTHONPATH": str(HERE),
            "MOLORA_MESSAGE_BYTES": str(MESSAGE_BYTES),
        }
        with (self.home.root / "serve.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "serve_stand_in", str(self.home.root), str(self.port)],
                env=env, stdout=log, stderr=log,
            )  # fmt: skip

    def log(self):
        return (self.home.root / "serve.log").read_text()

    def carrier(self):
        """Process of the ServerApp that carries mail now, or None."""
        pulse = parse_answer(self.home.pulse.read())
        try:
            process = psutil.Process(pulse["pid"]) if pulse else None
            is_running = process and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return None
        return process if is_running else None

    def num_parts(self):
        return sum(len(mailbox.parts.held()) for mailbox in self.home.contributors())


def limit_files(process, num_bytes):
    """Let a running process write no file beyond so many bytes, as a full disk would."""
    _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (num_bytes, hard))


def test_an_upload_survives_a_killed_server_and_a_full_disk(stage_root, stand_ins):
    server = Server(stage_root)
    server.start()
    events, answers = [], []
    stop = threading.Event()
    arguments = dict(consent=lambda charter: True, wait_seconds=60.0, stop=stop)
    contributor = threading.Thread(
        target=lambda: answers.append(
            join(
                f"127.0.0.1:{server.port}", JoinSettings("alpha", "python"), stage_root / "alpha",
                events.append, **arguments,
            )
        )
    )  # fmt: skip
    contributor.start()
    try:
        # Killed in mid-upload: SIGKILL, so that it can clean up nothing.
        wait_until(lambda: 0 < server.num_parts() < 3, what="the first part")
        server.process.kill()
        server.process.wait()
        held = server.num_parts()
        assert 0 < held < 3
        wait_until(
            lambda: not [p for p in find_processes(server.home.root) if p.is_running()],
            seconds=20, what="the end of the server's processes",
        )  # fmt: skip
        wait_until(lambda: any("not answer" in e.message for e in events), what="the notice")

        # Started again, on a disk with no space for a part: one line, and it goes on after.
        server.start()
        carrier = wait_until(server.carrier, what="mail")
        limit_files(carrier, 100_000)
        wait_until(lambda: "File too large" in server.home.board.read(), what="the full disk")
        message = server.home.board.read()
        assert "Free some space" in message and "\n" not in message
        assert server.num_parts() == held
        wait_until(lambda: "problem=True" in server.log(), what="the event")
        limit_files(carrier, resource.RLIM_INFINITY)
        contributor.join(timeout=90)
        assert not contributor.is_alive()
    finally:
        stop.set()
        contributor.join(timeout=30)
        if sys.exc_info()[0] is not None:
            server.process.terminate()
            server.process.wait()
    assert answers[0]["state"] == "ADMITTED"
    sent = describe_folder(stage_root / "alpha" / "contribution")
    assert describe_folder(server.home.root / "received" / "alpha") == sent
    assert describe_folder(stage_root / "alpha" / "result" / "alpha") == sent
    assert "the disk takes data again" in server.log()
    assert events[-1].phase == "STOPPED"
    assert find_processes(stage_root / "alpha") == []

    # Told to end, as by Ctrl-C.
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(timeout=30) == 130
    assert find_processes(server.home.root) == []
