"""Prompt templates: how a task, and examples before it, become what a model reads."""

from collections.abc import Sequence
from dataclasses import dataclass

from molora_fed.errors import CascadeError
from molora_fed.storage.files import canonical_json, hash_bytes

__all__ = ["DEFAULT_TEMPLATE", "PromptTemplate"]

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
