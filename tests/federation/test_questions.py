"""Questions and answers through the mailboxes, over a network that loses and repeats."""

import random
import shutil
import threading
import time
from functools import partial

import pytest
import torch
from molora_evolution.routers import ParallelSigmoidOptions, ParallelSigmoidRouter

from molora_fed.adapters.updates import LinearUpdate
from molora_fed.charter import (
    Amendment,
    BaseIdentity,
    Charter,
    FusionRules,
    Identity,
    PopulationRules,
    write_charter,
)
from molora_fed.cooperative.outgoing import describe_outgoing
from molora_fed.errors import (
    FederationError,
    PopulationError,
    QuestionRefusedError,
    SignatureError,
)
from molora_fed.federation.answering import (
    answer_question,
    find_question,
)
from molora_fed.federation.client_dialogue import answer
from molora_fed.federation.consent import (
    give_consent,
    has_consent,
)
from molora_fed.federation.coordinator_mail import (
    acknowledge,
    complete_deliveries,
    publish_charter,
)
from molora_fed.federation.envelopes import Envelope
from molora_fed.federation.exchange import Exchange
from molora_fed.federation.homes import ContributorHome, CoordinatorHome
from molora_fed.federation.join_settings import JoinSettings, prepare_home
from molora_fed.federation.mailbox import read_json
from molora_fed.federation.requests import RemoteData
from molora_fed.federation.server_dialogue import RemoteContributor, ServerDialogue
from molora_fed.federation.signing import build_question_bytes
from molora_fed.federation.worker import ContributorWorker
from molora_fed.federation.worker_mail import (
    offer_contribution,
    receive_charter,
)
from molora_fed.plugins import load_plugins
from molora_fed.population.asked import AskedQuestions
from molora_fed.population.contract import Birth, Population, Slot
from molora_fed.population.evolution import Branch
from molora_fed.population.questions import Answer, Question, load_question, save_answer
from molora_fed.storage.files import write_json
from molora_fed.storage.keys import load_or_make_key, sign
from molora_fed.types import Split

SMALL = 3_000
PLUGINS = load_plugins()
AMENDMENT = Amendment(
    expected=1, fusion=FusionRules(mode="population"), population=PopulationRules(data="private")
)


def build_branch(seed=0):
    random_numbers = torch.Generator().manual_seed(seed)
    update = LinearUpdate(
        a=torch.randn(2, 300, generator=random_numbers),
        b=torch.randn(300, 2, generator=random_numbers),
        scale=1.0,
    )
    slots = (Slot(Birth("g0-s0", "fresh"), "python", {"layer": update}),)
    router = ParallelSigmoidRouter.build(1, 8, ParallelSigmoidOptions(), seed)
    return Branch(Population("0" * 64, 0, slots), router)


class Person:
    """A contributor that adapts by adding 1, and counts what it is asked."""

    def __init__(self, figures=None):
        self.figures = figures or {"gates": [0.5], "positions": 7}
        self.asked = []

    def answer(self, question, *, progress=None):
        self.asked.append(question.kind)
        branch = question.branches[0] if question.kind == "adapt" else None
        return Answer("", self.figures, branch)


