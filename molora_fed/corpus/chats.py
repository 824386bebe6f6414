"""Chats as text: through the base's own chat template, or plainly where it has none."""

import datetime
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from molora_fed.corpus.raw_text import UnreadableError
from molora_fed.storage.untrusted import clean
from molora_fed.types import Document, Markup, Span

__all__ = ["has_template", "list_messages", "render_chat"]

MAX_MESSAGES = 2_000  # parts are found by rendering each beginning of a chat
_MAX_RENDERED = 1_000_000  # characters beside ten times those of the messages
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
}
_TODAY = datetime.date(2024, 7, 26)
"""What templates that write a date get: the same text every day."""
_FORMATS = ("%Y-%m-%d", "%d %b %Y", "%d %B %Y", "%B %d, %Y", "%d-%m-%Y", "%Y", "%B", "%b", "%d")
_CLOCK = (
    "{%- macro strftime_now(format) -%}{{ "
    + json.dumps({form: _TODAY.strftime(form) for form in _FORMATS})
    + f".get(format, '{_TODAY}') }}}}{{%- endmacro %}}"
)
"""Put before a template that asks for the time."""


def list_messages(value: Sequence[Any], where: str) -> list[dict[str, Any]]:
    """The messages of a chat, each with `role` and `content`.

    Both forms are read: `role` and `content`, or `from` and `value`; a content may be a list of
    parts of text.

    Raises:
        UnreadableError: If there is none, there are too many, or one is no message of text.
    """
    if not 0 < len(value) <= MAX_MESSAGES:
        raise UnreadableError(f"{where}: a chat of {len(value)} messages")
    return [_read_message(item, f"{where}, message {n}") for n, item in enumerate(value, 1)]


def _read_message(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise UnreadableError(f"{where}: no object but {type(item).__name__}")
    role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
    if not isinstance(role, str):
        raise UnreadableError(f"{where}: no 'role' with 'content', nor 'from' with 'value'")
    if isinstance(content, list):
        content = "".join(_read_part(part, where) for part in content)
    if content is None and item.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise UnreadableError(f"{where}: no text in its content but {type(content).__name__}")
    try:
        f"{role}{content}".encode()
    except UnicodeEncodeError as error:
        raise UnreadableError(f"{where}: half a character (surrogate)") from error
    # A table has every column in every row: what a message has not is null there.
    others = {
        key: kept
        for key, kept in item.items()
        if key not in ("role", "content", "from", "value") and kept is not None
    }
    return {**others, "role": _ROLES.get(role, role), "content": content}


def _read_part(part: Any, where: str) -> str:
    text = part.get("text") if isinstance(part, dict) else part
    if not isinstance(text, str):
        raise UnreadableError(f"{where}: a part that is no text")
    return text


def has_template(tokenizer: Any) -> bool:
    """Whether a base says how chats are written for it."""
    return bool(getattr(tokenizer, "chat_template", None))


def render_chat(
    name: str,
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    where: str,
    *,
    answers: bool,
) -> Document:
    """A chat as one document.

    The base's chat template decides where it has one. Its special tokens become tokens; the same
    characters in a message stay text. An end-of-text token at the very end is left out: packing
    puts one there. Without a template each message is its role, a colon and its content, with a
    blank line between them.

    Args:
        name: The document's name.
        messages: What `list_messages` returns.
        tokenizer: Hugging Face tokenizer of the base; None writes it plainly.
        where: Place in its file, for messages.
        answers: Whether the parts that the assistant says are found.

    Raises:
        UnreadableError: If the template refuses the chat, or changes what the assistant says so
            that it cannot be found.
    """
    if not has_template(tokenizer):
        return _render_plainly(name, messages, answers=answers)
    text = _render(tokenizer, messages, where)
    contents = _find_contents(text, messages)
    special = _find_special(text, messages, tokenizer, where)
    spans = _find_answers(text, messages, tokenizer, where) if answers else None
    end = tokenizer.eos_token
    stripped = text.rstrip()
    if end and special and stripped.endswith(end) and special[-1][1] == len(stripped):
        text = stripped.removesuffix(end)
        special = special[:-1]
    size = len(text)
    if spans is not None:
        spans = tuple((start, min(stop, size)) for start, stop in spans if start < size)
    return Document(name, text, Markup(special, _invert(contents, size), spans))


def _render_plainly(name: str, messages: Sequence[Mapping[str, Any]], *, answers: bool) -> Document:
    text = ""
    contents, spans = [], []
    for message in messages:
        text += f"{chr(10) * 2 if text else ''}{message['role'].capitalize()}: "
        span = (len(text), len(text) + len(message["content"]))
        text += message["content"]
        if message["role"] != "system":
            contents.append(span)
        if message["role"] == "assistant":
            spans.append(span)
    found = tuple(spans) if answers else None
    return Document(name, text, Markup((), _invert(contents, len(text)), found))


def _render(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], where: str, *, ask: bool = False
) -> str:
    try:
        template = tokenizer.get_chat_template()
        text = tokenizer.apply_chat_template(
            list(messages),
            chat_template=_CLOCK + template if "strftime_now" in template else template,
            tokenize=False,
            add_generation_prompt=ask,
            date_string=f"{_TODAY:%d %b %Y}",
        )
    except Exception as error:  # whatever a template of others does
        raise UnreadableError(f"{where}: the base's chat template: {clean(error, 120)}") from error
    most = _MAX_RENDERED + 10 * sum(len(message["content"]) for message in messages)
    if not isinstance(text, str) or len(text) > most:
        raise UnreadableError(f"{where}: the base's chat template makes too much text of it")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # of a field beside role and content
        raise UnreadableError(f"{where}: half a character (surrogate)") from error
    return text


