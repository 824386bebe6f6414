"""Extractors: the canonical answer in what a model said.

Two samples agree if their canonical answers are equal, so that "1,250.0" and "1250" are one number.
None raises, whatever the text; docs/extractors_judges.md has every rule.
"""

import json
import re
import string
import unicodedata
from fractions import Fraction
from typing import Any

from molora_fed.cascade.contract import CascadeTask
from molora_fed.storage.files import canonical_json

__all__ = [
    "MAX_TEXT",
    "extract_choice",
    "extract_exact_text",
    "extract_json_field",
    "extract_number",
    "extract_sequence",
    "extract_text",
]

MAX_TEXT = 100_000
"""Characters of a sample that are looked at: the last ones."""

_MAX_DIGITS = 400
_MAX_JSON_STARTS = 200

_MARKER = re.compile(r"(?:\banswer\b\s*(?:is|:|=)*|####|\\boxed\s*\{)", re.IGNORECASE)
_DIGITS = r"[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|,[0-9])|[0-9]+"
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]])[-+])?(?<![A-Za-z_.])"
    rf"(?:(?P<whole>{_DIGITS})[ ](?P<above>[0-9]+)/(?P<below>[0-9]+)(?![0-9]|\.[0-9])"
    rf"|(?P<over>{_DIGITS})[ ]?/[ ]?(?P<under>[0-9]+)(?![0-9]|\.[0-9])"
    rf"|(?P<plain>(?:{_DIGITS})(?:\.[0-9]+)?|\.[0-9]+)(?:[eE](?P<power>[-+]?[0-9]{{1,3}})(?![0-9]))?)"
)
_SIGNS = {"\u2212": "-", "\u2044": "/"}
_BETWEEN_DIGITS = re.compile(r"(?<=[0-9])['_\u2019\u2009\u202f](?=[0-9]{3}(?![0-9]))")
_LETTER_ALONE = re.compile(r"\(?\s*([A-Za-z])\s*(?:[).:,]|$)")
_LETTER_AFTER = re.compile(r"[\s:(*]*([A-Za-z])(?![A-Za-z0-9'])")
_LETTER_WORD = re.compile(r"(?<![A-Za-z0-9'])\(?([A-Z])\)?(?![A-Za-z0-9'])")
_SEPARATORS = re.compile(r"[\s,;\[\](){}|]+")


def extract_text(task: CascadeTask, text: str) -> str | None:
    """The first line that says anything, normalised: NFKC, case-folded, single spaces.

    Punctuation at both ends is left out.

    Args:
        task: The task; not looked at.
        text: A sample.
    """
    for line in text.splitlines():
        words = unicodedata.normalize("NFKC", line).casefold().split()
        found = " ".join(words).strip(string.punctuation + " ")
        if found:
            return found
    return None


def extract_exact_text(task: CascadeTask, text: str) -> str | None:
    """The whole text without the white space around it; case and punctuation count.

    Args:
        task: The task; not looked at.
        text: A sample.
    """
    return unicodedata.normalize("NFC", text).strip() or None


def extract_number(task: CascadeTask, text: str) -> str | None:
    r"""The number in a text as a reduced fraction: "7", "-3/4".

    The first number after the last "answer is", "answer:", "####" or "\boxed{" wins; without such
    a marker it is the last number of the text, or the first where `details["take"]` is "first".
    Commas, apostrophes and thin spaces group thousands, the point separates decimals, a per cent
    sign is not looked at. `details["digits"]` rounds to so many decimals.

    Args:
        task: The task; `take` and `digits` of its details are looked at.
        text: A sample.
    """
    plain = _plain_digits(text[-MAX_TEXT:])
    marked = _after_marker(plain)
    numbers = _find_numbers(marked) if marked is not None else []
    first = bool(numbers) or task.details.get("take") == "first"
    numbers = numbers or _find_numbers(plain)
    if not numbers:
        return None
    number = numbers[0] if first else numbers[-1]
    digits = task.details.get("digits")
    if isinstance(digits, int) and 0 <= digits <= _MAX_DIGITS:
        number = round(number, digits)
    return str(number)


