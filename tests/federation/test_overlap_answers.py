"""A member's part in a private comparison: the same bytes after a kill, and what it refuses."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from molora_fed.charter import Charter, Identity
from molora_fed.contributions.manifest import Manifest, QueryEntry
from molora_fed.corpus.blocks import pack_documents
from molora_fed.corpus.overlap import index_blocks
from molora_fed.errors import FederationError, QuestionRefusedError
from molora_fed.federation import overlap_answers, sum_answers
from molora_fed.federation.overlap_answers import OverlapAnswers
from molora_fed.federation.overlap_carrier import OverlapCarrier
from molora_fed.federation.overlap_letters import (
    COUNTS,
    QUERIES,
    QUERY,
    REPLIES,
    SET,
    SETS,
    SIGNATURE,
    SIGNATURES,
    read_part,
    sign_set,
)
from molora_fed.federation.sum_answers import SumAnswers, end_fusion
from molora_fed.fusion.sum_questions import TextCounts, name_fusion
from molora_fed.population.asked import AskedQuestions
from molora_fed.privacy import intersection, messages, overlap
from molora_fed.privacy.intersection import limit_queries
from molora_fed.privacy.overlap import open_receiver
from molora_fed.storage.files import hash_bytes
from molora_fed.storage.keys import build_public_pem
from molora_fed.types import Document, Split

NAMES = ("ann", "bob", "eve")
IDENTITY, FUSION = "1" * 64, "f" * 64
KEYS = {name: ec.derive_private_key(n, ec.SECP384R1()) for n, name in enumerate(NAMES, start=1)}


@pytest.fixture(scope="module", autouse=True)
def _small_batches():
    """Random elements take time, and are not what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (intersection, messages, overlap):
            patch.setattr(module, "BATCH", 128)
        for module in (intersection, messages, overlap_answers):
            patch.setattr(module, "SET_BATCH", 1_024)
        yield


def write(seed, count=40):
    draw = np.random.default_rng(seed)
    return " ".join(f"w{n}" for n in draw.integers(0, 900, size=count))


TEXTS = {
    "ann": ([write(1), write(2)], [write(3)]),
    "bob": ([write(4)], [write(5), write(1)]),  # ann's first held-out text
    "eve": ([write(6)], [write(7), write(2)]),
}
"""Held-out and train text of each."""


def pack(texts, tokenizer, split):
    documents = [Document(str(number), text) for number, text in enumerate(texts)]
    clusters = np.arange(len(documents), dtype=np.int32)
    return pack_documents(documents, clusters, tokenizer, domain="law", split=split, block_size=96)


class Text:
    """Stands for a `FusionMember`: the blocks, and what it was told of others' text."""

    def __init__(self, name, tokenizer):
        self._name = name
        held_out, train = TEXTS[name]
        self.tokenizer = tokenizer
        self.prepared = self.held_out = pack(held_out, tokenizer, Split.HELD_OUT)
        self._train = pack(train, tokenizer, Split.TRAIN)
        self.elsewhere = None

    def index_known(self):
        return index_blocks(self._train, self.tokenizer)

    def count(self, measured=(), *, progress=None):
        return TextCounts(domain="law", tokens=9, blocks=9, left_out=0, empty=0, grams=999,
                          own=0, union=0, base=0, kept=999, after=0, compared=[])  # fmt: skip

    def compare(self, elsewhere):
        self.elsewhere = elsewhere
        compared = sorted([self._name, *elsewhere.trained])
        update = {"union": len(elsewhere.shingles), "compared": compared}
        return self.count().model_copy(update=update)


