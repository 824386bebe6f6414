"""Two hosts on one machine: a network namespace and a user each, and nothing but an invitation."""

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from host_helpers import MOLORA, can_make_hosts, linked_hosts
from process_helpers import wait_until

from molora_fed.testing.models import build_tiny_checkpoint

PORT, METRICS = "8080", "9464"
ASK_HEALTH = f"""
import urllib.request
print(urllib.request.urlopen("http://127.0.0.1:{METRICS}/healthz").read().decode())
"""

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(
        not can_make_hosts(), reason="needs root, to make namespaces and be other users"
    ),
]


@pytest.fixture
def hosts():
    """Two linked hosts, server's and contributor's."""
    with linked_hosts("server", "member") as pair:
        yield pair


def write_texts(folder: Path) -> Path:
    chance = random.Random(7)
    words = ["clause", "party", "court", "shall", "agree", "contract", "law", "term", "notice"]
    folder.mkdir()
    for number in range(60):
        text = " ".join(chance.choice(words) + str(chance.randrange(99)) for _ in range(120))
        (folder / f"{number}.txt").write_text(text)
    return folder


def test_a_member_on_another_host_is_admitted_by_two_commands(hosts):
    server, member = hosts
    base = server.own(build_tiny_checkpoint(server.home / "base", "gpt_neox", 0))
    server.run(
        MOLORA, "coop", "create", "two", "--folder", "coop", "--base", base, "--domains", "legal",
        "--block-size", "32", "--steps", "20", "--kind", "lora", "--rank", "2", "--expected", "1",
        "--privacy", "pooled",
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
    texts = member.own(write_texts(member.home / "texts"))

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