def _find_contents(text: str, messages: Sequence[Mapping[str, Any]]) -> list[Span]:
    """Where the messages' contents are, those of the system left out; templates may strip them."""
    spans, cursor = [], 0
    for message in messages:
        content = message["content"].strip()
        start = text.find(content, cursor)
        if start < 0 or not content:
            continue
        cursor = start + len(content)
        if message["role"] != "system":
            spans.append((start, cursor))
    return spans


def _invert(spans: Sequence[Span], size: int) -> tuple[Span, ...]:
    """What lies between the spans."""
    starts = [0, *(min(end, size) for _, end in spans)]
    ends = [*(min(start, size) for start, _ in spans), size]
    return tuple((start, end) for start, end in zip(starts, ends, strict=True) if start < end)


def _find_special(
    text: str, messages: Sequence[Mapping[str, Any]], tokenizer: Any, where: str
) -> tuple[Span, ...]:
    """Where the template put special tokens; those that contents spell out are text.

    Raises:
        UnreadableError: If a message spells one out elsewhere, where it would look like the
            template's, or the template changes a content that does.
    """
    tokens = sorted(
        (token.content for token in tokenizer.added_tokens_decoder.values() if token.special),
        key=lambda token: (-len(token), token),
    )
    if not tokens:
        return ()
    pattern = re.compile("|".join(map(re.escape, tokens)))
    quoted, cursor = [], 0
    for message in messages:
        if any(pattern.search(text) for text in _list_other_texts(message)):
            raise UnreadableError(f"{where}: a special token beside a message's content")
        content = message["content"].strip()
        if pattern.search(content):
            start = text.find(content, cursor)
            if start < 0:
                raise UnreadableError(f"{where}: a special token that the template moves")
            cursor = start + len(content)
            quoted.append((start, cursor))
    found = (match.span() for match in pattern.finditer(text))
    return tuple(
        (start, end) for start, end in found if not any(a < end and start < b for a, b in quoted)
    )


def _list_other_texts(message: Mapping[str, Any]) -> Iterator[str]:
    """Every text of a message but its content: role, names, what tools are asked."""
    level: list[Any] = [message[key] for key in message if key != "content"]
    while level:
        value = level.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            level += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            level += value


def _find_answers(
    text: str,
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    where: str,
) -> tuple[Span, ...]:
    """Where the assistant speaks: from where a reply is asked for to where it ends.

    The token that ends a reply belongs to it. Where a template writes a chat's beginning otherwise
    than the same part of the whole, only the content itself counts.

    Raises:
        UnreadableError: If that is not found, either.
    """
    spans: list[Span] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:index], where, ask=True) if index else None
        after = _render(tokenizer, messages[: index + 1], where)
        if before and before != after and after.startswith(before) and text.startswith(after):
            spans.append((len(before), len(after.rstrip())))
            continue
        content = message["content"].strip()
        start = text.find(content, spans[-1][1] if spans else 0)
        if start < 0:
            raise UnreadableError(
                f"{where}: the base's chat template changes what the assistant says; take "
                "--loss-on all"
            )
        if content:
            spans.append((start, start + len(content)))
    return tuple(spans)