def extract_choice(task: CascadeTask, text: str) -> str | None:
    """The letter of the choice in a text, upper case.

    In this order: the letter after the last marker ("answer is"), the text being a letter or
    beginning with one and a bracket, point or colon, the text being one choice's words, and the
    first capital that stands alone. An "A" or "I" before a small letter is a word and comes last.

    Args:
        task: `details["choices"]` is the list of the choices' texts or their number; without it
            the letters are A to J.
        text: A sample.
    """
    choices = task.details.get("choices")
    texts = [str(one) for one in choices] if isinstance(choices, list | tuple) else []
    known = isinstance(choices, int) and 0 < choices <= 26
    letters = string.ascii_uppercase[: len(texts) or (choices if known else 10)]
    shown = text[-MAX_TEXT:].strip()
    marked = _after_marker(shown)
    leading = (_LETTER_AFTER.match(marked or ""), _LETTER_ALONE.match(shown))
    for match in leading:
        if match is None or match[1].upper() not in letters or _is_article(match):
            continue
        return match[1].upper()
    said = extract_text(task, shown)
    same = [place for place, one in enumerate(texts) if extract_text(task, one) == said]
    if said is not None and len(same) == 1 and same[0] < 26:
        return letters[same[0]]
    alone = [one for one in _LETTER_WORD.finditer(shown) if one[1] in letters]
    alone.sort(key=_is_article)
    return alone[0][1] if alone else None


def extract_sequence(task: CascadeTask, text: str) -> str | None:
    """The items of the first line that has any, joined by single commas: "1,2,5/2,pear".

    White space, commas, semicolons and brackets separate items; an item that is a number is
    reduced as the number extractor does, any other keeps its case without quotes.

    Args:
        task: The task; not looked at.
        text: A sample.
    """
    for line in text[-MAX_TEXT:].splitlines():
        items = [one.strip("'\"`") for one in _SEPARATORS.split(_plain_digits(line))]
        found = [_canonical_item(one) for one in items if one]
        if found:
            return ",".join(found)
    return None


def extract_json_field(task: CascadeTask, text: str) -> str | None:
    """A field of the last JSON value in a text that has it, as canonical JSON.

    Whole numbers are equal however they are written, 2.0 is 2. Text around the value, fences
    included, is ignored.

    Args:
        task: `details["field"]` is the path, names and list places joined by points, e.g.
            "result.0.name"; without it the whole value counts.
        text: A sample.
    """
    shown = text[-MAX_TEXT:]
    path = [part for part in str(task.details.get("field") or "").split(".") if part]
    decoder = json.JSONDecoder()
    found, place = None, 0
    for _ in range(_MAX_JSON_STARTS):
        start = min(
            (i for i in (shown.find("{", place), shown.find("[", place)) if i >= 0), default=-1
        )
        if start < 0:
            break
        try:
            value, place = decoder.raw_decode(shown, start)
            found = canonical_json(_whole(_follow(value, path))).decode()
        except (ValueError, LookupError, RecursionError):
            place = max(place, start + 1)
    return found


def _follow(value: Any, path: list[str]) -> Any:
    for part in path:
        if isinstance(value, dict):
            value = value[part]
        elif isinstance(value, list):
            value = value[int(part)]
        else:
            raise LookupError(part)
    return value


def _whole(value: Any) -> Any:
    """The same JSON value with whole floats as integers."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, list):
        return [_whole(one) for one in value]
    if isinstance(value, dict):
        return {name: _whole(one) for name, one in value.items()}
    return value


def _is_article(match: re.Match[str]) -> bool:
    """Whether a letter reads as a word, "A pear" or "I think"."""
    after = match.string[match.end() : match.end() + 2]
    return match[1] in "aAI" and bool(re.match(r"\s[a-z]", after))


def _after_marker(text: str) -> str | None:
    ends = [match.end() for match in _MARKER.finditer(text)]
    return text[ends[-1] :] if ends else None


def _plain_digits(text: str) -> str:
    """The text with ASCII digits, signs and thousands separators."""
    ascii_only = "".join(
        str(unicodedata.decimal(one)) if one.isdecimal() else _SIGNS.get(one, one) for one in text
    )
    return _BETWEEN_DIGITS.sub(",", ascii_only)


def _find_numbers(text: str) -> list[Fraction]:
    found = (_read_number(match) for match in _NUMBER.finditer(text))
    return [number for number in found if number is not None]


def _canonical_item(item: str) -> str:
    match = _NUMBER.fullmatch(item)
    number = None if match is None else _read_number(match)
    return item if number is None else str(number)


def _read_number(match: re.Match[str]) -> Fraction | None:
    """The number of a match; None if it divides by zero or is longer than anyone means."""
    if len(match[0]) > _MAX_DIGITS:
        return None
    parts = {name: part.replace(",", "") for name, part in match.groupdict().items() if part}
    try:
        if "whole" in parts:
            number = int(parts["whole"]) + Fraction(int(parts["above"]), int(parts["below"]))
        elif "over" in parts:
            number = Fraction(int(parts["over"]), int(parts["under"]))
        else:
            power = int(parts.get("power", 0))
            if abs(power) > _MAX_DIGITS:
                return None
            number = Fraction(parts["plain"]) * Fraction(10) ** power
    except ZeroDivisionError:
        return None
    return -number if parts.get("sign") == "-" else number
