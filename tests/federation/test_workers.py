"""Both workers at their real work, letters carried by hand instead of Flower."""

import functools
import json
import math
import random
import shutil
import threading

import pytest
import torch
from adapter_folders import edit, rename, train_with_peft
from safetensors.torch import load_file, save_file

from molora_fed.charter import Amendment, CorpusRules, PrivacyRules, SampleRules, TrainingRules
from molora_fed.contributions.manifest import load_contribution
from molora_fed.contributions.states import ContributionState, CooperativeState
from molora_fed.cooperative.contribute import sign_adapter
from molora_fed.cooperative.cooperative import create_cooperative
from molora_fed.cooperative.measured_adapter import MeasuredAdapter
from molora_fed.errors import AdmissionError, FederationError, IncompatibleAdapterError
from molora_fed.federation.client_dialogue import answer
from molora_fed.federation.consent import (
    give_consent,
)
from molora_fed.federation.coordinator import CoordinatorWorker
from molora_fed.federation.coordinator_mail import publish_charter
from molora_fed.federation.homes import ContributorHome, CoordinatorHome
from molora_fed.federation.join_settings import JoinSettings
from molora_fed.federation.mailbox import read_json
from molora_fed.federation.server_dialogue import RemoteContributor, ServerDialogue
from molora_fed.federation.worker import ContributorWorker
from molora_fed.models.base import load_base
from molora_fed.plugins import load_plugins
from molora_fed.storage.keys import load_or_make_key
from molora_fed.testing.models import build_tiny_model, build_tiny_tokenizer

MESSAGE_BYTES = 64 * 2**20
STEPS = 30
ONE_AT_A_TIME = threading.RLock()