class Stage:
    """A coordinator and contributors on disk, all admitted."""

    def __init__(self, root, names=("anna", "bert"), message_bytes=SMALL):
        self.server = CoordinatorHome(root / "server")
        self.message_bytes = message_bytes
        self.key = load_or_make_key(self.server.key)
        base = BaseIdentity(id="tiny", weights="0" * 64, tokenizer="1" * 64)
        self.charter = Charter(identity=Identity(name="test", base=base), amendment=AMENDMENT)
        self.server.base.mkdir(parents=True)
        (self.server.base / "model.safetensors").write_bytes(b"x")
        write_charter(self.charter, self.server.charter)
        publish_charter(self.server, self.charter, self.key, part_bytes=message_bytes)
        self.dialogue = ServerDialogue(self.server, message_bytes=message_bytes, wait_seconds=0)
        self.homes, self.people, self.lines = {}, {}, {}
        self.problems, self.waits = [], []
        for name in names:
            home = ContributorHome(root / name)
            home.root.mkdir()
            load_or_make_key(home.key)
            JoinSettings(name, "python").save(home.settings_file)
            (home.contribution).mkdir()
            (home.contribution / "adapter.bin").write_bytes(name.encode())
            self.homes[name], self.people[name] = home, Person()
            self.lines[name] = RemoteContributor()
            self.admit(name)

    def admit(self, name):
        home = self.homes[name]
        for _ in range(20):
            self.exchange(name)
            if receive_charter(home) and not home.offer_file.exists():
                give_consent(home, self.charter)
                offer_contribution(home)
            for delivery in complete_deliveries(self.server, part_bytes=self.message_bytes):
                acknowledge(
                    delivery, self.key, contribution_id=name, state="ADMITTED", findings=[],
                    part_bytes=self.message_bytes,
                )  # fmt: skip
        assert home.acknowledgement_letter.exists()

    def exchange(self, name, fate="delivered"):
        envelope = self.dialogue.next_envelope(self.lines[name])
        if envelope is None:
            return False
        assert envelope.num_bytes <= self.message_bytes
        if fate == "request lost":
            return True
        reply = answer(self.homes[name], envelope)
        if fate == "repeated":
            reply = answer(self.homes[name], envelope)
        if fate != "reply lost":
            self.dialogue.accept(self.lines[name], reply)
        if fate == "node replaced":
            self.lines[name] = RemoteContributor()
        return True

    def work(self, name):
        home = self.homes[name]
        letter = find_question(home, self.charter)
        if letter is not None:
            answer_question(home, self.charter, letter, partial(self.reply, name))

    def reply(self, name, question, answer):
        rules = self.charter.identity.adapters
        asked = load_question(question, rules=rules, plugins=PLUGINS)
        save_answer(self.people[name].answer(asked), AMENDMENT.population.router, answer)
        return "evolution"

    def correspond(self):
        mailboxes = {mailbox.name: mailbox for mailbox in self.server.contributors()}
        self.open = Exchange(
            self.server, {name: mailboxes[name] for name in self.homes},
            self.server.evolution / "answers", key=self.key, charter=self.charter,
            part_bytes=self.message_bytes, on_wait=self.waits.append,
            on_problem=self.problems.append,
        )  # fmt: skip
        return RemoteData(self.open, tuple(self.homes), charter=self.charter, plugins=PLUGINS)

    def ask(self, question, read, *, meddle=lambda: "delivered", ask=None):
        """Ask while letters are carried; what was read, or the error."""
        ask, found = ask or self.correspond(), []
        thread = threading.Thread(target=lambda: found.append(ask(question, read)), daemon=True)
        thread.start()
        deadline = time.monotonic() + 60
        while thread.is_alive() and time.monotonic() < deadline:
            for name in self.homes:
                self.exchange(name, meddle())
                self.work(name)
            thread.join(timeout=0.01)
        assert found, "nobody answered"
        return found[0]


def read_gates(reply):
    return reply.contributor, reply.figures["gates"]


def test_everybody_is_asked_and_answers_come_in_order(tmp_path):
    stage = Stage(tmp_path)
    ask = stage.correspond()
    branch = build_branch()
    adapted = stage.ask(Question("adapt", {}, (branch,)), lambda a: a.branch, ask=ask)
    for one in adapted:
        update = one.population.slots[0].updates["layer"]
        assert torch.equal(update.a, branch.population.slots[0].updates["layer"].a)
    for number in range(3):  # gates of other branches, question after question
        found = stage.ask(Question("gates", {}, (build_branch(number),)), read_gates, ask=ask)
        assert found == [("anna", [0.5]), ("bert", [0.5])]
    for name, home in stage.homes.items():
        assert stage.people[name].asked == ["adapt", "gates", "gates", "gates"]
        assert len(list((home.private / "questions").iterdir())) == 1
        assert len(list((home.private / "answers").iterdir())) == 1
    # What was adapted is used and gone; figures stay for who looks back.
    answers = stage.server.evolution / "answers"
    assert len(list(answers.glob("*/*/answer.json"))) == 8
    assert not list(answers.glob("*/*/branch-*"))
    stage.open.close()
    assert not any(mailbox.question_file.exists() for mailbox in stage.server.contributors())
    assert not (stage.server.outbox / "questions").exists()


