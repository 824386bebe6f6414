"""The TOML file that describes a cascade, `[cascade]` and `[models.NAME]`, and its templates."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from molora_fed.errors import CascadeError
from molora_fed.storage.files import canonical_json, hash_bytes
from molora_fed.storage.settings import StrictModel, describe_offenders
from molora_fed.storage.toml import parse_toml

__all__ = [
    "DEFAULT_TEMPLATE",
    "BaseSource",
    "CascadeConfig",
    "EndpointSource",
    "EvolvedSource",
    "FusedSource",
    "ModelSource",
    "PromptTemplate",
    "SpecialistSource",
    "load_config",
]


_PROMPT, _EXAMPLES, _ANSWER = "{prompt}", "{examples}", "{answer}"


@dataclass(frozen=True)
class PromptTemplate:
    """Text with places for a task's prompt and for solved examples.

    Places are replaced as they stand, so that braces elsewhere mean nothing.

    Attributes:
        text: Holds {prompt} once, and {examples} at most once; without it, examples come first.
        example: One solved example, with {prompt} and {answer}.
    """

    text: str = _PROMPT
    example: str = "{prompt}{answer}\n"

    def __post_init__(self) -> None:
        """Refuse templates without their places.

        Raises:
            CascadeError: If a place is missing or comes twice.
        """
        counts = {
            "{prompt} once in the template": self.text.count(_PROMPT) == 1,
            "{examples} at most once": self.text.count(_EXAMPLES) <= 1,
            "{prompt} once in an example": self.example.count(_PROMPT) == 1,
            "{answer} once in an example": self.example.count(_ANSWER) == 1,
        }
        broken = [rule for rule, holds in counts.items() if not holds]
        if broken:
            raise CascadeError(
                f"Cannot use prompt template '{self.text[:60]}': expected {', '.join(broken)}, "
                "got something else. Correct [cascade] template or example."
            )

    @property
    def hash(self) -> str:
        """SHA-256 over template and example, lower-case hex."""
        return hash_bytes(canonical_json([self.text, self.example]))

    def render(self, prompt: str, examples: Sequence[tuple[str, str]] = ()) -> str:
        """What a model reads.

        Args:
            prompt: The task's.
            examples: Prompts and answers of solved tasks, in order.
        """
        text = self.text if _EXAMPLES in self.text else _EXAMPLES + self.text
        before, _, after = text.partition(_EXAMPLES)
        shown = "".join(self._render_example(*one) for one in examples)
        # The text of tasks is put in last, so that braces in it are never taken for places.
        return before.replace(_PROMPT, prompt) + shown + after.replace(_PROMPT, prompt)

    def _render_example(self, prompt: str, answer: str) -> str:
        first, _, rest = self.example.partition(_PROMPT)
        if _ANSWER in first:
            return first.replace(_ANSWER, answer) + prompt + rest
        return first + prompt + rest.replace(_ANSWER, answer)


DEFAULT_TEMPLATE = PromptTemplate()
"""The prompt as it is."""


MAX_CONFIG_BYTES = 1_000_000
MAX_SAMPLES = 16

_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")]


class BaseSource(StrictModel):
    """A checkpoint as it is.

    Attributes:
        kind: "base".
        path: Its folder, or a cooperative's.
    """

    kind: Literal["base"]
    path: Path


class SpecialistSource(StrictModel):
    """A specialist: of a ledger, or of a folder.

    Attributes:
        kind: "specialist".
        cooperative: Folder of the cooperative whose ledger holds it.
        contributor: Whose admitted contribution it is; needed with `cooperative`.
        path: Folder of an adapter, or that `molora train` wrote; instead of `cooperative`.
        base: Folder of its base; needed with `path`.
    """

    kind: Literal["specialist"]
    cooperative: Path | None = None
    contributor: str | None = None
    path: Path | None = None
    base: Path | None = None

    @model_validator(mode="after")
    def _is_one_of_two(self) -> "SpecialistSource":
        of_ledger = self.cooperative is not None and self.contributor is not None
        of_folder = self.path is not None and self.base is not None
        given = sum(
            one is not None for one in (self.cooperative, self.contributor, self.path, self.base)
        )
        if given != 2 or not (of_ledger or of_folder):
            raise ValueError("needs cooperative and contributor, or path and base")
        return self


class FusedSource(StrictModel):
    """A fused model.

    Attributes:
        kind: "fused".
        path: Its folder, or one that holds it, such as a cooperative's.
        base: Folder of its base, if it is elsewhere than recorded.
    """

    kind: Literal["fused"]
    path: Path
    base: Path | None = None


class EvolvedSource(StrictModel):
    """An evolved model.

    Attributes:
        kind: "evolved".
        path: Its folder, or one that holds it, such as a cooperative's.
        base: Folder of its base, if it is elsewhere than recorded.
    """

    kind: Literal["evolved"]
    path: Path
    base: Path | None = None


class EndpointSource(StrictModel):
    """A model behind an OpenAI-compatible HTTP endpoint.

    Attributes:
        kind: "endpoint".
        url: Address up to and without "/chat/completions" or "/completions".
        model: Name the endpoint knows it by.
        api: "chat" or "completions".
        api_key_env: Environment variable with the key; the key itself is never written.
        timeout_seconds: Of connecting, and of every wait for bytes.
        deadline_seconds: Of one try as a whole.
        retries: Tries after the first.
        backoff_seconds: Wait before the first retry; doubles every time.
        max_wait_seconds: Longest wait, also where the endpoint asks for more.
        max_answer_bytes: More of an answer is not read.
        max_text_characters: A longer text is a failure.
        parallel: Samples asked at once.
        price_per_million_prompt: Per million tokens read.
        price_per_million_new: Per million tokens written.
        send_seed: Whether to send "seed"; not every endpoint accepts it.
    """

    kind: Literal["endpoint"]
    url: str = Field(pattern=r"^https?://[^\s]+$")
    model: str = Field(min_length=1, max_length=200)
    api: Literal["chat", "completions"] = "chat"
    api_key_env: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    timeout_seconds: float = Field(default=30.0, gt=0, le=3_600)
    deadline_seconds: float = Field(default=120.0, gt=0, le=3_600)
    retries: int = Field(default=2, ge=0, le=10)
    backoff_seconds: float = Field(default=0.5, ge=0, le=60)
    max_wait_seconds: float = Field(default=30.0, ge=0, le=600)
    max_answer_bytes: int = Field(default=2**20, ge=1_024, le=16 * 2**20)
    max_text_characters: int = Field(default=32_768, ge=1, le=32_768)
    parallel: int = Field(default=4, ge=1, le=64)
    price_per_million_prompt: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    price_per_million_new: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    send_seed: bool = True

    @field_validator("url")
    @classmethod
    def _holds_no_secret(cls, url: str) -> str:
        if "@" in url or "?" in url:
            raise ValueError("must hold neither a password nor a query; use api_key_env")
        return url.rstrip("/")


ModelSource = Annotated[
    BaseSource | SpecialistSource | FusedSource | EvolvedSource | EndpointSource,
    Field(discriminator="kind"),
]


class RetrievalConfig(StrictModel):
    """Examples before a prompt; absent by default.

    Attributes:
        examples: JSON lines with id, prompt and answer.
        threshold: Least similarity.
        count: How many at most.
    """

    examples: Path
    threshold: float = Field(default=0.7, ge=0, le=1)
    count: int = Field(default=3, ge=1, le=32)


# What a cascade that leaves these keys out has always meant.
_UNNAMED_POLICY = "sigma"
_UNNAMED_JUDGE = "majority"


class CascadeSection(StrictModel):
    """`[cascade]`.

    Attributes:
        probe: Name of the probe; without one every member is always asked.
        members: Names in the order in which they are asked.
        samples: Samples of the probe.
        policy: Registered escalation policy.
        policy_options: Its options.
        judge: Registered judge.
        judge_options: Its options.
        temperature: Of the probe.
        member_temperature: Of members.
        max_new_tokens: Of every sample.
        stop: Texts that end a sample.
        seed: Of the run.
        template: Prompt template.
        example: Template of a retrieved example.
        retrieval: Where examples come from.
    """

    probe: _Name | None = None
    members: tuple[_Name, ...] = Field(default=(), max_length=16)
    samples: int = Field(default=3, ge=1, le=MAX_SAMPLES)
    policy: str = _UNNAMED_POLICY
    policy_options: dict[str, Any] = Field(default={})
    judge: str = _UNNAMED_JUDGE
    judge_options: dict[str, Any] = Field(default={})
    temperature: float = Field(default=0.7, ge=0, le=10)
    member_temperature: float = Field(default=0.0, ge=0, le=10)
    max_new_tokens: int = Field(default=64, ge=1, le=65_536)
    stop: tuple[str, ...] = Field(default=(), max_length=8)
    seed: int = Field(default=0, ge=0, lt=2**31)
    template: str = Field(default="{prompt}", max_length=65_536)
    example: str = Field(default="{prompt}{answer}\n", max_length=65_536)
    retrieval: RetrievalConfig | None = None


class CascadeConfig(StrictModel):
    """The whole file.

    Attributes:
        cascade: `[cascade]`.
        models: `[models.NAME]`; what is neither probe nor member may be asked by the judge.
    """

    cascade: CascadeSection
    models: dict[_Name, ModelSource] = Field(min_length=1, max_length=32)


def load_config(path: Path) -> CascadeConfig:
    """Read the description of a cascade; paths in it are relative to its folder.

    Args:
        path: TOML file.

    Raises:
        CascadeError: If it is missing, too large, malformed, or holds unknown keys.
    """
    what = f"Cannot read cascade '{path}'"
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"more than {MAX_CONFIG_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
        found = CascadeConfig.model_validate(parse_toml(text, max_bytes=MAX_CONFIG_BYTES))
    except ValidationError as error:
        offenders = describe_offenders(error, whole="cascade")
        raise CascadeError(
            f"{what}: expected only known keys with valid values, got {offenders}. Correct these."
        ) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CascadeError(f"{what}: expected a TOML file, got {reason}. Check it.") from error
    return found
