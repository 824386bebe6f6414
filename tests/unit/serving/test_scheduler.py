"""Many prompts at once: each text is its own, whoever fails, goes or waits beside it."""

import threading

import pytest
import torch
from process_helpers import wait_until
from serving_helpers import HeldBatch, build_model

from molora_fed.inference.fused_build import open_causal_lm
from molora_fed.inference.generate import Sampling, generate
from molora_fed.serving.batch import RunningBatch
from molora_fed.serving.models import ServedModel
from molora_fed.serving.scheduler import BusyError, Failure, Generation, Scheduler

PROMPTS = ["a", "Hello, world", "def f(x):\n    return", "x" * 40]


class Listener:
    """Collects the events of one generation."""

    def __init__(self):
        self.events = []
        self.ended = threading.Event()

    def __call__(self, event):
        self.events.append(event)
        if isinstance(event, Failure) or event.finish is not None:
            self.ended.set()

    @property
    def text(self):
        assert self.ended.wait(30)
        return "".join(event.text for event in self.events)

    @property
    def last(self):
        assert self.ended.wait(30)
        return self.events[-1]


class Office:
    """A scheduler and its listeners."""

    def __init__(self, model, batch=None, **settings):
        self.served = ServedModel(model)
        self.batch = RunningBatch(model, piece=7) if batch is None else batch
        self.scheduler = Scheduler(
            self.batch, self.served.copy_tokenizer(), ends=self.served.ends, **settings
        )
        self.scheduler.start()

    def ask(self, prompt="abc", tokens=8, temperature=1.0, seed=0, **more):
        sampling = Sampling(tokens, temperature, seed=seed)
        wanted = Generation(self.served.encode(prompt), sampling, **more)
        listener = Listener()
        (ticket,) = self.scheduler.submit([wanted], [listener])
        listener.ticket = ticket
        return listener


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return build_model(tiny_checkpoint("llama"))


@pytest.fixture
def office(model):
    offices = []

    def open_office(**settings):
        offices.append(Office(model, **settings))
        return offices[-1]

    yield open_office
    for one in offices:
        if isinstance(one.batch, HeldBatch):
            one.batch.free()
        one.scheduler.stop()


def test_a_greedy_text_is_that_of_generate(tiny_checkpoint, office, model):
    plain = open_causal_lm(tiny_checkpoint("llama"))
    base = office().ask(PROMPTS[1], temperature=0.0, gates=torch.tensor([0.0, 0.0, 1.0]))
    assert base.text == generate(plain, PROMPTS[1], Sampling(8))[0].text


def test_a_seed_gives_one_text_in_whatever_company(office):
    crowded = office()
    asked = [crowded.ask(prompt, seed=7) for prompt in PROMPTS for _ in range(3)]
    together = [one.text for one in asked]
    for at, prompt in enumerate(PROMPTS):
        alone = crowded.ask(prompt, seed=7).text
        assert set(together[3 * at : 3 * at + 3]) == {alone}
    assert crowded.ask(PROMPTS[0], seed=8).text != together[0]


def test_copies_of_one_prompt_differ_and_are_told_apart(office):
    listener = office().ask(copies=3, tokens=6)
    wait_until(lambda: sum(e.finish is not None for e in listener.events) == 3)
    texts = {i: "".join(e.text for e in listener.events if e.index == i) for i in range(3)}
    assert len(set(texts.values())) == 3


def test_a_specialist_alone_has_its_gate_and_another_text(office):
    one = torch.tensor([0.0, 1.0, 0.0])
    room = office()
    alone, fused = room.ask(gates=one, temperature=0.0), room.ask(temperature=0.0)
    assert alone.last.gates == (0.0, 1.0, 0.0)
    assert sum(fused.last.gates) == pytest.approx(1.0, abs=1e-5)
    assert max(fused.last.gates) < 1.0
    assert alone.text != fused.text


