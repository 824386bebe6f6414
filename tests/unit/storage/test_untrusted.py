"""Text and JSON from outside."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molora_fed.storage.untrusted import MAX_DEPTH, MAX_SHOWN, clean, parse_json

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(max_size=20), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@given(st.text(st.characters(codec=None, exclude_categories=()), max_size=600))
def test_cleaned_text_is_one_short_line_that_can_be_written(text):
    shown = clean(text)
    assert len(shown) <= MAX_SHOWN and len(shown.splitlines()) <= 1
    shown.encode()
    assert "\x1b" not in shown and "\x9b" not in shown and "\u202e" not in shown
    assert clean(shown) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("plain [bold]text[/x]", "plain [bold]text[/x]"),
        ("red\x1b[31m", "red\ufffd[31m"),
        ("two\n\tlines\r\n", "two lines"),
        ("\u202eexe.txt", "\ufffdexe.txt"),
        ("a\u200bb", "a\ufffdb"),
        ("\ud800", "\ufffd"),
        pytest.param(10**5_000, "an integer of 16610 bits", id="digits"),
        pytest.param([10**5_000], "list", id="digits inside"),
        (None, "None"),
        ("x" * 201, "x" * 199 + "…"),
        ("größe 数", "größe 数"),
    ],
)
def test_anything_can_be_shown(value, shown):
    assert clean(value) == shown


def test_a_text_of_megabytes_is_cut_before_it_is_searched():
    text = "\x1b" * 50_000_000
    start = time.process_time()
    assert len(clean(text)) == MAX_SHOWN
    assert time.process_time() - start < 0.1


@given(JSON)
def test_json_comes_back_as_it_was_written(value):
    assert parse_json(json.dumps(value, ensure_ascii=False).encode(), max_bytes=10**6) == value


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"[" * 100_000, "deeper than"),
        (b"[" * (MAX_DEPTH + 1) + b"1" + b"]" * (MAX_DEPTH + 1), "deeper than"),
        (b'{"loss": NaN}', "NaN"),
        (b'{"loss": -Infinity}', "Infinity"),
        (b'{"loss": 1e999}', "not finite"),
        (b'{"loss": 1' + b"0" * 400 + b"}", "64 bits"),
        (b"18446744073709551616", "64 bits"),
        (b"-9223372036854775809", "64 bits"),
        (b'"\\ud800"', "surrogate"),
        (b'{"\\ud800": 1}', "surrogate"),
        (b'{"' + b"k" * 513 + b'": 1}', "key of more than 512"),
        (b"\xff", "not UTF-8"),
        (b"{", "Expecting property name"),
        (b"", "Expecting value"),
        (b'"' + b"x" * 2_000 + b'"', "more than 1,000 bytes"),
    ],
)
def test_json_out_of_bounds_is_refused_with_a_short_reason(data, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        parse_json(data, max_bytes=1_000 if b"xx" in data else 10**6)
    assert len(str(caught.value)) <= 300


def test_as_deep_as_allowed_is_read():
    data = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    assert parse_json(data, max_bytes=1_000) is not None