class Place:
    """Three members' homes, and the coordinator's folder."""

    def __init__(self, root, tokenizer):
        self.root = root
        self.tokenizer = tokenizer
        self.notes = []
        self.manifests = {name: self.state(name) for name in NAMES}

    def open_query(self, name, key=None):
        blocks = Text(name, self.tokenizer).prepared
        return open_receiver(
            blocks, self.tokenizer, key=key or KEYS[name], identity=IDENTITY, name=name
        ).query

    def state(self, name):
        data = self.open_query(name).to_bytes()
        blocks = len(Text(name, self.tokenizer).prepared)
        return Manifest.model_construct(
            contributor=name,
            public_key=build_public_pem(KEYS[name]),
            charter_identity=IDENTITY,
            held_out_query=QueryEntry(sha256=hash_bytes(data), bytes=len(data), blocks=blocks),
        )

    def open(self, name, text=None):
        """A process of a member."""
        folder = self.root / name
        limits = limit_queries(set(NAMES) - {name})
        return OverlapAnswers(
            text or Text(name, self.tokenizer),
            name=name,
            manifests=self.manifests,
            key=KEYS[name],
            secret=name.encode().ljust(32),
            fusion=FUSION,
            folder=folder / "overlap",
            admit=AskedQuestions(folder, 0, limits).admit,
        )

    @property
    def carrier(self):
        folder = self.root / "server"
        return OverlapCarrier(folder, self.manifests, fusion=FUSION, on_note=self.notes.append)

    def lay(self, name, files):
        folder = self.root / "mail" / name
        for inner, data in files.items():
            path = folder / inner
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return folder

    def offer(self, name, **changes):
        """A member's first answer at the coordinator."""
        files = {**self.open(name).offer(), **changes}
        self.carrier.take_offer(name, self.lay(f"offer-{name}", files))

    def ask(self, turn, name):
        """What a member gets beside a sum's question."""
        riders = self.carrier.list_riders(turn, name)
        files = {inner: path.read_bytes() for inner, path in riders.items()}
        return self.lay(f"question-{turn}-{name}", files)

    def take(self, turn, name, files):
        answer = self.lay(f"answer-{turn}-{name}", files)
        self.carrier.take_answer(turn, name, answer, Text(name, self.tokenizer).count())


@pytest.fixture
def place(tmp_path, tokenizer):
    return Place(tmp_path, tokenizer)


def run(place):
    """All of it; the last answers."""
    for turn in (1, 2):
        answers = {name: place.open(name).answer(place.ask(turn, name)) for name in NAMES}
        for name, files in answers.items():
            place.take(turn, name, files)
    return {name: json.loads(files[COUNTS]) for name, files in answers.items() if files}


class Killed(BaseException):
    """Nothing catches it."""


def test_everybody_learns_what_lies_in_whose_text(place):
    for name in NAMES:
        place.offer(name)
    found = run(place)
    assert all(one["compared"] == list(NAMES) for one in found.values()) and place.notes == []
    assert found["ann"]["union"] > 40 and found["bob"]["union"] == found["eve"]["union"] == 0
    again = Text("ann", place.tokenizer)
    place.open("ann", again)  # another process, for the held-out question
    assert len(again.elsewhere.shingles) == found["ann"]["union"]
    assert again.elsewhere.trained == ("bob", "eve")
    first = {name: Text(name, place.tokenizer).count() for name in NAMES}
    recounted = place.carrier.recount(first)
    assert {n: one.model_dump(mode="json") for n, one in recounted.items()} == found
    assert not (place.root / "ann" / "overlap" / "sets").exists()


def test_a_process_that_is_killed_anywhere_sends_the_same_bytes(place, monkeypatch):
    monkeypatch.setattr(overlap_answers, "SET_BATCH", 16)  # a file for every 16 8-grams
    for name in NAMES:
        place.offer(name)
    whole = place.open("bob").offer()
    (place.root / "bob" / "overlap" / "sealing.safetensors").unlink()
    write, budget = overlap_answers.write_bytes, [0]

    def write_until(path, data, **settings):
        if budget[0] == 0:
            raise Killed
        budget[0] -= 1
        write(path, data, **settings)

    monkeypatch.setattr(overlap_answers, "write_bytes", write_until)

    def insist(work):
        """A new process after each write."""
        for kills in range(100):
            budget[0] = 1
            try:
                return work(), kills
            except Killed:
                continue
        raise AssertionError("no end")

    offered, kills = insist(lambda: place.open("bob").offer())
    assert offered == whole and kills > 2
    monkeypatch.setattr(overlap_answers, "write_bytes", write)
    for name in NAMES:
        place.take(1, name, place.open(name).answer(place.ask(1, name)))
    monkeypatch.setattr(overlap_answers, "write_bytes", write_until)
    question = place.ask(2, "ann")
    counted, kills = insist(lambda: place.open("ann").answer(question))
    assert json.loads(counted[COUNTS])["compared"] == list(NAMES) and kills == 2
    assert place.open("ann").answer(question) == counted


