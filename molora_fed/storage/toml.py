"""TOML from outside: looked over in one pass before it is parsed.

`tomllib` takes memory that grows with the square of a dotted key's parts, and recurses into arrays
and inline tables; text of a few hundred kilobytes can take all memory there is.
"""

import re
import tomllib
from typing import Any

from molora_fed.storage.untrusted import MAX_DEPTH, MAX_KEY, check_json, clean

__all__ = ["parse_toml"]

MAX_KEYS = 20_000
"""Keys and tables of one file."""
MAX_PARTS = 16
"""Parts of a dotted key or of a table's name."""

# What can hide structure: strings of all four sorts, and comments. An unfinished one is taken to
# the end of its line or text, so that the time is linear whatever the text.
_TOKEN = re.compile(
    r'"""(?:[^\\"]|\\.|"(?!""))*+(?:""""?"?|\Z)'
    r"|'''(?:[^']|'(?!''))*+(?:'''(?:'{0,2})|\Z)"
    r'|"(?:[^"\\\n]|\\[^\n])*+(?:"|\\?(?=\n)|\\?\Z)'
    r"|'[^'\n]*+(?:'|(?=\n)|\Z)"
    r"|#[^\n]*"
    r"|[\[\]{}=,\n]"
    r"""|[^"'#\[\]{}=,\n]+""",
    re.DOTALL,
)


def parse_toml(text: str, *, max_bytes: int, max_depth: int = MAX_DEPTH) -> dict[str, Any]:
    """Read TOML from outside, in time and memory linear in its length.

    Args:
        text: The file's.
        max_bytes: Largest text that is read, in characters.
        max_depth: Tables and lists inside one another.

    Returns:
        Values that JSON can hold: numbers finite and within 64 bits, no dates.

    Raises:
        ValueError: If it is larger, no TOML, deeper, has too many or too long keys, or holds other
            values; a short text says what.
    """
    if len(text) > max_bytes:
        raise ValueError(f"more than {max_bytes:,} bytes")
    _look_over(text, max_depth)
    try:
        value = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(clean(error)) from None
    check_json(value, max_depth=max_depth)
    return value


def _look_over(text: str, max_depth: int) -> None:
    """Refuse what a parser would choke on."""
    depth = keys = parts = length = 0
    at_start = True
    for match in _TOKEN.finditer(text):
        token = match[0]
        first = token[0]
        if first == "#":
            continue
        if first in "[]{}=,\n":
            keys += first == "=" or (first == "[" and at_start)
            depth = max(0, depth + (first in "[{") - (first in "]}"))
            if keys > MAX_KEYS:
                raise ValueError(f"more than {MAX_KEYS} keys")
            if depth > max_depth:
                raise ValueError(f"values deeper than {max_depth}")
            parts = length = 0
            at_start = first == "\n" or (at_start and first == "[")
            continue
        at_start = at_start and token.isspace()
        if first in "\"'":  # a quoted part, or a text, which may be long
            continue
        parts += token.count(".")
        length += len(token)
        if parts >= MAX_PARTS or length - token.count(" ") > MAX_KEY:
            raise ValueError(
                f"a key or number of more than {MAX_PARTS} parts or {MAX_KEY} characters: "
                f"{clean(token, 40)}"
            )
