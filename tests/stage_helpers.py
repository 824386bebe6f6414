"""A federation without processes: a coordinator in a thread, contributors advanced in turn.

Letters are carried by hand, so that a test may lose them, stop somebody, or look into a home.
"""

import random
import threading
import time

from molora_fed.charter import CorpusRules, TrainingRules
from molora_fed.cooperative.cooperative import create_cooperative
from molora_fed.errors import AdmissionError
from molora_fed.federation.client_dialogue import answer
from molora_fed.federation.consent import (
    give_consent,
)
from molora_fed.federation.coordinator import CoordinatorWorker
from molora_fed.federation.coordinator_mail import publish_charter
from molora_fed.federation.homes import ContributorHome, CoordinatorHome
from molora_fed.federation.join_settings import JoinSettings, prepare_home
from molora_fed.federation.server_dialogue import RemoteContributor, ServerDialogue
from molora_fed.federation.worker import ContributorWorker
from molora_fed.models.base import load_base
from molora_fed.plugins import load_plugins
from molora_fed.storage.keys import load_or_make_key

MESSAGE_BYTES = 2**24
PLUGINS = load_plugins()
TRAINING = TrainingRules(
    kind="lora", rank=2, steps=20, batch=4, validate_every=10, learning_rate=1e-2
)


def write_text(folder, who, count=240):
    draw = random.Random(who)
    letters = draw.sample("abcdefghijklmnopqrstuvwxyz", 4)
    folder.mkdir(parents=True)
    for number in range(count):
        words = (draw.choice(letters) * 2 + str(draw.randrange(10)) for _ in range(12))
        (folder / f"{number}.txt").write_text(" ".join(words))


class Stage:
    """A coordinator in a thread, contributors advanced in turn, letters carried by hand."""

    def __init__(self, root, checkpoint, amendment, *, block_size=16, **settings):
        self.root = root
        self.away, self.refused = set(), {}
        self.cooperative = create_cooperative(
            root / "server", "test", load_base(checkpoint), amendment=amendment,
            corpus=CorpusRules(block_size=block_size), **settings,
        )  # fmt: skip
        self.server = CoordinatorHome(root / "server")
        self.dialogue = ServerDialogue(self.server, message_bytes=MESSAGE_BYTES, wait_seconds=0)
        key = load_or_make_key(self.cooperative.key_path)
        publish_charter(self.server, self.cooperative.charter, key, part_bytes=MESSAGE_BYTES)

    @property
    def is_growing(self):
        return self.server.read_state().get("phase") == "GROWING"

    def make(self, who):
        """A home as `molora join` prepares it, each time anew; "alpha-b" has the domain "alpha"."""
        home, text = ContributorHome(self.root / who), self.root / "text" / who
        domain = who.partition("-")[0]
        if not text.exists():
            write_text(text, who)
        prepare_home(home, JoinSettings(who if "-" in who else f"{who}-1", domain, (text,)))
        return home

    def carry(self, home, line):
        """Whatever the server has to say to one contributor, and its reply."""
        envelope = self.dialogue.next_envelope(line)
        if envelope is not None:
            self.dialogue.accept(line, answer(home, envelope))
        if (home.charter / "cooperative.toml").exists():
            give_consent(home, self.cooperative.charter)

    def advance(self, who, steps):
        """One step of somebody's worker; whether it has ended, with the result or refused."""
        try:
            return next(steps, self) is self
        except AdmissionError as error:
            self.refused[who] = str(error)
            self.away.add(who)
            return True

    def run(self, *domains, meddle=lambda stage, who: True, watch=lambda homes, steps: None):
        """Join, and go on until everybody has the result.

        Args:
            domains: Who joins, see `make`.
            meddle: Told the stage and somebody whose turn it is; whether that turn takes place.
            watch: Told all homes, and the workers that still run, whenever all had their turn.
        """
        homes = {domain: self.make(domain) for domain in domains}
        steps = {d: ContributorWorker(home, PLUGINS).steps() for d, home in homes.items()}
        lines = {domain: RemoteContributor() for domain in domains}
        ended, failures = threading.Event(), []

        def coordinate():
            with self.cooperative.open_ledger() as ledger:
                worker = CoordinatorWorker(self.server, self.cooperative, ledger, PLUGINS)
                try:
                    while not ended.wait(0.02):
                        worker.look()
                except BaseException as error:
                    failures.append(error)

        thread = threading.Thread(target=coordinate, daemon=True)
        thread.start()
        try:
            deadline = time.monotonic() + 480
            while not failures and time.monotonic() < deadline:
                if not (steps.keys() - self.away or self.is_growing):
                    break
                for domain, home in homes.items():
                    if not meddle(self, domain):
                        continue
                    self.carry(home, lines[domain])
                    if domain in steps and self.advance(domain, steps[domain]):
                        del steps[domain]
                    elif domain not in steps and self.is_growing:
                        # Whoever has the old model joins again: the server says it waits.
                        steps[domain] = ContributorWorker(self.make(domain), PLUGINS).steps()
                        lines[domain] = RemoteContributor()
                watch(homes, steps)
        finally:
            ended.set()
            thread.join(timeout=30)
        if failures:
            raise failures[0]
        left = steps.keys() - self.away
        assert not left, f"still at work: {', '.join(left)}"