def test_a_query_is_answered_once_and_only_if_its_manifest_states_it(place):
    for name in NAMES:
        place.offer(name)
    question = place.ask(1, "bob")
    first = place.open("bob").answer(question)
    assert set(first) == {f"{REPLIES}/ann", f"{REPLIES}/eve"}
    assert place.open("bob").answer(question) == first
    asked = json.loads((place.root / "bob" / "asked.json").read_text())["asked"]
    assert {name: len(found) for name, found in asked.items()} == {
        "overlap of ann": 1, "overlap of eve": 1,
    }  # fmt: skip
    guesses = place.open_query("ann", key=KEYS["eve"]).to_bytes()
    (question / QUERIES / "ann").write_bytes(guesses)
    (question / QUERIES / "mallory").write_bytes(guesses)
    assert set(place.open("bob").answer(question)) == {f"{REPLIES}/eve"}


def test_who_states_no_query_is_asked_and_asks_for_nothing(place):
    for name in NAMES:
        place.offer(name)
    place.manifests["eve"] = place.manifests["eve"].model_copy(update={"held_out_query": None})
    question = place.ask(1, "bob")
    assert "eve" not in {path.name for path in (question / SETS).iterdir()}
    full = place.root / "mail" / "offer-eve"
    (question / QUERIES / "eve").write_bytes((full / QUERY).read_bytes())
    assert set(place.open("bob").answer(question)) == {f"{REPLIES}/ann"}
    eve = place.open("eve")
    assert eve.offer() == {} and eve.answer(question) == {}
    assert place.ask(1, "eve").exists() is False


def test_a_set_must_be_its_owners_and_of_this_fusion(place):
    for name in NAMES:
        place.offer(name)
    data = (place.root / "server" / SETS / "bob").read_bytes()
    forged = [
        sign_set(data, KEYS["eve"], identity=IDENTITY, fusion=FUSION),
        sign_set(data, KEYS["bob"], identity=IDENTITY, fusion="e" * 64),
        b"\xff" * 90,
    ]
    (place.root / "server" / SETS / "bob").unlink()
    for signature in forged:
        place.offer("bob", **{SIGNATURE: signature})
        assert "no part of 'bob': Cannot trust set of 'bob'" in place.notes.pop()
        assert not (place.root / "server" / SETS / "bob").exists()
        # A coordinator that carries it all the same does not get it past the others.
        question = place.ask(1, "ann")
        (question / SETS / "bob").write_bytes(data)
        (question / SIGNATURES / "bob").write_bytes(signature)
        place.open("ann").answer(question)
        assert {p.name for p in (place.root / "ann/overlap/sets").iterdir()} == {"eve"}
    short = data[:-8]
    signature = sign_set(short, KEYS["bob"], identity=IDENTITY, fusion=FUSION)
    place.offer("bob", **{SET: short, SIGNATURE: signature})
    assert "no part of 'bob': Cannot read the set of 'bob'" in place.notes.pop()


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: b"", None])
def test_a_reply_that_is_missing_or_malformed_ends_one_comparison(place, change):
    for name in NAMES:
        place.offer(name)
    for name in NAMES:
        files = place.open(name).answer(place.ask(1, name))
        if name == "bob":
            data = files.pop(f"{REPLIES}/ann")
            files |= {} if change is None else {f"{REPLIES}/ann": change(data)}
        place.take(1, name, files)
    assert "no part of 'bob' to 'ann': Cannot" in place.notes.pop() and place.notes == []
    answers = {name: place.open(name).answer(place.ask(2, name)) for name in NAMES}
    assert json.loads(answers["ann"][COUNTS])["compared"] == ["ann", "eve"]
    assert json.loads(answers["eve"][COUNTS])["compared"] == list(NAMES)
    place.take(2, "ann", answers["ann"])
    assert place.notes == ["Held-out text of 'ann' is not compared with bob."]


def test_counts_are_said_once_whoever_is_carried_later(place):
    for name in NAMES:
        place.offer(name)
    for name in NAMES:
        place.take(1, name, place.open(name).answer(place.ask(1, name)))
    whole = place.ask(2, "ann")
    alone = place.lay("alone", {f"{REPLIES}/bob": (whole / REPLIES / "bob").read_bytes()})
    first = place.open("ann").answer(alone)
    assert json.loads(first[COUNTS])["compared"] == ["ann", "bob"]
    place.open("ann").answer(place.root / "mail" / "question-1-ann")  # all sets once more
    assert place.open("ann").answer(whole) == first


