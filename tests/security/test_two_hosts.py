"""Two hosts on one machine: a network namespace and a user each, and nothing but an invitation."""

import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
from process_helpers import wait_until

from molora_fed.testing.models import build_tiny_checkpoint

MOLORA = Path(sys.executable).parent / "molora"
PORT, METRICS = "8080", "9464"
ASK_HEALTH = f"""
import urllib.request
print(urllib.request.urlopen("http://127.0.0.1:{METRICS}/healthz").read().decode())
"""
# Under the only folder that keeps others out lies the interpreter; a namespace may see it alone.
REMAP = (
    'mount --bind "$0" /mnt && mount -t tmpfs -o mode=755 none "$1" && mkdir -p "$0" '
    '&& mount --move /mnt "$0" && shift && exec "$@"'
)

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("setpriv") is None,
        reason="needs root, to make namespaces and be other users",
    ),
]


def find_closed(path: Path) -> Path | None:
    """The outermost folder above a path that other users cannot enter."""
    return next((p for p in reversed(path.parents) if not p.stat().st_mode & 0o001), None)


class Host:
    """A namespace with one address, and a user whose home is there."""

    def __init__(self, root: Path, name: str, address: str, uid: int) -> None:
        self.name, self.address, self.uid = f"molora-{os.getpid()}-{name}", address, uid
        self.home = root / name
        self.home.mkdir(mode=0o700)
        os.chown(self.home, uid, uid)

    def wrap(self, *command: object) -> list[str]:
        become = [
            "ip", "netns", "exec", self.name, "setpriv", f"--reuid={self.uid}",
            f"--regid={self.uid}", "--clear-groups", "env", f"HOME={self.home}",
            f"MOLORA_CACHE={self.home / 'cache'}", "OMP_NUM_THREADS=1", *map(str, command),
        ]  # fmt: skip
        prefix = Path(sys.base_prefix)
        if (closed := find_closed(prefix)) is None:
            return become
        return [*become[:4], "sh", "-c", REMAP, str(prefix), str(closed), *become[4:]]

    def run(self, *command: object) -> str:
        done = subprocess.run(
            self.wrap(*command), cwd=self.home, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def hosts(monkeypatch):
    """Two connected hosts, server's and contributor's; gone afterwards with all that runs there."""
    root = Path(tempfile.mkdtemp(prefix="molora-hosts-"))
    root.chmod(0o711)
    pair = [Host(root, "server", "10.77.0.1", 20_001), Host(root, "member", "10.77.0.2", 20_002)]
    try:
        for host in pair:
            subprocess.run(["ip", "netns", "add", host.name], check=True)
        server, member = (host.name for host in pair)
        link = ["ip", "link", "add", "m0", "netns", server, "type", "veth"]
        subprocess.run([*link, "peer", "name", "m0", "netns", member], check=True)
        for host in pair:
            subprocess.run(["ip", "-n", host.name, "link", "set", "lo", "up"], check=True)
            there = ["dev", "m0"]
            address = ["addr", "add", f"{host.address}/24", *there]
            subprocess.run(["ip", "-n", host.name, *address], check=True)
            subprocess.run(["ip", "-n", host.name, "link", "set", *there, "up"], check=True)
        yield pair
    finally:
        for process in psutil.process_iter(["uids"]):
            if process.info["uids"] and process.info["uids"].real in (20_001, 20_002):
                process.kill()
        for host in pair:
            subprocess.run(["ip", "netns", "delete", host.name], check=False)
        shutil.rmtree(root, ignore_errors=True)


def write_texts(folder: Path, uid: int) -> Path:
    chance = random.Random(7)
    words = ["clause", "party", "court", "shall", "agree", "contract", "law", "term", "notice"]
    folder.mkdir()
    for number in range(60):
        text = " ".join(chance.choice(words) + str(chance.randrange(99)) for _ in range(120))
        (folder / f"{number}.txt").write_text(text)
    for path in (folder, *folder.iterdir()):
        os.chown(path, uid, uid)
    return folder


def test_a_member_on_another_host_is_admitted_by_two_commands(hosts):
    server, member = hosts
    base = build_tiny_checkpoint(server.home / "base", "gpt_neox", 0)
    for path in (base, *base.iterdir()):
        os.chown(path, server.uid, server.uid)
    server.run(
        MOLORA, "coop", "create", "two", "--folder", "coop", "--base", base, "--domains", "legal",
        "--block-size", "32", "--steps", "20", "--kind", "lora", "--rank", "2", "--expected", "1",
    )  # fmt: skip
    settings = ["training.batch=2", "samples.calibration=8", "samples.admission=4"]
    settings += ["samples.held_out=8", "training.learning_rate=0.001"]
    server.run(MOLORA, "coop", "amend", "coop", *(x for s in settings for x in ("--set", s)))
    with (server.home / "serve.log").open("wb") as log:
        serving = subprocess.Popen(
            server.wrap(
                MOLORA, "serve", "coop", "--address", f"{server.address}:{PORT}",
                "--metrics-port", METRICS,
            ),
            cwd=server.home, stdout=log, stderr=log,
        )  # fmt: skip
    wait_until((server.home / "coop" / "address.json").exists, what="the address")
    texts = write_texts(member.home / "texts", member.uid)

    # From invitation to admitted upload: one command of the coordinator, one of the member.
    invitation = server.run(
        MOLORA, "coop", "invite", "coop", "--name", "alice", "--domain", "legal"
    )
    joined = member.run(MOLORA, "join", invitation.strip(), "--data", texts, "--yes")

    assert "ADMITTED" in joined and serving.poll() is None
    assert (member.home / "contributor-legal" / "result" / "fused" / "fused.json").is_file()
    # What either side sees of it, and that nothing is wrong with either.
    assert re.search(r"alice +legal +member .*ADMITTED", server.run(MOLORA, "status", "coop"))
    assert '"status": "ok"' in server.run(sys.executable, "-c", ASK_HEALTH)
    assert "ADMITTED" in member.run(MOLORA, "status", "contributor-legal")
    for host, folder in ((server, "coop"), (member, "contributor-legal")):
        assert "problem" not in host.run(MOLORA, "doctor", folder)
    for host, other in ((server, member), (member, server)):
        assert subprocess.run(host.wrap("ls", other.home), capture_output=True).returncode != 0
    serving.terminate()
    assert serving.wait(timeout=60) == 143
    assert invitation.strip() not in (server.home / "serve.log").read_text()
