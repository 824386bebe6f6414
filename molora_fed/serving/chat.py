"""A conversation with a model in this process: turns, the room they have, who answers."""

import queue
from collections.abc import Generator

from molora_fed.errors import ConfigError
from molora_fed.inference.fused_lm import FusedForCausalLM
from molora_fed.inference.generate import Sampling
from molora_fed.serving.batch import RunningBatch
from molora_fed.serving.models import ServedModel
from molora_fed.serving.requests import ApiError
from molora_fed.serving.scheduler import Event, Failure, Generation, Scheduler
from molora_fed.types import ExpertsPerText

__all__ = ["Chat"]


class Chat:
    """Turns with a model, through the base's chat template; without one, a text that goes on.

    Attributes:
        name: Who answers.
        gates: Mean gates by expert of the last answer; empty before there is one.
        forgotten: Turns left out of the last prompt, because the model reads no more.
    """

    def __init__(
        self,
        model: FusedForCausalLM,
        *,
        system: str = "",
        max_new_tokens: int = 256,
        temperature: float = 0.7,
        top_p: float = 1.0,
        seed: int = 0,
        experts_per_text: ExpertsPerText | None = None,
    ) -> None:
        """Begin; `close` ends.

        Args:
            model: The model.
            system: What it is told before the chat.
            max_new_tokens: Tokens of an answer.
            temperature: 0 takes the likeliest token.
            top_p: Keep the likeliest tokens that together reach this probability.
            seed: Of sampling; each answer has its own stream.
            experts_per_text: Who goes on after what was said; see `RunningBatch`.

        Raises:
            ConfigError: If an option is out of range.
            RoutingError: If there is no such way to go on.
        """
        self._sampling = Sampling(max_new_tokens, temperature, top_p=top_p, seed=seed)
        self._model = ServedModel(model)
        self._system = system
        self._turns: list[dict[str, str]] = []
        self._answers = 0
        self.name = self._model.name
        self.gates: dict[str, float] = {}
        self.forgotten = 0
        self._scheduler = Scheduler(
            RunningBatch(model, experts_per_text=experts_per_text),
            self._model.copy_tokenizer(),
            ends=self._model.ends,
            max_texts=1,
        )
        self._scheduler.start()

    @property
    def names(self) -> tuple[str, ...]:
        """Who can answer."""
        return tuple(self._model.gates)

    @property
    def has_template(self) -> bool:
        """Whether turns are told apart; else a text goes on."""
        return self._model.has_chat_template

    def choose(self, name: str) -> None:
        """Let another answer from now on.

        Raises:
            ConfigError: If nobody has this name.
        """
        if name not in self._model.gates:
            raise ConfigError(
                f"Cannot let '{name}' answer: expected one of {', '.join(self.names)}. "
                "Choose one of these."
            )
        self.name = name

    def reset(self) -> None:
        """Forget all turns."""
        self._turns = []

    def answer(self, text: str) -> Generator[str, None, None]:
        """Pieces of the answer while it is written; what was said when it is closed is kept.

        Args:
            text: What the user says.

        Raises:
            ConfigError: If there is no room for it, or the template refuses it.
            RuntimeError: If the model failed.
        """
        self._turns.append({"role": "user", "content": text})
        try:
            prompt = self._encode()
        except ConfigError:
            self._turns.pop()
            raise
        room = self._find_room(prompt)
        self._answers += 1
        sampling = Sampling(
            min(self._sampling.max_new_tokens, room),
            self._sampling.temperature,
            top_p=self._sampling.top_p,
            seed=self._sampling.seed + self._answers - 1,
        )
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        wanted = Generation(prompt, sampling, gates=self._model.gates[self.name])
        (ticket,) = self._scheduler.submit([wanted], [events.put])
        said: list[str] = []
        try:
            while True:
                event = events.get()
                if isinstance(event, Failure):
                    raise RuntimeError(event.reason)
                said.append(event.text)
                yield event.text
                if event.finish is not None:
                    assert event.gates is not None
                    self.gates = dict(zip(self._model.experts, event.gates, strict=True))
                    return
        finally:
            ticket.cancel()
            self._turns.append({"role": "assistant", "content": "".join(said)})

    def close(self) -> None:
        """End."""
        self._scheduler.stop()

    def _find_room(self, prompt: tuple[int, ...]) -> int:
        """Tokens that fit after a prompt."""
        positions = self._model.max_positions
        return self._sampling.max_new_tokens if positions is None else positions - len(prompt)

    def _encode(self) -> tuple[int, ...]:
        """The prompt; the oldest turns are left out as long as there is little room.

        Raises:
            ConfigError: If not even the last turn fits.
        """
        positions = self._model.max_positions
        wanted = 1 if positions is None else min(self._sampling.max_new_tokens, positions // 4)
        # Turns go in pairs, so that the first that is left is the user's.
        for first in range(0, len(self._turns), 2):
            prompt = self._encode_from(first)
            self.forgotten = first
            if self._find_room(prompt) >= wanted:
                return prompt
        if self._find_room(prompt) < 1:
            raise ConfigError(
                f"Cannot answer: expected at most {positions} tokens, got {len(prompt)}. Say less."
            )
        return prompt

    def _encode_from(self, first: int) -> tuple[int, ...]:
        turns = self._turns[first:]
        if not self.has_template:
            texts = [self._system, *(turn["content"] for turn in turns)]
            return self._model.encode("".join(texts))
        system = [{"role": "system", "content": self._system}] if self._system else []
        try:
            return self._model.encode_chat([*system, *turns])
        except ApiError as error:
            raise ConfigError(error.message) from None
