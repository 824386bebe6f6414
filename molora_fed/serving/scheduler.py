"""The thread that owns the model: prompts wait, are read in pieces, and are continued together.

Between two steps of the running texts at most one piece of prompts is read, so that nobody who is
being answered waits for a long prompt of somebody else. Whoever asked is told through a function
that is called in this thread.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from molora_fed.errors import MoloraError
from molora_fed.inference.generate import Sampling, choose_tokens, make_generator
from molora_fed.serving.batch import PIECE_TOKENS, Prediction, PromptReading, RunningBatch
from molora_fed.serving.streams import TextStream

__all__ = [
    "BusyError",
    "Event",
    "Failure",
    "Generation",
    "Observer",
    "Piece",
    "Scheduler",
    "Ticket",
    "TokenChoice",
]

FinishReason = Literal["stop", "length"]


class BusyError(Exception):
    """As many generations wait as may."""


@dataclass(frozen=True)
class Generation:
    """A prompt that is to be continued.

    Attributes:
        prompt: Its ids, at least one.
        sampling: How tokens are chosen; with one seed each copy has its own stream.
        stop: Strings that end a text.
        gates: Gates in place of the router's, (E,); None lets the router decide.
        copies: Texts that continue it.
        top: Likeliest tokens that are told beside each; None tells no probabilities.
    """

    prompt: tuple[int, ...]
    sampling: Sampling
    stop: tuple[str, ...] = ()
    gates: Tensor | None = None
    copies: int = 1
    top: int | None = None


@dataclass(frozen=True)
class TokenChoice:
    """A token that was chosen, and what the model thought of it.

    Attributes:
        token: Its id.
        log_prob: Its log-probability, nats.
        top: The likeliest tokens' ids and log-probabilities, best first.
    """

    token: int
    log_prob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Piece:
    """A piece of one text.

    Attributes:
        index: Which copy.
        text: What is certain now.
        num_tokens: Tokens behind the text so far.
        choices: Tokens chosen since the last piece, where probabilities are told.
        finish: Why it ended; None if it goes on.
        gates: Mean gates over all its tokens, (E,), with the last piece.
    """

    index: int
    text: str
    num_tokens: int
    choices: tuple[TokenChoice, ...] = ()
    finish: FinishReason | None = None
    gates: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Failure:
    """A generation that ended without its texts.

    Attributes:
        reason: One line.
        is_closing: Whether it had to end because the server does.
    """

    reason: str
    is_closing: bool = False


Event = Piece | Failure

Deliver = Callable[[Sequence[tuple["Ticket", Event]]], None]
"""Takes everything that one step has to tell, and calls `Ticket.emit` for each."""


class Observer:
    """Told what happens, for metrics; does nothing by itself."""

    def on_change(self, *, waiting: int, running: int) -> None:
        """How many generations wait, and how many texts run."""

    def on_prompt(self, num_tokens: int, waited_seconds: float) -> None:
        """A prompt was read; it waited and was read for this long."""

    def on_step(self, seconds: float, gates: Sequence[Tensor]) -> None:
        """One token of each running text was chosen, with these gates, each (E,)."""


@dataclass(eq=False)
class Ticket:
    """A generation under way; `cancel` may be called from any thread."""

    generation: Generation
    emit: Callable[[Event], None]
    since: float = field(default_factory=time.monotonic)
    is_cancelled: bool = False
    prompt: PromptReading | None = None
    running: int = 0

    def cancel(self) -> None:
        """Nobody waits for it any more: its place is free at the next step."""
        self.is_cancelled = True


@dataclass(eq=False)
class _Text:
    """A text that is being written."""

    ticket: Ticket
    index: int
    stream: TextStream
    generator: torch.Generator
    prediction: Prediction
    tokens: list[int] = field(default_factory=list)
    gates: Tensor | None = None
    choices: list[TokenChoice] = field(default_factory=list)


def _deliver_here(told: Sequence[tuple[Ticket, Event]]) -> None:
    """Tell it in the scheduler's own thread."""
    for ticket, event in told:
        ticket.emit(event)


class Scheduler:
    """Continues prompts, many at once, in a thread of its own.

    Attributes:
        deliver: Called in that thread once a step; it must not wait.
    """

    def __init__(
        self,
        batch: RunningBatch,
        tokenizer: Any,
        *,
        ends: frozenset[int],
        max_texts: int = 64,
        max_waiting: int = 128,
        piece: int = PIECE_TOKENS,
        threads: int | None = None,
        observer: Observer | None = None,
    ) -> None:
        """Prepare; `start` begins.

        Args:
            batch: Reads the texts; nobody else may use it, or its model.
            tokenizer: The base's, for this thread alone.
            ends: Tokens that end a text.
            max_texts: Texts that run at once.
            max_waiting: Generations that wait at once.
            piece: Tokens of prompts read between two steps.
            threads: Threads of torch; as it is set if None.
            observer: Told what happens.
        """
        self._batch = batch
        self._tokenizer = tokenizer
        self._ends = ends
        self.max_texts = max_texts
        self.max_waiting = max_waiting
        self._piece = piece
        self._threads = threads
        self._observer = observer or Observer()
        self._waiting: deque[Ticket] = deque()
        self._reading: deque[Ticket] = deque()
        self._texts: dict[int, _Text] = {}
        self._changed = threading.Condition()
        self._is_ending = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._last_seconds: deque[float] = deque(maxlen=32)
        self._told: list[tuple[Ticket, Event]] = []
        self.deliver: Deliver = _deliver_here

    # -- for other threads ------------------------------------------------------------------

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether it works."""
        return self._thread.is_alive()

    def submit(
        self, generations: Sequence[Generation], emits: Sequence[Callable[[Event], None]]
    ) -> list[Ticket]:
        """Queue generations, all of them or none.

        Args:
            generations: What is to be continued; each has at most `max_texts` copies.
            emits: Whom to tell of each; `deliver` calls them.

        Raises:
            BusyError: If too many wait, or it ends.
        """
        tickets = [Ticket(one, emit) for one, emit in zip(generations, emits, strict=True)]
        with self._changed:
            if self._is_ending or len(self._waiting) + len(tickets) > self.max_waiting:
                raise BusyError
            self._waiting += tickets
            self._changed.notify()
        return tickets

    def guess_wait_seconds(self) -> float:
        """How long a new generation may have to wait, by the last ones."""
        if not self._last_seconds:
            return 1.0
        mean = sum(self._last_seconds) / len(self._last_seconds)
        return max(1.0, mean * (1 + len(self._waiting)) / self.max_texts)

    def stop(self) -> None:
        """End now; whoever still waits is told. Returns when the thread has ended."""
        with self._changed:
            self._is_ending = True
            self._changed.notify()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    # -- in the thread ----------------------------------------------------------------------

    def _run(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        while True:
            with self._changed:
                while not (self._waiting or self._reading or self._texts or self._is_ending):
                    self._observer.on_change(waiting=0, running=0)
                    self._changed.wait()
                if self._is_ending:
                    break
            try:
                self._turn()
            except (
                Exception
            ) as error:  # whatever a model or a router raises; the next may fare well
                self._fail_running(_describe(error))
            self._flush()
        self._end()
        self._flush()

    def _turn(self) -> None:
        self._drop_cancelled()
        self._admit()
        self._read_prompts()
        self._write()
        waiting = len(self._waiting) + len(self._reading)
        self._observer.on_change(waiting=waiting, running=len(self._texts))

    def _tell(self, ticket: Ticket, event: Event) -> None:
        self._told.append((ticket, event))

    def _flush(self) -> None:
        """Hand over what is to be told, all at once: a thread that is woken often slows this."""
        if self._told:
            told, self._told = self._told, []
            self.deliver(told)

    def _drop_cancelled(self) -> None:
        with self._changed:
            if any(ticket.is_cancelled for ticket in self._waiting):
                self._waiting = deque(t for t in self._waiting if not t.is_cancelled)
        self._reading = deque(t for t in self._reading if not t.is_cancelled)
        gone = [row for row, text in self._texts.items() if text.ticket.is_cancelled]
        for row in gone:
            del self._texts[row]
        self._batch.leave(gone)

    def _admit(self) -> None:
        """Begin to read prompts for whose texts there is room, in the order they came."""
        taken = len(self._texts) + sum(ticket.generation.copies for ticket in self._reading)
        with self._changed:
            while self._waiting:
                copies = self._waiting[0].generation.copies
                if taken + copies > self.max_texts:
                    break
                taken += copies
                self._reading.append(self._waiting.popleft())

    def _read_prompts(self) -> None:
        """Read one piece's worth of tokens."""
        left = self._piece
        while self._reading and left > 0:
            ticket = self._reading[0]
            try:
                if ticket.prompt is None:
                    ticket.prompt = self._batch.begin(
                        ticket.generation.prompt, ticket.generation.gates
                    )
                before = ticket.prompt.tokens_left
                prediction = self._batch.read_on(ticket.prompt)
                left -= before - ticket.prompt.tokens_left
                if prediction is None:
                    continue
            except Exception as error:  # of this prompt alone
                self._reading.popleft()
                self._tell(ticket, Failure(_describe(error)))
                continue
            self._reading.popleft()
            waited = time.monotonic() - ticket.since
            self._observer.on_prompt(len(ticket.prompt.tokens), waited)
            self._begin_texts(ticket, prediction)

    def _begin_texts(self, ticket: Ticket, prediction: Prediction) -> None:
        assert ticket.prompt is not None
        wanted = ticket.generation
        ticket.running = wanted.copies
        for index, row in enumerate(self._batch.join(ticket.prompt, wanted.copies)):
            stream = TextStream(self._tokenizer, wanted.prompt, wanted.stop)
            generator = make_generator(wanted.sampling.seed, index)
            self._texts[row] = _Text(ticket, index, stream, generator, prediction)

    def _write(self) -> None:
        """Choose a token of every text, tell it, and read on."""
        if not self._texts:
            return
        started = time.monotonic()
        tokens = self._choose()
        used = [text.prediction.gates for text in self._texts.values()]
        for row, token in tokens.items():
            self._take(row, token)
        self._flush()  # while the model reads on, others may write what it said
        going_on = {row: tokens[row] for row in self._texts}
        if going_on:
            predictions = self._batch.step(going_on)
            for row, text in self._texts.items():
                text.prediction = predictions[row]
        self._observer.on_step(time.monotonic() - started, used)

    def _choose(self) -> dict[int, int]:
        """The next token of every text; those that sample alike are sampled together."""
        alike: dict[tuple[float, float], list[int]] = {}
        for row, text in self._texts.items():
            sampling = text.ticket.generation.sampling
            alike.setdefault((sampling.temperature, sampling.top_p), []).append(row)
        stacks = {}
        broken: list[int] = []
        for key, rows in alike.items():
            stacks[key] = torch.stack([self._texts[row].prediction.log_probs for row in rows])
            is_broken = stacks[key].isnan().any(-1).tolist()
            broken += [row for row, bad in zip(rows, is_broken, strict=True) if bad]
        if broken:
            self._fail(broken)
            return self._choose()
        tokens: dict[int, int] = {}
        for key, rows in alike.items():
            sampling = self._texts[rows[0]].ticket.generation.sampling
            generators = [self._texts[row].generator for row in rows]
            chosen = choose_tokens(stacks[key], sampling, generators)
            tokens |= dict(zip(rows, chosen.tolist(), strict=True))
        return tokens

    def _fail(self, rows: Sequence[int]) -> None:
        """End texts whose probabilities are no numbers, with their copies, and nobody else's."""
        tickets = dict.fromkeys(self._texts[row].ticket for row in rows)
        for row in [row for row, text in self._texts.items() if text.ticket in tickets]:
            self._remove(row)
        for ticket in tickets:
            self._tell(ticket, Failure("the model's probabilities are not numbers"))

    def _take(self, row: int, token: int) -> None:
        """Add a token to a text, tell what it made certain, and take the text out if it ended."""
        text = self._texts[row]
        wanted, prediction = text.ticket.generation, text.prediction
        text.tokens.append(token)
        gates = prediction.gates
        text.gates = gates.clone() if text.gates is None else text.gates + gates
        if wanted.top is not None:
            text.choices.append(_describe_choice(token, prediction.log_probs, wanted.top))
        finish: FinishReason | None = None
        said = ""
        if token in self._ends:
            finish = "stop"
        else:
            said = text.stream.add(token)
            if text.stream.is_stopped:
                finish = "stop"
            elif len(text.tokens) >= wanted.sampling.max_new_tokens:
                finish = "length"
        if finish is not None:
            said += text.stream.end()
        if not said and finish is None:
            return
        mean = None
        if finish is not None:
            mean = tuple((text.gates / len(text.tokens)).tolist())
            self._remove(row)
        choices, text.choices = tuple(text.choices), []
        self._tell(text.ticket, Piece(text.index, said, len(text.tokens), choices, finish, mean))

    def _remove(self, row: int) -> None:
        text = self._texts.pop(row)
        self._batch.leave([row])
        text.ticket.running -= 1
        if not text.ticket.running:
            self._last_seconds.append(time.monotonic() - text.ticket.since)

    def _fail_running(self, reason: str) -> None:
        """A step failed: nobody knows what the running texts' memory holds."""
        tickets = dict.fromkeys(text.ticket for text in self._texts.values())
        self._batch.leave(self._texts)
        self._texts.clear()
        for ticket in tickets:
            self._tell(ticket, Failure(reason))

    def _end(self) -> None:
        with self._changed:
            left = [*self._waiting, *self._reading, *(t.ticket for t in self._texts.values())]
            self._waiting.clear()
        self._reading.clear()
        self._batch.leave(self._texts)
        self._texts.clear()
        for ticket in dict.fromkeys(left):
            self._tell(ticket, Failure("the server stops", is_closing=True))
        self._observer.on_change(waiting=0, running=0)


def _describe(error: Exception) -> str:
    """One line for who asked; other errors than ours may quote what others wrote."""
    return str(error) if isinstance(error, MoloraError) else f"{type(error).__name__} in the model"


def _describe_choice(token: int, log_probs: Tensor, top: int) -> TokenChoice:
    best = log_probs.topk(min(top, len(log_probs)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return TokenChoice(token, float(log_probs[token]), tuple(pairs))
