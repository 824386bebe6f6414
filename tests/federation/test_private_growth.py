"""A private population grows: whoever was in joins again, nobody retrains."""

import random
import threading
import time

import pytest

from molora_fed.charter import (
    Amendment,
    CorpusRules,
    FusionRules,
    PopulationRules,
    SampleRules,
    TrainingRules,
)
from molora_fed.contributions.states import ContributionState
from molora_fed.cooperative.cooperative import create_cooperative
from molora_fed.cooperative.evolve import evolve_cooperative
from molora_fed.errors import ConfigError, PopulationError
from molora_fed.federation.client_dialogue import answer
from molora_fed.federation.coordinator import CoordinatorWorker
from molora_fed.federation.coordinator_mail import publish_charter
from molora_fed.federation.homes import ContributorHome, CoordinatorHome
from molora_fed.federation.join_settings import JoinSettings, prepare_home
from molora_fed.federation.mailbox import read_json
from molora_fed.federation.server_dialogue import RemoteContributor, ServerDialogue
from molora_fed.federation.worker import ContributorWorker
from molora_fed.federation.worker_mail import give_consent
from molora_fed.models.base import load_base
from molora_fed.plugins import load_plugins
from molora_fed.population.bundle import load_evolved
from molora_fed.storage.keys import load_or_make_key

MESSAGE_BYTES = 2**24
PLUGINS = load_plugins()
RULES = PopulationRules(
    data="private",
    rank=2,
    generations=1,
    start_steps=1,
    steps=1,
    blocks_per_domain=8,
    guard="spending",
)
TRAINING = TrainingRules(
    kind="lora", rank=2, steps=20, batch=4, validate_every=10, learning_rate=1e-2
)


def write_text(folder, domain, count=240):
    draw = random.Random(domain)
    letters = draw.sample("abcdefghijklmnopqrstuvwxyz", 4)
    folder.mkdir(parents=True)
    for number in range(count):
        words = (draw.choice(letters) * 2 + str(draw.randrange(10)) for _ in range(12))
        (folder / f"{number}.txt").write_text(" ".join(words))


class Stage:
    """A coordinator in a thread, contributors advanced in turn, letters carried by hand."""

    def __init__(self, root, checkpoint):
        self.root = root
        amendment = Amendment(
            expected=2, training=TRAINING, population=RULES,
            fusion=FusionRules(mode="population"),
            samples=SampleRules(calibration=300, admission=4, held_out=60),
        )  # fmt: skip
        self.cooperative = create_cooperative(
            root / "server", "test", load_base(checkpoint), corpus=CorpusRules(block_size=16),
            amendment=amendment,
        )  # fmt: skip
        self.server = CoordinatorHome(root / "server")
        self.dialogue = ServerDialogue(self.server, message_bytes=MESSAGE_BYTES, wait_seconds=0)
        key = load_or_make_key(self.cooperative.key_path)
        publish_charter(self.server, self.cooperative.charter, key, part_bytes=MESSAGE_BYTES)

    @property
    def is_growing(self):
        return self.server.read_state().get("phase") == "GROWING"

    def make(self, domain):
        """A home as `molora join` prepares it, each time anew."""
        home, text = ContributorHome(self.root / domain), self.root / "text" / domain
        if not text.exists():
            write_text(text, domain)
        prepare_home(home, JoinSettings(f"{domain}-1", domain, (text,)))
        return home

    def run(self, *domains):
        """Join, and go on until everybody has the result."""
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
            deadline = time.monotonic() + 240
            while (steps or self.is_growing) and not failures and time.monotonic() < deadline:
                for domain, home in homes.items():
                    envelope = self.dialogue.next_envelope(lines[domain])
                    if envelope is not None:
                        self.dialogue.accept(lines[domain], answer(home, envelope))
                    if (home.charter / "cooperative.toml").exists():
                        give_consent(home, self.cooperative.charter)
                    if domain in steps and next(steps[domain], self) is self:
                        del steps[domain]
                    elif domain not in steps and self.is_growing:
                        # Whoever has the old model joins again: the server says it waits.
                        steps[domain] = ContributorWorker(self.make(domain), PLUGINS).steps()
                        lines[domain] = RemoteContributor()
        finally:
            ended.set()
            thread.join(timeout=30)
        assert not failures and not steps


def test_a_private_population_grows(tmp_path, tiny_checkpoint):
    stage = Stage(tmp_path, tiny_checkpoint("gpt_neox"))
    stage.run("alpha", "beta")
    first = read_json(stage.server.outbox / "result.json")
    assert len(first["summary"]["contributions"]) == 2
    offers = [ContributorHome(tmp_path / d).offer_file.read_bytes() for d in ("alpha", "beta")]
    stage.run("alpha", "beta")  # joining again without news ends at once
    assert read_json(stage.server.outbox / "result.json")["id"] == first["id"]

    stage.run("alpha", "beta", "gamma")
    second = read_json(stage.server.outbox / "result.json")
    assert len(second["summary"]["contributions"]) == 3
    homes = {domain: ContributorHome(tmp_path / domain) for domain in ("alpha", "beta", "gamma")}
    assert [homes[d].offer_file.read_bytes() for d in ("alpha", "beta")] == offers
    for home in homes.values():
        model = load_evolved(home.result / "evolved")
        assert model.population.num_slots == 3
    with stage.cooperative.read_ledger() as ledger:
        assert len(ledger.contributions(ContributionState.ADMITTED)) == 3
    # On a folder there is nothing to evolve on.
    with pytest.raises(ConfigError, match="molora serve"):
        evolve_cooperative(stage.cooperative, plugins=PLUGINS)


def test_too_little_private_text_is_said_before_training(tmp_path, tiny_checkpoint):
    stage = Stage(tmp_path, tiny_checkpoint("gpt_neox"))
    write_text(tmp_path / "text" / "few", "few", count=12)
    home = ContributorHome(tmp_path / "few")
    load_or_make_key(home.key)
    JoinSettings("few-1", "few", (tmp_path / "text" / "few",)).save(home.settings_file)
    steps, line = ContributorWorker(home, PLUGINS).steps(), RemoteContributor()
    with pytest.raises(PopulationError, match="document clusters") as caught:
        for _ in range(50):
            envelope = stage.dialogue.next_envelope(line)
            if envelope is not None:
                stage.dialogue.accept(line, answer(home, envelope))
            next(steps)
    assert "\n" not in str(caught.value) and not list(home.training.glob("*"))
