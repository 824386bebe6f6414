"""The commands of docs/contributor_tutorial.md, in their order, against a real server."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from host_helpers import MOLORA
from process_helpers import find_processes, wait_until

from molora_fed.serving.addresses import find_free_port

pytestmark = pytest.mark.processes

PAGE = Path(__file__).parents[2] / "docs" / "contributor_tutorial.md"
COMMANDS = re.findall(r"^\$ (.+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
ALICE = "Dear reader, letter {} tells of the sea, the harbour and a boat that came home.\n"
BOB = "Take {} eggs, two spoons of flour, some milk and butter, and stir them in a bowl.\n"


def run(command, folder):
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=300, check=False,
        shell=isinstance(command, str),
        env={
            **os.environ, "PATH": f"{MOLORA.parent}:{os.environ['PATH']}",
            "MOLORA_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1",
        },
    )  # fmt: skip
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def write_text(folder, sentence):
    folder.mkdir(parents=True)
    for number in range(60):
        text = "".join(sentence.format(100 * number + line) for line in range(30))
        (folder / f"{number}.txt").write_text(text)


def start(folder, log, *words):
    with log.open("ab") as file:
        env = {**os.environ, "MOLORA_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([MOLORA, *words], cwd=folder, stdout=file, stderr=file, env=env)


def test_the_tutorials_commands_run_in_their_order(tmp_path, tiny_checkpoint):
    office, port = tmp_path / "office", str(find_free_port())
    office.mkdir()
    run(
        [MOLORA, "coop", "create", "letters", "--base", tiny_checkpoint(), "--privacy", "pooled",
         "--steps", "4", "--rank", "4", "--block-size", "32", "--expected", "2"],
        office,
    )  # fmt: skip
    samples = [f"samples.{name}=4" for name in ("calibration", "admission", "held_out")]
    settings = [word for sample in samples for word in ("--set", sample)]
    # Four steps from random weights may end above the base.
    settings += ["--set", "admission.max_loss_rise=1"]
    run([MOLORA, "coop", "amend", "letters", *settings], office)
    serving = start(office, tmp_path / "serve.log", "serve", "letters", "--port", port)
    others = []
    try:
        wait_until((office / "letters" / "tls").is_dir, what="the server's certificate")
        where = ["--address", f"127.0.0.1:{port}"]
        for name, domain, sentence in (("alice", "letters", ALICE), ("bob", "recipes", BOB)):
            write_text(tmp_path / name / "notes", sentence)
            line = run(
                [MOLORA, "coop", "invite", "letters", "--name", name, "--domain", domain, *where],
                office,
            )
            (tmp_path / name / "invitation.txt").write_text(line)
        bob = tmp_path / "bob"
        joining = ("join", "invitation.txt", "--data", "notes", "--home", "home", "--yes")
        others.append(start(bob, tmp_path / "bob.log", *joining))
        said = {command: run(command, tmp_path / "alice") for command in COMMANDS}
        assert others[0].wait(timeout=120) == 0
    finally:
        for process in (serving, *others):
            if process.poll() is None:
                process.terminate()
                process.wait(timeout=60)
    wait_until(lambda: not find_processes(tmp_path), seconds=30, what="the end of all processes")
    check, dry, join, status, generate = COMMANDS
    assert "60" in said[check] and "adapter" in said[dry]
    assert "ADMITTED" in said[join] and said[status].strip() and said[generate].strip()