def test_counts_that_others_text_cannot_give_are_not_used(place):
    for name in NAMES:
        place.offer(name)
    run(place)
    first = {name: Text(name, place.tokenizer).count() for name in NAMES}
    good = place.carrier.recount(first)["ann"].model_dump(mode="json")
    (place.root / "server" / "overlap" / "counts" / "ann").unlink()
    for wrong in ({"tokens": 10}, {"compared": ["mallory"]}, {"left_out": 10}, {"text": "x"}):
        place.take(2, "ann", {COUNTS: json.dumps({**good, **wrong}).encode()})
        assert "no part of 'ann': Cannot" in place.notes.pop(), wrong
    place.take(2, "ann", {COUNTS: b"[" * 3_000_000})
    assert "expected as 'overlap/counts.json' at most 1,048,576 bytes" in place.notes.pop()
    assert place.carrier.recount(first) == {**place.carrier.recount(first), "ann": first["ann"]}


def test_more_held_out_blocks_than_were_stated_are_compared_with_nobodys_text(place):
    entry = place.manifests["ann"].held_out_query
    fewer = entry.model_copy(update={"blocks": entry.blocks - 1})
    place.manifests["ann"] = place.manifests["ann"].model_copy(update={"held_out_query": fewer})
    offered = place.open("ann").offer()
    assert set(offered) == {SET, SIGNATURE}  # others are still answered


def test_a_part_of_too_many_bytes_is_not_read(tmp_path):
    (tmp_path / "part").write_bytes(b"x" * 11)
    assert read_part(tmp_path / "part", 11) == b"x" * 11
    with pytest.raises(FederationError, match="at most 10 bytes, got more"):
        read_part(tmp_path / "part", 10)
    with pytest.raises(FederationError, match="a file, got FileNotFoundError"):
        read_part(tmp_path / "none", 10)


def test_what_a_fusion_was_asked_stays_counted_when_it_is_begun_again(
    tmp_path, tokenizer, monkeypatch
):
    charter = Charter.model_construct(
        identity=Identity.model_construct(name="test"),
        amendment=SimpleNamespace(number=0, fusion=SimpleNamespace(carried=())),
    )
    monkeypatch.setattr(Charter, "identity_hash", IDENTITY)
    experts = []
    monkeypatch.setattr(sum_answers, "load_experts", lambda folder: list(experts))
    answers = SumAnswers(
        charter,
        name="ann",
        contribution="ann",
        key=KEYS["ann"],
        folder=tmp_path / "fusion",
        open_member=lambda entrants, folder: Text("ann", tokenizer),
    )

    def begin(*names):
        experts[:] = [
            SimpleNamespace(
                id=name,
                adapter_folder=tmp_path,
                statistics_path=None,
                manifest=SimpleNamespace(
                    contributor=name, charter_identity=IDENTITY, files={}, domain="law",
                    contamination=None, training={}, held_out_query=None, carried_files={},
                ),
                carried={},
            )
            for name in names
        ]  # fmt: skip
        fusion = name_fusion(charter, names)
        question = tmp_path / "questions" / fusion
        (question / "experts").mkdir(parents=True, exist_ok=True)
        content = json.dumps({"kind": "experts", "fusion": fusion})
        (question / "question.json").write_text(content)
        answers.answer(question, tmp_path / "answer", None)
        return tmp_path / "fusion" / fusion[:16]

    first = begin("ann", "bob")
    fusion = name_fusion(charter, ("ann", "bob"))
    counted = AskedQuestions(tmp_path / "fusion" / "asked" / fusion, 0, {"held-out": 1})
    counted.admit("held-out", "a")
    secret = (first / "overlap-secret").read_bytes()
    begin("ann", "bob", "eve")
    assert not (first / "experts").exists()  # what its sums were opened over stays known
    assert begin("ann", "bob") == first
    assert (first / "overlap-secret").read_bytes() == secret
    counted.admit("held-out", "a")
    with pytest.raises(QuestionRefusedError, match="one more of 'held-out'"):
        counted.admit("held-out", "b")
    end_fusion(tmp_path / "fusion", fusion)
    assert [path.name for path in first.iterdir()] == ["ended.json"]
    with pytest.raises(QuestionRefusedError, match="whose result is here"):
        begin("ann", "bob")
