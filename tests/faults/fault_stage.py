"""Homes of a tiny cooperative and its members, made once and copied for every run of the faults."""

import json
import random
import shutil
import signal
import subprocess
from pathlib import Path

from process_helpers import wait_until

from molora_fed.charter import (
    Amendment,
    CorpusRules,
    FusionRules,
    PrivacyRules,
    SampleRules,
    TrainingRules,
)
from molora_fed.cooperative.cooperative import create_cooperative
from molora_fed.federation.acceptance import accept_invitation
from molora_fed.federation.homes import ContributorHome, CoordinatorHome
from molora_fed.federation.invitations import make_invitation
from molora_fed.models.base import load_base
from molora_fed.serving.addresses import find_free_port, is_healthy
from molora_fed.storage.files import hash_file
from molora_fed.testing.models import build_tiny_checkpoint

from commands import build_environment, list_serve_arguments  # isort: skip

__all__ = ["MEMBERS", "SERVER", "Stage", "hash_files"]

SERVER = "server"
MEMBERS = {"alpha": ("ka", "lo", "mi", "nu"), "beta": ("zz", "xx", "yy", "ww")}
"""Name and domain of each member, and the words its texts are made of."""
TRAINING = TrainingRules(
    kind="lora", rank=64, steps=60, batch=4, validate_every=20, patience=10, learning_rate=1e-2
)


def hash_files(folder):
    """The bytes of every file in a folder, as hashes by name."""
    return {
        str(path.relative_to(folder)): hash_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Stage:
    """A folder with homes that have met nobody yet, and what an undisturbed run made of copies.

    Args:
        root: Where it is, or will be, made.
    """

    def __init__(self, root):
        self.root = root
        self.homes = root / "homes"
        self.texts = root / "texts"
        self._reference = root / "reference.json"

    @property
    def is_prepared(self):
        return self._reference.exists()

    @property
    def fused(self):
        """Hashes of the undisturbed run's fused model, router included, by file."""
        return json.loads(self._reference.read_bytes())["fused"] if self.is_prepared else {}

    @property
    def seconds(self):
        """How long the undisturbed run took."""
        return json.loads(self._reference.read_bytes())["seconds"]

    def note_reference(self, fused, seconds):
        """Keep what an undisturbed run made; every other run has to make the same."""
        text = json.dumps({"fused": fused, "seconds": seconds}, indent=1)
        self._reference.write_text(text, encoding="utf-8")

    def make_homes(self):
        """Create the cooperative, invite the members and let them accept."""
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir(parents=True)
        base = load_base(build_tiny_checkpoint(self.root / "base", "gpt_neox", 0))
        amendment = Amendment(
            domains=tuple(MEMBERS),
            expected=len(MEMBERS),
            training=TRAINING,
            samples=SampleRules(calibration=8, admission=4, held_out=8),
            fusion=FusionRules(compare=()),
        )
        create_cooperative(
            self.homes / SERVER, "faults", base, corpus=CorpusRules(block_size=32),
            amendment=amendment, privacy=PrivacyRules(mode="pooled"),
        )  # fmt: skip
        for name, words in MEMBERS.items():
            _write_texts(self.texts / name, name, words)
        self._invite()

    def _invite(self):
        home, port = CoordinatorHome(self.homes / SERVER), find_free_port()
        with (self.root / "invite.log").open("wb") as log:
            serving = subprocess.Popen(
                list_serve_arguments(home.root, port), env=build_environment(), stdout=log,
                stderr=log,
            )  # fmt: skip
        try:
            authority = home.root / "tls" / "authority.pem"
            wait_until(
                lambda: authority.exists() and is_healthy("127.0.0.1", port, authority),
                seconds=180, what="the server",
            )  # fmt: skip
            wait_until((home.outbox / "charter.json").exists, seconds=180, what="the charter")
            for name in MEMBERS:
                invitation = make_invitation(home, name, name, days=7.0, server=f"127.0.0.1:{port}")
                accept_invitation(invitation, ContributorHome(self.homes / name))
        finally:
            serving.send_signal(signal.SIGTERM)
            serving.wait(timeout=120)
        for name in ("logs", "mail"):  # nobody has met this server
            shutil.rmtree(home.root / name)

    def copy_home(self, name, target, *, server=""):
        """Copy a home to where a run wants it; a member's leads to another address there."""
        shutil.copytree(self.homes / name, target, dirs_exist_ok=True)
        target.chmod(0o700)
        if name != SERVER:
            connection = target / "connection.json"
            kept = json.loads(connection.read_bytes())
            connection.write_text(json.dumps({**kept, "server": server}), encoding="utf-8")


def _write_texts(folder: Path, domain: str, words: tuple[str, ...]) -> None:
    """Documents in which one of a few words follows another at random."""
    draw = random.Random(domain)
    folder.mkdir(parents=True)
    for number in range(60):
        text = " ".join(draw.choice(words) + str(draw.randrange(10)) for _ in range(150))
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
