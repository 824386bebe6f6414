"""A federation without processes: a coordinator in a thread, contributors advanced in turn.

Letters are carried by hand, so that a test may lose them, stop somebody, or look into a home.
"""

import random
import shutil
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
from molora_fed.federation.envelopes import keep_letter
from molora_fed.federation.homes import ContributorHome, CoordinatorHome
from molora_fed.federation.join_settings import JoinSettings, prepare_home
from molora_fed.federation.letters import QuestionLetter
from molora_fed.federation.messages import describe_folder
from molora_fed.federation.server_dialogue import RemoteContributor, ServerDialogue
from molora_fed.federation.signing import build_question_bytes
from molora_fed.federation.sum_letters import write_tensors
from molora_fed.federation.worker import ContributorWorker
from molora_fed.models.base import load_base
from molora_fed.plugins import load_plugins
from molora_fed.storage.files import write_json
from molora_fed.storage.keys import load_key, load_or_make_key, sign

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


def write_shared(root, names):
    """Texts of 240 documents; the second's are half the first's, in another split of its own."""
    texts = {
        name: [write_document(f"{name} {number}", name) for number in range(240)] for name in names
    }
    texts[names[1]][120:] = texts[names[0]][:120]
    for name, documents in texts.items():
        folder = root / "text" / name
        folder.mkdir(parents=True)
        for number, text in enumerate(documents):
            (folder / f"{number}.txt").write_text(text)


def write_document(seed, name):
    draw, letters = random.Random(seed), name[0]
    return " ".join(f"{letters}{draw.randrange(10)}{draw.randrange(10)}" for _ in range(14))


def plant(stage, home, content, state=None, *, key=None, amendment=0):
    """A question in a contributor's mailbox, as its coordinator signs it; its id."""
    draft = home.root / "draft"
    draft.mkdir()
    write_json(draft / "question.json", content)
    if state is not None:
        write_tensors(draft / "state.safetensors", state)
    files = describe_folder(draft)
    folder = home.question_folder(files.id)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft.rename(folder)
    home.shipments.mkdir(parents=True, exist_ok=True)
    (home.shipments / files.id).write_text(folder.name)
    signed = build_question_bytes(stage.cooperative.charter.identity_hash, amendment, files.id)
    keep_letter(
        home.question_letter,
        QuestionLetter(
            id=files.id, files=files, part_bytes=2**20, answer_bytes=2**20, amendment=amendment,
            signature=sign(key or load_key(stage.server.key), signed),
        ),
    )  # fmt: skip
    return files.id


class Stage:
    """A coordinator in a thread, contributors advanced in turn, letters carried by hand."""

    def __init__(self, root, checkpoint, amendment, *, block_size=16, plugins=PLUGINS, **settings):
        self.root, self.plugins = root, plugins
        self.away, self.refused = set(), {}
        self.cooperative = create_cooperative(
            root / "server", "test", load_base(checkpoint), amendment=amendment,
            corpus=CorpusRules(block_size=block_size), plugins=plugins, **settings,
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
        steps = {d: ContributorWorker(home, self.plugins).steps() for d, home in homes.items()}
        lines = {domain: RemoteContributor() for domain in domains}
        ended, failures = threading.Event(), []

        def coordinate():
            with self.cooperative.open_ledger() as ledger:
                worker = CoordinatorWorker(self.server, self.cooperative, ledger, self.plugins)
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
                        steps[domain] = ContributorWorker(self.make(domain), self.plugins).steps()
                        lines[domain] = RemoteContributor()
                watch(homes, steps)
        finally:
            ended.set()
            thread.join(timeout=30)
        if failures:
            raise failures[0]
        left = steps.keys() - self.away
        assert not left, f"still at work: {', '.join(left)}"