@pytest.fixture(autouse=True)
def take_turns(monkeypatch):
    """Threads stand for processes here: torch's settings are global, so models work in turn."""

    def in_turn(method):
        @functools.wraps(method)
        def call(*arguments):
            with ONE_AT_A_TIME:
                return method(*arguments)

        return call

    for worker, names in (
        (ContributorWorker, ("_load_base", "_prepare_corpus", "_make_contribution")),
        (CoordinatorWorker, ("look",)),
    ):
        for name in names:
            monkeypatch.setattr(worker, name, in_turn(getattr(worker, name)))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Folders of text by domain."""
    root = tmp_path_factory.mktemp("texts")
    for domain in ("alpha", "beta", "gamma"):
        draw = random.Random(domain)
        letters = draw.sample("abcdefghijklmnopqrstuvwxyz", 4)
        (root / domain).mkdir()
        for number in range(60):
            words = (draw.choice(letters) * 2 + str(draw.randrange(10)) for _ in range(150))
            (root / domain / f"{number}.txt").write_text(" ".join(words))
    return root


class Stage:
    """A coordinator and any number of contributors, in one process."""

    def __init__(self, root, checkpoint, **amendment):
        self.root = root
        training = TrainingRules(
            kind="lora", rank=4, steps=STEPS, batch=4, validate_every=10, learning_rate=1e-2
        )
        samples = SampleRules(calibration=8, admission=4, held_out=8)
        self.cooperative = create_cooperative(
            root / "server", "test", load_base(checkpoint), corpus=CorpusRules(block_size=32),
            amendment=Amendment(training=training, samples=samples, **amendment),
            privacy=PrivacyRules(mode="pooled"),
        )  # fmt: skip
        self.server = CoordinatorHome(root / "server")
        self.dialogue = ServerDialogue(self.server, message_bytes=MESSAGE_BYTES, wait_seconds=0)
        self.plugins = load_plugins()
        self.consents = True
        self.members = {}
        self.failures = {}
        key = load_or_make_key(self.cooperative.key_path)
        publish_charter(self.server, self.cooperative.charter, key, part_bytes=MESSAGE_BYTES)

    def join(self, name, domain, texts, *, worker=ContributorWorker, **settings):
        home = ContributorHome(self.root / name)
        load_or_make_key(home.key)
        settings = JoinSettings(name, domain, (texts / domain,), **settings)
        settings.save(home.settings_file)
        work = worker(home, self.plugins)

        def run():
            try:
                work.run()
            except Exception as error:
                self.failures[name] = error

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self.members[name] = (home, thread, RemoteContributor())
        return home

    def _agree(self):
        """Consent for every contributor whose charter has arrived."""
        for home, _, _ in self.members.values():
            if self.consents and (home.charter / "cooperative.toml").exists():
                give_consent(home, self.cooperative.charter)

    def run(self, *, meddle=lambda: None, rounds=400):
        """Carry letters and let the coordinator look until every worker has ended."""
        with self.cooperative.open_ledger() as ledger:
            coordinator = CoordinatorWorker(self.server, self.cooperative, ledger, self.plugins)
            for _ in range(rounds):
                for home, _, remote in self.members.values():
                    envelope = self.dialogue.next_envelope(remote)
                    if envelope is not None:
                        self.dialogue.accept(remote, answer(home, envelope))
                self._agree()
                meddle()
                coordinator.look()
                threads = [thread for _, thread, _ in self.members.values()]
                for thread in threads:
                    thread.join(timeout=0.05)
                if not any(thread.is_alive() for thread in threads):
                    return
        raise AssertionError(f"not ended: {self.failures}")


def test_a_contributor_on_chats_trains_on_the_assistant_alone(tmp_path, tiny_checkpoint, texts):
    draw = random.Random("chats")
    (tmp_path / "texts" / "chats").mkdir(parents=True)
    lines = []
    for _ in range(120):
        said = [" ".join(draw.choices(["aa1", "bb2", "cc3", "dd4"], k=40)) for _ in range(2)]
        roles = zip(("human", "gpt"), said, strict=True)
        lines.append({"dialog": [{"from": role, "value": text} for role, text in roles]})
    data = "\n".join(map(json.dumps, lines))
    (tmp_path / "texts" / "chats" / "a.jsonl").write_text(data)
    (tmp_path / "texts" / "chats" / "b.txt").write_bytes(b"\0")
    stage = Stage(tmp_path, tiny_checkpoint("gpt_neox"), expected=2)
    home = stage.join(
        "chats-1", "chats", tmp_path / "texts", text_field="dialog", loss_on="assistant"
    )
    stage.join("beta-1", "beta", texts)
    stage.run()
    assert stage.failures == {}
    (training,) = home.training.iterdir()
    assert read_json(training / "record.json")["loss_on"] == "assistant"
    report = read_json(home.corpus / "corpus.json")["report"]
    assert [row["documents"] for row in report["files"]["read"]] == [120]
    assert [row["names"] for row in report["files"]["left_out"]] == [["chats/b.txt"]]
    # Another way to read the same text is another recipe: an earlier offer is not taken for it.
    charter, worker = stage.cooperative.charter, ContributorWorker(home, stage.plugins)
    plain = JoinSettings("chats-1", "chats", (tmp_path / "texts" / "chats",))
    recipe = worker._recipe(charter)
    plain.save(home.settings_file)
    assert ContributorWorker(home, stage.plugins)._recipe(charter) != recipe


def test_a_later_contribution_grows_the_published_model(tmp_path, tiny_checkpoint, texts):
    stage = Stage(tmp_path, tiny_checkpoint("gpt_neox"), expected=2)
    alpha = stage.join("alpha-1", "alpha", texts)
    stage.join("beta-1", "beta", texts)
    stage.run()
    assert stage.failures == {}
    first = read_json(stage.server.outbox / "result.json")
    assert len(first["summary"]["contributions"]) == 2

    # Another's adapter, submitted under another name, is held back, and nobody waits for it.
    (training,) = alpha.training.iterdir()
    stage.join("copy-1", "alpha", texts, adapter=training)
    stage.run()
    assert "check 'near-copy'" in str(stage.failures.pop("copy-1"))
    gamma = stage.join("gamma-1", "gamma", texts)
    stage.run()
    assert stage.failures == {}
    with stage.cooperative.read_ledger() as ledger:
        assert ledger.cooperative_state == CooperativeState.PUBLISHED
        assert len(ledger.contributions(ContributionState.ADMITTED)) == 3
        assert "GROWING" in [event.subject for event in ledger.events()]
    second = read_json(stage.server.outbox / "result.json")
    assert len(second["summary"]["contributions"]) == 3
    assert [p.name for p in (stage.server.outbox / "result").iterdir()] == [second["id"]]
    manifest = json.loads((gamma.contribution / "manifest.json").read_text())
    assert manifest["training"]["steps"] == json.loads(
        (training / "record.json").read_text()
    )["steps"]  # fmt: skip


def test_an_adapter_of_another_program_takes_part(tmp_path, tiny_checkpoint, texts):
    """Trained by PEFT alone, its keys as a state_dict has them, its targets a pattern."""
    stage = Stage(tmp_path, tiny_checkpoint("gpt_neox"), expected=1)
    text = " ".join(path.read_text() for path in sorted((texts / "alpha").iterdir()))
    ids = torch.tensor(build_tiny_tokenizer()(text)["input_ids"])
    blocks = ids[: len(ids) // 32 * 32].view(-1, 32)
    train_with_peft(tmp_path / "peft", build_tiny_model("gpt_neox"), blocks)
    rename(tmp_path / "peft", lambda key: key.replace(".weight", ".default.weight"))
    edit(
        tmp_path / "peft",
        target_modules=r".*\.(query_key_value|dense.*)",
        base_model_name_or_path="/home/alice/secret-project/base",
    )
    (tmp_path / "peft" / "chat_template.jinja").write_text("<|im_start|>{{ x }}")
    home = stage.join("alpha-1", "alpha", texts, adapter=tmp_path / "peft")
    stage.run()
    assert stage.failures == {}
    (warning,) = home.read_warnings()
    assert "a chat template, the base none" in warning
    with stage.cooperative.read_ledger() as ledger:
        (entry,) = ledger.contributions()
    assert entry.state == ContributionState.ADMITTED
    assert entry.decision["effect"] == {"changed": 8, "modules": 8}
    manifest = (home.contribution / "manifest.json").read_text()
    assert json.loads(manifest)["origin"]["base"] == "…/base"
    sent = (home.contribution / "adapter" / "adapter_config.json").read_text()
    assert "alice" not in manifest + sent and "secret" not in manifest + sent
    assert load_contribution(home.contribution).manifest.start_loss is None


def spoil(training, name, value):
    """A copy of a trained adapter with one number replaced."""
    adapter = training.parent.parent / name
    shutil.copytree(training / "adapter", adapter)
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors[min(tensors)][0, 0] = value
    save_file(tensors, weights)
    return adapter


class LyingWorker(ContributorWorker):
    """States losses it did not measure."""

    def _make_contribution(self, under, corpus):
        home, settings = self._home, self._settings
        adapter = MeasuredAdapter(settings.adapter, "lora", 3.0, 2.0, {})
        key = load_or_make_key(home.key)
        sign_adapter(under, corpus, adapter, home.contribution, key=key, name=settings.name)


def test_bad_adapters_are_refused_in_one_line_and_the_others_go_on(
    tmp_path, tiny_checkpoint, texts
):
    stage = Stage(tmp_path, tiny_checkpoint("gpt_neox"), expected=1)
    good = stage.join("alpha-1", "alpha", texts)
    stage.run()
    assert stage.failures == {}
    (training,) = good.training.iterdir()
    stage.join("honest", "beta", texts, adapter=spoil(training, "nan", math.nan))
    liar = stage.join(
        "liar", "gamma", texts, worker=LyingWorker, adapter=spoil(training, "inf", math.inf)
    )
    stage.run()
    # Found at home before anything is built; or by the coordinator, if home does not look.
    assert isinstance(stage.failures["honest"], IncompatibleAdapterError)
    error = stage.failures["liar"]
    assert isinstance(error, AdmissionError) and "\n" not in str(error)
    assert "'liar'" in str(error) and "finite-values" in str(error)
    assert liar.read_state()["phase"] == "REJECTED"
    with stage.cooperative.read_ledger() as ledger:
        states = {entry.contributor: entry.state for entry in ledger.contributions()}
    assert states == {"alpha-1": "ADMITTED", "liar": "REJECTED"}
    assert list(stage.server.received.iterdir()) == []


def test_a_contribution_signed_by_another_is_not_taken(tmp_path, tiny_checkpoint, texts):
    stage = Stage(tmp_path, tiny_checkpoint("gpt_neox"), expected=5)
    home = stage.join("alpha-1", "alpha", texts)
    thief = ContributorHome(tmp_path / "thief")

    def steal():
        # Someone else offers the folder as its own, under its own key and name.
        if home.offer_file.exists() and "thief" not in stage.members:
            load_or_make_key(thief.key)
            JoinSettings("thief", "alpha").save(thief.settings_file)
            thief.contribution.symlink_to(home.contribution)
            thief.offer_file.parent.mkdir(parents=True)
            thief.offer_file.write_bytes(home.offer_file.read_bytes())
            done = threading.Thread(target=lambda: None)
            done.start()
            stage.members["thief"] = (thief, done, RemoteContributor())
        letter = read_json(thief.acknowledgement_letter)
        if letter is not None:
            raise StopIteration(letter)

    with pytest.raises(StopIteration) as caught:
        stage.run(meddle=steal)
    letter = caught.value.args[0]
    assert letter["state"] == "REJECTED"
    assert "signed by 'thief'" in letter["findings"][0]


def test_nothing_of_a_contributor_leaves_before_it_agrees(tmp_path, tiny_checkpoint, texts):
    stage = Stage(tmp_path, tiny_checkpoint("gpt_neox"), expected=1)
    stage.consents = False
    home = stage.join("alpha-1", "alpha", texts)
    seen = []

    def watch():
        seen.append(home.read_state().get("message"))
        if seen.count("waiting for your consent to send it") == 5:
            (mailbox,) = stage.server.contributors()
            assert not home.offer_file.exists() and mailbox.parts.held() == set()
            stage.consents = True

    stage.run(meddle=watch)
    assert stage.failures == {} and stage.consents


def test_a_domain_the_cooperative_has_no_use_for_is_refused(tmp_path, tiny_checkpoint, texts):
    stage = Stage(tmp_path, tiny_checkpoint("gpt_neox"), domains=("alpha", "beta"))
    stage.join("gamma-1", "gamma", texts)
    stage.run()
    error = stage.failures["gamma-1"]
    assert isinstance(error, FederationError) and "one of the domains alpha, beta" in str(error)