def test_a_text_stops_before_a_stop_string(office):
    room = office()
    whole = room.ask(temperature=0.0, tokens=20).text
    stop = whole[6:8]
    listener = room.ask(temperature=0.0, tokens=20, stop=(stop,))
    assert listener.text == whole[: whole.find(stop)]
    assert listener.last.finish == "stop"
    assert room.ask(tokens=3).last.finish == "length"


def test_who_cancels_makes_room_at_the_next_step(model, office):
    room = office(batch=HeldBatch(model), max_texts=1)
    first, second = room.ask(tokens=50), room.ask(tokens=2)
    wait_until(lambda: first.events, what="the first token")
    assert not second.events
    first.ticket.cancel()
    room.batch.allow(2)
    assert second.last.finish == "length"
    told = len(first.events)
    assert not first.ended.is_set() and told <= 2
    assert len(room.batch) == 0


def test_too_many_that_wait_are_refused_all_or_none(model, office):
    room = office(batch=HeldBatch(model), max_texts=1, max_waiting=2)
    first = room.ask(tokens=50)
    wait_until(lambda: first.events)
    waiting = [room.ask(tokens=1)]
    wanted = Generation((1,), Sampling(1))
    with pytest.raises(BusyError):
        room.scheduler.submit([wanted, wanted], [Listener(), Listener()])
    waiting.append(room.ask(tokens=1))
    with pytest.raises(BusyError):
        room.ask()
    room.batch.free()
    assert [one.last.finish for one in (first, *waiting)] == ["length"] * 3


def test_a_prompt_that_fails_fails_alone(office):
    room = office()
    good = room.ask(tokens=30)
    bad = room.ask(gates=torch.ones(2))
    assert "gates of shape" in bad.last.reason
    assert good.last.finish == "length"


def test_a_step_that_fails_ends_those_who_run_and_no_others(office, monkeypatch):
    room = office()
    read = room.batch._read

    def fail(texts, tokens):
        raise MemoryError("a text of somebody")

    monkeypatch.setattr(room.batch, "_read", fail)
    assert room.ask().last == Failure("MemoryError in the model")
    monkeypatch.setattr(room.batch, "_read", read)
    assert room.ask().last.finish == "length"
    assert len(room.batch) == 0


def test_numbers_that_are_none_end_the_text_that_has_them(office, monkeypatch):
    room = office()
    read_on = room.batch.read_on

    def break_long_ones(prompt):
        said = read_on(prompt)
        if said is not None and len(prompt.tokens) > 20:
            said.log_probs.fill_(torch.nan)
        return said

    monkeypatch.setattr(room.batch, "read_on", break_long_ones)
    good, bad = room.ask("short", tokens=20), room.ask("y" * 30)
    assert bad.last == Failure("the model's probabilities are not numbers")
    assert good.last.finish == "length"


def test_who_waits_is_told_when_the_scheduler_stops(model, office):
    room = office(batch=HeldBatch(model), max_texts=1)
    asked = [room.ask(tokens=50) for _ in range(3)]
    wait_until(lambda: asked[0].events)
    stopping = threading.Thread(target=room.scheduler.stop)
    stopping.start()
    room.batch.free()
    stopping.join(30)
    assert all(one.last.is_closing for one in asked)
    with pytest.raises(BusyError):
        room.ask()


def test_running_texts_go_on_while_a_long_prompt_is_read(office, monkeypatch):
    room = office(piece=7)
    order = []
    read_on, step = room.batch.read_on, room.batch.step
    monkeypatch.setattr(room.batch, "read_on", lambda p: order.append("read") or read_on(p))
    monkeypatch.setattr(room.batch, "step", lambda t: order.append("step") or step(t))
    first = room.ask("a", tokens=60)
    wait_until(lambda: first.events)
    room.ask("z" * 49, tokens=2).last  # noqa: B018
    between = order[order.index("read", 1) : len(order) - order[::-1].index("read")]
    assert between.count("read") == 7 and between.count("step") >= 6
