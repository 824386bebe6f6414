"""Bodies of the API's answers, as OpenAI's clients read them: whole, or in chunks."""

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from molora_fed.serving.models import ServedModel
from molora_fed.serving.requests import ChatRequest, TextRequest, Usage
from molora_fed.serving.scheduler import Piece, TokenChoice

__all__ = ["Answer", "build_answer"]

_LEAST = -9999.0
"""Stands for a log-probability that JSON cannot write, as with OpenAI."""


@dataclass
class _Choice:
    """One text so far."""

    text: list[str] = field(default_factory=list)
    choices: list[TokenChoice] = field(default_factory=list)
    num_tokens: int = 0
    offset: int = 0
    finish: str | None = None
    gates: tuple[float, ...] | None = None


class Answer(ABC):
    """An answer that is put together from pieces, to be sent whole or in chunks.

    Attributes:
        count: Texts of it.
    """

    prefix: str
    whole: str
    chunk: str

    def __init__(
        self, model: ServedModel, request: TextRequest, fingerprint: str, prompts: Sequence[int]
    ) -> None:
        """Begin.

        Args:
            model: The model.
            request: What was asked.
            fingerprint: Of the model.
            prompts: Tokens of each prompt.
        """
        self._model = model
        self._request = request
        self._prompt_tokens = sum(prompts)
        self.count = len(prompts) * (request.n or 1)
        self._choices = [_Choice() for _ in range(self.count)]
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": request.model,
            "system_fingerprint": f"molora-{fingerprint[:12]}",
        }

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(self._prompt_tokens, sum(choice.num_tokens for choice in self._choices))

    @property
    def is_whole(self) -> bool:
        """Whether every text has ended."""
        return all(choice.finish is not None for choice in self._choices)

    def add(self, index: int, piece: Piece) -> None:
        """Take a piece of a text in."""
        choice = self._choices[index]
        choice.num_tokens = piece.num_tokens
        choice.finish, choice.gates = piece.finish, piece.gates
        if not self._request.stream:
            choice.text.append(piece.text)
            choice.choices += piece.choices

    def as_body(self) -> dict[str, Any]:
        """The whole answer."""
        choices = []
        for index, choice in enumerate(self._choices):
            said = self._write_text("".join(choice.text))
            logprobs = self._write_choices(choice, choice.choices)
            choices.append(
                {"index": index, **said, "logprobs": logprobs, **self._write_end(choice)}
            )
        usage = self.usage.as_body()
        return {**self._head, "object": self.whole, "choices": choices, "usage": usage}

    def as_chunks(self, index: int, piece: Piece) -> Iterator[dict[str, Any]]:
        """Chunks that tell a piece, which was taken in."""
        choice = self._choices[index]
        logprobs = self._write_choices(choice, piece.choices)
        for delta, is_end in self._write_deltas(choice, piece):
            end = self._write_end(choice) if is_end else {"finish_reason": None}
            yield self._write_chunk([{"index": index, **delta, "logprobs": logprobs, **end}])
            logprobs = None

    def as_last_chunk(self) -> dict[str, Any] | None:
        """What counts the tokens, if that was asked for."""
        if not self._wants_usage:
            return None
        return {**self._write_chunk([]), "usage": self.usage.as_body()}

    @property
    def _wants_usage(self) -> bool:
        options = self._request.stream_options
        return options is not None and options.include_usage

    def _write_chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"usage": None} if self._wants_usage else {}
        return {**self._head, "object": self.chunk, "choices": choices, **usage}

    def _write_end(self, choice: _Choice) -> dict[str, Any]:
        end: dict[str, Any] = {"finish_reason": choice.finish}
        if self._request.molora_gates and choice.gates is not None:
            named = zip(self._model.experts, choice.gates, strict=True)
            end["molora_gates"] = {name: round(gate, 6) for name, gate in named}
        return end

    def _write_choices(self, choice: _Choice, chosen: Sequence[TokenChoice]) -> Any:
        if self._request.top is None:
            return None
        return self._write_logprobs(
            choice, [one for one in chosen if one.token not in self._model.ends]
        )

    @abstractmethod
    def _write_text(self, text: str) -> dict[str, Any]:
        """The field of a whole choice that holds its text."""

    @abstractmethod
    def _write_deltas(self, choice: _Choice, piece: Piece) -> Iterator[tuple[dict[str, Any], bool]]:
        """Fields of each chunk of a piece, and whether the text ends with it."""

    @abstractmethod
    def _write_logprobs(self, choice: _Choice, chosen: Sequence[TokenChoice]) -> Any:
        """Probabilities of tokens."""


class _Completion(Answer):
    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def _write_text(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _write_deltas(self, choice: _Choice, piece: Piece) -> Iterator[tuple[dict[str, Any], bool]]:
        yield {"text": piece.text}, piece.finish is not None

    def _write_logprobs(self, choice: _Choice, chosen: Sequence[TokenChoice]) -> Any:
        name = self._model.decode_token
        tokens = [name(one.token) for one in chosen]
        offsets = []
        for token in tokens:
            offsets.append(choice.offset)
            choice.offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [_bound(one.log_prob) for one in chosen],
            "top_logprobs": [
                # Best last, so that it stays where tokens, as parts of characters, look alike.
                {name(token): _bound(log_prob) for token, log_prob in reversed(one.top)}
                for one in chosen
            ],
            "text_offset": offsets,
        }


class _Chat(Answer):
    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._begun: set[int] = set()

    def _write_text(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _write_deltas(self, choice: _Choice, piece: Piece) -> Iterator[tuple[dict[str, Any], bool]]:
        if id(choice) not in self._begun:
            self._begun.add(id(choice))
            yield {"delta": {"role": "assistant", "content": piece.text}}, False
        elif piece.text:
            yield {"delta": {"content": piece.text}}, False
        if piece.finish is not None:
            yield {"delta": {}}, True

    def _write_logprobs(self, choice: _Choice, chosen: Sequence[TokenChoice]) -> Any:
        content = []
        for one in chosen:
            top = [self._write_token(token, log_prob) for token, log_prob in one.top]
            content.append({**self._write_token(one.token, one.log_prob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _write_token(self, token: int, log_prob: float) -> dict[str, Any]:
        text = self._model.decode_token(token)
        # A token may be a part of a character, whose bytes its text does not show.
        is_whole = "\N{REPLACEMENT CHARACTER}" not in text
        return {
            "token": text,
            "logprob": _bound(log_prob),
            "bytes": list(text.encode()) if is_whole else None,
        }


def build_answer(
    model: ServedModel, request: TextRequest, fingerprint: str, prompts: Sequence[int]
) -> Answer:
    """An answer of the kind that was asked for; see `Answer` for the arguments."""
    kind = _Chat if isinstance(request, ChatRequest) else _Completion
    return kind(model, request, fingerprint, prompts)


def _bound(log_prob: float) -> float:
    return max(log_prob, _LEAST)