def test_nothing_is_lost_on_a_bad_network(tmp_path):
    stage = Stage(tmp_path)
    draw = random.Random(5)
    fates = ("delivered", "request lost", "reply lost", "repeated", "node replaced")
    found = stage.ask(
        Question("adapt", {}, (build_branch(),)), lambda a: a.contributor,
        meddle=lambda: draw.choice(fates),
    )  # fmt: skip
    assert found == ["anna", "bert"]
    assert [person.asked for person in stage.people.values()] == [["adapt"]] * 2


def test_asked_again_after_a_kill_the_same_question_is_not_worked_on_again(tmp_path):
    stage = Stage(tmp_path)
    question = Question("gates", {}, (build_branch(),))
    stage.ask(question, read_gates)
    answers = stage.server.evolution / "answers"
    (anna,) = answers.glob("*/anna")
    shutil.rmtree(anna)  # the coordinator was killed before it had this one
    assert stage.ask(question, read_gates) == [("anna", [0.5]), ("bert", [0.5])]
    assert [person.asked for person in stage.people.values()] == [["gates"]] * 2


def test_a_question_takes_one_exchange(tmp_path):
    stage = Stage(tmp_path, names=("anna",), message_bytes=100_000)
    home, line = stage.homes["anna"], stage.lines["anna"]
    asked = []
    thread = threading.Thread(
        target=lambda: asked.append(
            stage.correspond()(Question("gates", {}, (build_branch(),)), read_gates)
        )
    )
    thread.start()
    while (envelope := stage.dialogue.next_envelope(line)) is None:
        time.sleep(0.01)

    def work():
        while not home.answer_file.exists():
            stage.work("anna")
            time.sleep(0.01)

    worker = threading.Thread(target=work)
    worker.start()
    # Question, files and wait in one envelope; the reply is held back until it has the answer.
    assert [letter.kind for letter in envelope.letters] == ["question", "wait"]
    wait = envelope.letters[1].model_copy(update={"seconds": 20.0})
    envelope = Envelope((envelope.letters[0], wait), envelope.parts)
    stage.dialogue.accept(line, answer(home, envelope))
    worker.join()
    thread.join(timeout=20)
    assert asked == [[("anna", [0.5])]]
    assert line.answered == line.state.question != ""


def test_an_answer_that_cannot_be_used_is_asked_for_again(tmp_path):
    stage = Stage(tmp_path, names=("anna",))
    seen = []

    def read(reply):
        seen.append(reply)
        if len(seen) < 3:
            raise PopulationError("Cannot use the figures of 'anna': expected others.")
        return reply.contributor

    assert stage.ask(Question("gates", {}, (build_branch(),)), read) == ["anna"]
    assert "Cannot use the figures of 'anna'" in stage.problems[0] and stage.problems[-1] == ""


def test_an_answer_signed_by_another_is_not_taken(tmp_path):
    stage = Stage(tmp_path, names=("anna",))
    home = stage.homes["anna"]
    rightful = home.key.read_bytes()

    def forge():
        if not stage.problems:  # for as long as nobody has noticed
            home.key.unlink(missing_ok=True)
            load_or_make_key(home.key)
        elif home.key.read_bytes() != rightful:
            home.key.write_bytes(rightful)
            home.answer_file.unlink()  # and its worker signs again
        return "delivered"

    found = stage.ask(Question("gates", {}, (build_branch(),)), read_gates, meddle=forge)
    assert found == [("anna", [0.5])]
    assert "answer of 'anna'" in stage.problems[0]


def test_a_contributor_answers_its_coordinator_only(tmp_path):
    stage = Stage(tmp_path, names=("anna",))
    home = stage.homes["anna"]
    stage.ask(Question("gates", {}, (build_branch(),)), read_gates)
    letter = dict(read_json(home.question_letter))
    home.answer_file.unlink()
    assert find_question(home, stage.charter) is not None
    stranger = load_or_make_key(tmp_path / "stranger.pem")
    content = build_question_bytes(stage.charter.identity_hash, 0, letter["id"])
    write_json(home.question_letter, {**letter, "signature": sign(stranger, content)})
    with pytest.raises(SignatureError):
        find_question(home, stage.charter)
    content = build_question_bytes(stage.charter.identity_hash, 1, letter["id"])
    write_json(
        home.question_letter, {**letter, "amendment": 1, "signature": sign(stage.key, content)}
    )
    with pytest.raises(FederationError, match="amendment 0"):
        find_question(home, stage.charter)


def test_an_answer_over_its_limit_is_not_fetched(tmp_path):
    stage = Stage(tmp_path, names=("anna",))
    home = stage.homes["anna"]
    mailbox = stage.server.contributor(stage.lines["anna"].fingerprint)
    files = [{"name": "answer.json", "sha256": "a" * 64, "num_bytes": 2**30}]
    question = {"id": "1" * 64, "files": [], "part_bytes": 10, "amendment": 0, "signature": ""}
    write_json(mailbox.question_file, {**question, "answer_bytes": 1_000})
    write_json(home.question_letter, {**question, "answer_bytes": 1_000})
    write_json(home.answer_file, {"question": "1" * 64, "files": files, "signature": ""})
    (home.answer_folder("1" * 64)).mkdir(parents=True)
    with (home.answer_folder("1" * 64) / "answer.json").open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(FederationError, match="at most 1000 bytes"):
        stage.exchange("anna")
    assert not mailbox.answer_file.exists() and not mailbox.parts.held()


def test_a_refused_question_is_logged_shown_and_not_answered(tmp_path, monkeypatch):
    stage = Stage(tmp_path, names=("anna",))
    home = stage.homes["anna"]
    stage.ask(Question("gates", {}, (build_branch(),)), read_gates)
    home.answer_file.unlink()

    class Refusing:
        def answer(self, question, *, progress=None):
            raise QuestionRefusedError("Cannot answer the coordinator: one more of 'gates'.")

    worker = ContributorWorker(home, PLUGINS)
    monkeypatch.setattr(worker, "_open_member", lambda charter: Refusing())
    for _ in range(3):  # the letter stays where it is, the worker goes on
        worker._answer_question(stage.charter)
    assert not home.answer_file.exists()
    assert "refused a question" in home.read_state()["message"]
    (line,) = home.refusals_log.read_text().splitlines()
    assert "one more of 'gates'" in line


@pytest.mark.parametrize("content", ["", "[]", '{"kind": "sample"}', '{"kind": "gates"}'])
def test_a_malformed_question_ends_nothing(tmp_path, content):
    stage = Stage(tmp_path, names=("anna",))
    home = stage.homes["anna"]
    stage.ask(Question("gates", {}, (build_branch(),)), read_gates)
    home.answer_file.unlink()
    letter = read_json(home.question_letter)
    (home.question_folder(letter["id"]) / "question.json").write_text(content)
    ContributorWorker(home, PLUGINS)._answer_question(stage.charter)
    assert not home.answer_file.exists() and len(home.read_refusals()) == 1
    assert home.read_state()["message"].startswith("refused a question: Cannot")
    prepare_home(home, JoinSettings("anna", "python"))  # it is looked at anew, and noted anew
    ContributorWorker(home, PLUGINS)._answer_question(stage.charter)
    assert len(home.read_refusals()) == 2


def test_joining_again_after_a_result_begins_a_new_count(tmp_path):
    stage = Stage(tmp_path, names=("anna",))
    home, settings = stage.homes["anna"], JoinSettings("anna", "python")
    AskedQuestions(home.private, 0, {"gates": 1}).admit("gates", "a")
    prepare_home(home, settings)
    with pytest.raises(QuestionRefusedError):  # a restart is no new join
        AskedQuestions(home.private, 0, {"gates": 1}).admit("gates", "b")
    write_json(home.result_letter, {})
    prepare_home(home, settings)
    AskedQuestions(home.private, 0, {"gates": 1}).admit("gates", "b")
    assert not home.result_letter.exists()


def test_consent_is_to_what_is_asked_for(tmp_path):
    stage = Stage(tmp_path, names=("anna",))
    home = stage.homes["anna"]
    assert has_consent(home, stage.charter)
    pooled = stage.charter.model_copy(
        update={"amendment": AMENDMENT.model_copy(update={"population": PopulationRules()})}
    )
    assert not has_consent(home, pooled)
    described = describe_outgoing(stage.charter, PLUGINS, width=None)
    outgoing = {row.what: row for row in described.rows}
    assert not any(row.blocks or row.tokens for row in outgoing.values())
    assert not any(split in name for split in Split for name in outgoing)
    assert {"adapter, by the charter's limit", "adapted population, every round"} <= outgoing.keys()
