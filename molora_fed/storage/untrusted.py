"""What comes from outside: text that may be shown, and JSON within bounds.

Names, messages and numbers of contributors, coordinators and endpoints pass through here once, at
the door. Behind it they are finite, bounded, and carry nothing that a terminal or a page obeys.
"""

import json
import math
import re
from typing import Any

__all__ = [
    "MAX_DEPTH",
    "MAX_SHOWN",
    "check_json",
    "clean",
    "clean_lines",
    "parse_json",
    "writable",
]

MAX_SHOWN = 200
"""Characters of one quoted thing."""
MAX_DEPTH = 32
"""Lists and objects inside one another."""
MIN_INTEGER, MAX_INTEGER = -(2**63), 2**64 - 1
"""Integers of 64 bits; what lies beyond has no place in a column, a record or a display."""
MAX_KEY = 512
"""Characters of a key; the longest names of tensors stay below."""

# C0 and C1 controls (escape sequences among them), surrogates, and what reorders or hides text:
# soft hyphen, zero-width and bidirectional controls, separators of lines, tags, interlinear marks.
_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


_BREAKS = re.compile("([\n\t])")


def clean(value: object, limit: int = MAX_SHOWN) -> str:
    """Text of anything from outside that a terminal, a page and a log may hold, in one line.

    White space becomes one space; characters that move the cursor, reorder or hide text, and halves
    of characters become "\N{REPLACEMENT CHARACTER}". Rich markup stays as it is: put it into a
    `Text`, never into a format string of markup.

    Args:
        value: Text, or what can be shown.
        limit: Characters that are kept; "…" stands for the rest.
    """
    if isinstance(value, int) and not MIN_INTEGER <= value <= MAX_INTEGER:
        return f"an integer of {value.bit_length()} bits"  # str() refuses 4,300 digits
    # Cut first: a text of megabytes is not worth a search.
    text = value[: 4 * limit + 4] if isinstance(value, str) else _show(value)[: 4 * limit + 4]
    text = _HIDDEN.sub("\N{REPLACEMENT CHARACTER}", " ".join(text.split()))
    return text if len(text) <= limit else text[: limit - 1] + "…"


def clean_lines(text: str) -> str:
    """Whole text from outside that may be shown; line breaks and tabs stay as they are."""
    pieces = _BREAKS.split(text)  # at even places what lies between line breaks and tabs
    pieces[::2] = [_HIDDEN.sub("\N{REPLACEMENT CHARACTER}", piece) for piece in pieces[::2]]
    return "".join(pieces)


def _show(value: object) -> str:
    try:
        return str(value)
    except (ValueError, RecursionError):  # integers of thousands of digits inside, deep lists
        return type(value).__name__


def writable(text: str) -> str:
    """Text whole; halves of characters, which UTF-8 cannot write, become escapes.

    For what is recorded and compared; `clean` is for what is shown.
    """
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def parse_json(data: bytes | str, *, max_bytes: int, max_depth: int = MAX_DEPTH) -> Any:
    """Read JSON from outside.

    Args:
        data: UTF-8, or text.
        max_bytes: Largest size that is read.
        max_depth: Lists and objects inside one another.

    Returns:
        Values whose numbers are finite and fit 64 bits, and whose texts can be written as UTF-8.

    Raises:
        ValueError: If it is larger, no JSON, deeper, or holds other values; a short text says what.
    """
    if len(data) > max_bytes:
        raise ValueError(f"more than {max_bytes:,} bytes")
    try:
        value = json.loads(data, parse_int=_parse_integer, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError(f"JSON deeper than {max_depth}") from None
    except UnicodeDecodeError:
        raise ValueError("bytes that are not UTF-8") from None
    except ValueError as error:
        raise ValueError(clean(error)) from None
    check_json(value, max_depth=max_depth)
    return value


def check_json(value: Any, *, max_depth: int = MAX_DEPTH) -> None:
    """Refuse values of JSON that could not be written again, or are out of bounds.

    Args:
        value: What a parser of JSON or TOML returned.
        max_depth: Lists and objects inside one another.

    Raises:
        ValueError: If it is too deep, a number is not finite or beyond 64 bits, a key is longer
            than 512 characters, or a text holds half a character; a short text says what.
    """
    level: list[Any] = [value]
    for depth in range(max_depth + 2):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                for key in item:
                    _check_key(key)
                below += item.values()
            elif isinstance(item, list):
                below += item
            else:
                _check_scalar(item)
        if not below:
            return
        if depth >= max_depth:
            break
        level = below
    raise ValueError(f"values deeper than {max_depth}")


def _check_key(key: Any) -> None:
    if not isinstance(key, str) or len(key) > MAX_KEY:
        raise ValueError(f"a key of more than {MAX_KEY} characters: {clean(key, 40)}")
    _check_scalar(key)


def _check_scalar(value: Any) -> None:
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ValueError("half a character (surrogate)") from None
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("a number that is not finite")
    elif isinstance(value, int):
        if not MIN_INTEGER <= value <= MAX_INTEGER:
            raise ValueError("an integer beyond 64 bits")
    elif value is not None:  # a date of TOML
        raise ValueError(f"a {type(value).__name__}, which JSON does not have")


def _parse_integer(text: str) -> int:
    if len(text) > 20:  # before int(), which takes quadratic time, and refuses 4,300 digits
        raise ValueError("an integer beyond 64 bits")
    return int(text)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name}, which is not JSON")
