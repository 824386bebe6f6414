"""Records of JSON, tables and data sets: which field is text, how an instruction becomes one."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from molora_fed.corpus.chats import list_messages, render_chat
from molora_fed.corpus.raw_text import UnreadableError
from molora_fed.errors import ConfigError
from molora_fed.storage.untrusted import clean
from molora_fed.types import Document, LossOn, Markup

__all__ = ["RecordReader", "TextOptions", "check_text", "choose_columns", "parse_record"]

_TEXT = ("text",)
_CHATS = ("messages", "conversations", "conversation")
_PROMPTS = ("instruction", "prompt", "question", "query")
_CONTEXTS = ("input", "context")
_RESPONSES = ("output", "response", "completion", "answer")
_TEXTS = (
    "content", "body", "document", "article", "passage", "page_content", "raw_content",
    "markdown", "code",
)  # fmt: skip
_SHOWN_FIELDS = 12
_MAX_DIGITS = 20


@dataclass(frozen=True)
class TextOptions:
    """How text is found in records and which of its tokens are learned.

    Attributes:
        text_field: Field that holds the text or the chat, "a.b" for field b of the object a; empty
            finds it by name.
        loss_on: Tokens that count in the training loss: "all", or "assistant", only those of
            the assistant's messages and of responses to instructions.

    Raises:
        ConfigError: If `loss_on` is another word.
    """

    text_field: str = ""
    loss_on: LossOn = "all"

    def __post_init__(self) -> None:
        if self.loss_on not in get_args(LossOn):
            raise ConfigError(
                f"Cannot train with the loss on '{clean(self.loss_on)}': expected one of "
                f"{', '.join(get_args(LossOn))}, got another word. Choose one of these."
            )


def check_text(value: object, where: str, field: str = "text") -> str:
    """A record's text.

    Raises:
        UnreadableError: If it is no text, or holds half characters that no encoding can write.
    """
    if not isinstance(value, str):
        raise UnreadableError(f"{where}: no text in field '{field}' but {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UnreadableError(f"{where}: half a character (surrogate)") from error
    return value


def parse_record(line: str, where: str) -> Any:
    """A value of JSON; beside a text anything may stand.

    Raises:
        UnreadableError: If it is no JSON, or too deep.
    """
    try:
        # Digits without end take quadratic time to read.
        return json.loads(line, parse_int=_parse_integer, parse_float=_parse_number)
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"{where}: no JSON object") from error


def _parse_integer(digits: str) -> int | str:
    return int(digits) if len(digits) <= _MAX_DIGITS else digits


def _parse_number(digits: str) -> float | str:
    return float(digits) if len(digits) <= _MAX_DIGITS else digits


def choose_columns(names: Iterable[str], options: TextOptions) -> list[str]:
    """The columns of a table that its text is made of; no others are unpacked.

    Raises:
        UnreadableError: If there are none.
    """
    names, text_field = list(names), options.text_field
    if text_field:
        found = [name for name in names if name in (text_field, text_field.split(".")[0])]
    elif options.loss_on == "all" and "text" in names:
        found = ["text"]
    else:
        known = {*_TEXT, *_CHATS, *_PROMPTS, *_CONTEXTS, *_RESPONSES, *_TEXTS}
        found = [name for name in names if name in known]
    if not found:
        raise UnreadableError(_describe_missing("column", names, text_field))
    return found


def _describe_missing(kind: str, names: Iterable[str], text_field: str) -> str:
    names = [clean(name, 40) for name in names]
    shown = ", ".join(names[:_SHOWN_FIELDS]) + (", …" if len(names) > _SHOWN_FIELDS else "")
    if text_field:
        return f"no {kind} '{clean(text_field, 80)}' among {shown or 'none'}"
    return f"no {kind} of text among {shown or 'none'}; name it with --text-field"


class RecordReader:
    """Makes documents of records.

    Fields are looked up in a fixed order: `text`; a chat in `messages` or `conversations`; an
    instruction or a question with its response; `content`, `body` and other names of text.
    Where only answers are learned, chats and instructions come first.

    Attributes:
        options: Which field, and which tokens are learned.

    Args:
        options: See above.
        tokenizer: Hugging Face tokenizer of the base, whose chat template is used; None writes
            chats plainly.
    """

    def __init__(self, options: TextOptions, tokenizer: Any = None) -> None:
        self.options = options
        self._answers = options.loss_on == "assistant"
        self._tokenizer = tokenizer

    def read(self, name: str, record: Any, where: str) -> Document:
        """The document of a record.

        Args:
            name: Its name.
            record: A value of JSON.
            where: Place in its file, for messages.

        Raises:
            UnreadableError: If it is no object, or holds no text.
        """
        if not isinstance(record, dict):
            raise UnreadableError(f"{where}: no JSON object but {type(record).__name__}")
        if self.options.text_field:
            return self._read_field(name, self._find(record, where), where, self.options.text_field)
        structured = (self._read_chat, self._read_instruction)
        plain = (self._read_text,)
        for read in (*structured, *plain) if self._answers else (*plain, *structured):
            document = read(name, record, where)
            if document is not None:
                return document
        for field in _TEXTS:
            if field in record:
                return self._read_field(name, record[field], where, field)
        raise UnreadableError(f"{where}: {_describe_missing('field', record, '')}")

    def _find(self, record: Mapping[str, Any], where: str) -> Any:
        """The value of the field that was named."""
        if self.options.text_field in record:
            return record[self.options.text_field]
        value: Any = record
        for part in self.options.text_field.split("."):
            if not isinstance(value, dict) or part not in value:
                raise UnreadableError(
                    f"{where}: {_describe_missing('field', record, self.options.text_field)}"
                )
            value = value[part]
        return value

    def _read_field(self, name: str, value: Any, where: str, field: str) -> Document:
        if isinstance(value, list):
            return self._render(name, value, where)
        return Document(name, check_text(value, where, clean(field, 80)))

    def _read_text(self, name: str, record: Mapping[str, Any], where: str) -> Document | None:
        if "text" not in record:
            return None
        return Document(name, check_text(record["text"], where))

    def _read_chat(self, name: str, record: Mapping[str, Any], where: str) -> Document | None:
        for field in _CHATS:
            if isinstance(record.get(field), list):
                return self._render(name, record[field], where)
        return None

    def _render(self, name: str, value: list[Any], where: str) -> Document:
        messages = list_messages(value, where)
        return render_chat(name, messages, self._tokenizer, where, answers=self._answers)

    def _read_instruction(
        self, name: str, record: Mapping[str, Any], where: str
    ) -> Document | None:
        """Prompt, context and response, a blank line between them.

        Where one side of a joint has white space already, nothing is put between: completions
        that begin with a space are continuations.
        """
        prompt = next((field for field in _PROMPTS if field in record), None)
        # Beside a prompt a context may be empty; without one it is the prompt.
        context = next((f for f in _CONTEXTS if f in record and (not prompt or record[f])), None)
        response = next((field for field in _RESPONSES if field in record), None)
        if response is None or (prompt is None and context is None):
            return None
        given = [record[field] for field in (prompt, context) if field is not None]
        if isinstance(given[0], list) and isinstance(record[response], list):
            return self._render(name, [*given[0], *record[response]], where)
        text = ""
        for field in (prompt, context):
            if field is not None:
                text = _join(text, check_text(record[field], where, field))
        joined = _join(text, check_text(record[response], where, response))
        start = len(joined) - len(record[response])
        answers = ((start, len(joined)),) if self._answers else None
        return Document(name, joined, Markup(answers=answers) if answers else None)


def _join(first: str, second: str) -> str:
    if not first or not second or first[-1].isspace() or second[0].isspace():
        return first + second
    return f"{first}\n\n{second}"
