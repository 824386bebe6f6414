"""What may be asked of the API: the bodies of OpenAI's, and what is refused of them, by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, ValidationError, model_validator

from molora_fed.storage.settings import StrictModel
from molora_fed.storage.untrusted import clean

__all__ = ["ApiError", "ChatRequest", "CompletionRequest", "TextRequest", "parse_request"]

MAX_COPIES = 16
MAX_PROMPTS = 64
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 200
MAX_TOP = 20

_Id = Annotated[int, Field(ge=0)]
_Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "metadata": (None, {}),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "reasoning_effort": (None,),
    "response_format": (None, {"type": "text"}),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "verbosity": (None,),
    "web_search_options": (None,),
}
"""Parameters of OpenAI's that are not supported, with the values that ask for nothing."""


class ApiError(Exception):
    """A request that is answered with an error, in the form that OpenAI's clients read.

    Args:
        status: HTTP status.
        message: One line.
        param: The parameter that is wrong, if it is one.
        code: For programs.
        retry_seconds: When to try again, if that makes sense.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_seconds = retry_seconds

    def as_body(self) -> dict[str, Any]:
        """The body of the answer."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        usual = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": kinds.get(self.status, usual),
                "param": self.param,
                "code": self.code,
            }
        }


class _Request(StrictModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class StreamOptions(_Request):
    """How a stream is told.

    Attributes:
        include_usage: Whether a last chunk counts the tokens.
        include_obfuscation: Taken, and without effect: nothing is added to hide lengths.
    """

    include_usage: bool = False
    include_obfuscation: bool | None = None


class TextRequest(_Request):
    """What both kinds of requests have; see OpenAI's reference.

    Attributes:
        model: Name in /v1/models.
        max_tokens: Tokens to add at most.
        temperature: 0 takes the likeliest token.
        top_p: Keep the likeliest tokens that together reach this probability.
        n: Texts for each prompt.
        stop: Strings that end a text.
        seed: Same seed, same text.
        stream: Whether the text is told piece by piece.
        stream_options: How.
        user: Taken, and without effect.
        molora_gates: Whether the final choice says the mean gates by expert.
    """

    model: Annotated[str, Field(max_length=500)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_COPIES)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=MAX_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=500)] | None = None
    molora_gates: bool = False

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> "TextRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end a text."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def limit(self) -> int | None:
        """Tokens to add at most; None takes the usual number."""
        return self.max_tokens

    @property
    def top(self) -> int | None:
        """Likeliest tokens told beside each; None tells no probabilities."""
        raise NotImplementedError


class CompletionRequest(TextRequest):
    """Body of POST /v1/completions.

    Attributes:
        prompt: Texts or token ids; an empty text begins a new document.
        logprobs: Likeliest tokens told beside each.
    """

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[_Id], Field(min_length=1)]
        | Annotated[
            list[Annotated[list[_Id], Field(min_length=1)]],
            Field(min_length=1, max_length=MAX_PROMPTS),
        ]
    ) = ""
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, a text or ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    @property
    def top(self) -> int | None:
        """See `TextRequest`."""
        return self.logprobs


class TextPart(_Request):
    """A part of a message.

    Attributes:
        type: "text".
        text: The text.
    """

    type: Literal["text"]
    text: str


class Message(_Request):
    """A message of a chat.

    Attributes:
        role: Who said it.
        content: What, in one text or in parts.
        name: Of who said it; templates of some bases show it.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: Annotated[str, Field(max_length=100)] | None = None

    def as_template(self) -> dict[str, str]:
        """What a chat template reads."""
        parts = self.content
        text = parts if isinstance(parts, str) else "\n".join(part.text for part in parts)
        role = "system" if self.role == "developer" else self.role
        named = {} if self.name is None else {"name": self.name}
        return {"role": role, "content": text, **named}


class ChatRequest(TextRequest):
    """Body of POST /v1/chat/completions.

    Attributes:
        messages: The chat so far.
        max_completion_tokens: The newer name of `max_tokens`.
        logprobs: Whether probabilities are told.
        top_logprobs: Likeliest tokens told beside each.
    """

    messages: Annotated[list[Message], Field(min_length=1, max_length=1_000)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def limit(self) -> int | None:
        """See `TextRequest`."""
        newer = self.max_completion_tokens
        return self.max_tokens if newer is None else newer

    @property
    def top(self) -> int | None:
        """See `TextRequest`."""
        return (self.top_logprobs or 0) if self.logprobs else None


Body = TypeVar("Body", bound=TextRequest)


def parse_request(body: Any, kind: type[Body]) -> Body:
    """A request of its body's JSON.

    Raises:
        ApiError: If a parameter is not known, not supported or out of range; it is named.
    """
    if not isinstance(body, dict):
        raise ApiError(400, "Expected a JSON object.", code="invalid_json")
    for name in sorted(body.keys() & _NEUTRAL.keys()):
        if name not in kind.model_fields and body[name] not in _NEUTRAL[name]:
            raise ApiError(
                400,
                f"Parameter '{name}' is not supported. Leave it out.",
                param=name,
                code="unsupported_parameter",
            )
    known = {name: value for name, value in body.items() if name not in _NEUTRAL}
    try:
        return kind.model_validate(known)
    except ValidationError as error:
        raise _explain(error) from None


def _explain(error: ValidationError) -> ApiError:
    """Name the first parameter that is wrong; its value is not repeated."""
    item = error.errors(include_url=False, include_input=False)[0]
    place = [part for part in item["loc"] if isinstance(part, int) or part.isidentifier()]
    name = clean(".".join(map(str, place)), 80)
    if item["type"] == "extra_forbidden":
        return ApiError(
            400, f"Unknown parameter '{name}'. Leave it out.", param=name, code="unknown_parameter"
        )
    if item["type"] == "missing":
        return ApiError(
            400, f"Parameter '{name}' is missing.", param=name, code="missing_required_parameter"
        )
    message = clean(item["msg"].removeprefix("Value error, "))
    where = f"Parameter '{name}': {message}." if name else f"{message}."
    return ApiError(400, where, param=name or None, code="invalid_value")


@dataclass(frozen=True)
class Usage:
    """Tokens of a request.

    Attributes:
        prompt: Tokens read.
        completion: Tokens written.
    """

    prompt: int
    completion: int

    def as_body(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }
