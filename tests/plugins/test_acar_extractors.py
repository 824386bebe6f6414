"""Extractors: equal answers become equal texts, and no text makes one raise."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molora_fed.cascade.contract import CascadeTask
from molora_fed.plugins import load_plugins

NAMES = ("choice-letter", "exact-text", "json-field", "normalised-text", "number", "sequence")


@pytest.fixture(scope="module")
def extractors():
    registry = load_plugins().extractors
    return {name: registry.resolve(name) for name in NAMES}


def task(**details):
    return CascadeTask("t", "family", "prompt", "any", details=details)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12", "12"),
        (" -7.50 ", "-15/2"),
        ("−5", "-5"),
        ("12/4.", "3"),
        ("-3/6", "-1/2"),
        ("1 1/2 cups", "3/2"),
        ("1,234,567.0", "1234567"),
        ("1'000", "1000"),
        ("1,2,3", "3"),
        ("5-3", "3"),
        ("x2 is 4", "4"),
        ("1.5e3", "1500"),
        ("50 %", "50"),
        ("٣٤", "34"),
        ("3 apples and 5 pears. The answer is 8, not 9", "8"),
        ("so #### 42 done 7", "42"),
        (r"\boxed{-2/3} checked 3 times", "-2/3"),
        ("The answer is unclear, maybe 4 or 5", "4"),
        ("6 * 7 = 42", "42"),
        ("1/0", None),
        ("1e999", None),
        ("9" * 500, None),
        ("x1", None),
        ("", None),
    ],
)
def test_number(extractors, text, expected):
    assert extractors["number"](task(), text) == expected


def test_number_by_details(extractors):
    assert extractors["number"](task(take="first"), "3 then 4") == "3"
    assert extractors["number"](task(digits=2), "0.3333") == "33/100"
    assert extractors["number"](task(digits=2), "1/3") == "33/100"


@given(st.fractions())
def test_every_writing_of_a_fraction_is_one_number(value):
    extract = load_once()["number"]
    written = f"{value.numerator * 3}/{value.denominator * 3}"
    assert extract(task(), written) == str(value)
    assert extract(task(), f"it is {value}") == str(value)


@given(st.integers(-(10**30), 10**30))
def test_grouped_and_decimal_writings_of_an_integer_are_one_number(value):
    extract = load_once()["number"]
    assert {extract(task(), text) for text in (f"{value:,}", f"{value}.00", f"= {value}")} == {
        str(value)
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(c)", "C"),
        ("d) because A", "D"),
        ("The answer is (D).", "D"),
        ("First A, no. Answer: b", "B"),
        ("Pear!", "B"),
        ("A cat sat on C", "C"),
        ("I think B", "B"),
        ("The answer is a pear", None),
        ("E", None),
        ("nothing", None),
        ("", None),
    ],
)
def test_choice(extractors, text, expected):
    choices = ["apple", "pear", "plum", "fig"]
    assert extractors["choice-letter"](task(choices=choices), text) == expected


def test_choice_by_number_and_without(extractors):
    assert extractors["choice-letter"](task(choices=2), "C") is None
    assert extractors["choice-letter"](task(), "C") == "C"
    assert extractors["choice-letter"](task(choices="nonsense"), "C") == "C"


def test_texts(extractors):
    exact, normal = extractors["exact-text"], extractors["normalised-text"]
    assert exact(task(), "  Two  words.\n") == "Two  words."
    assert exact(task(), " \n") is None
    assert normal(task(), "\n  Two   WORDS. \nmore") == "two words"
    assert exact(task(), "e\u0301") == exact(task(), "\u00e9")


def test_sequence(extractors):
    extract = extractors["sequence"]
    assert extract(task(), "[1, 2.50, 'pear']\nmore") == "1,5/2,pear"
    assert extract(task(), "\n 3 1  2") == extract(task(), "(3; 1; 2.0)") == "3,1,2"
    assert extract(task(), " ,;\n") is None


def test_json_field(extractors):
    extract = extractors["json-field"]
    text = 'Sure: ```json\n{"a": [{"n": 2.0}], "b": {"y": 1, "x": null}}\n``` {"c": 1}'
    assert extract(task(field="a.0.n"), text) == "2"
    assert extract(task(field="b"), text) == '{"x":null,"y":1}'
    assert extract(task(field="missing"), text) is None
    assert extract(task(), '{"a": 1} {"a": 2}') == '{"a":2}'
    assert extract(task(field="a"), '{"a": NaN}') is None
    assert extract(task(field="a"), '{"a": 1} {"a":') == "1"
    assert extract(task(field="a"), "[" * 50_000) is None
    assert extract(task(field="a"), '{"a":' * 50_000) is None


HOSTILE = st.one_of(
    st.text(),
    st.text(alphabet="0123456789.,/eE-+ ()[]{}\"':#=aAB\\\n_½²"),
    st.recursive(st.none() | st.floats() | st.text(), st.lists, max_leaves=5).map(json.dumps),
)
DETAILS = st.dictionaries(
    st.sampled_from(["choices", "digits", "field", "take"]),
    st.none() | st.integers() | st.text() | st.lists(st.text()) | st.booleans(),
)


@settings(max_examples=300, deadline=None)
@given(HOSTILE, DETAILS)
def test_no_text_and_no_details_make_one_raise_or_waver(text, details):
    for name, extract in load_once().items():
        found = extract(task(**details), text)
        assert found is None or (isinstance(found, str) and found), name
        assert extract(task(**details), text) == found, name


@pytest.mark.parametrize("piece", ["1,", "1 1/", "answer ", "(A", "[{", "9", '{"a": [', "'1_"])
def test_long_texts_take_no_time_to_speak_of(extractors, piece):
    text = piece * (300_000 // len(piece))
    for extract in extractors.values():
        extract(task(choices=4, field="a"), text)


_LOADED = {}


def load_once():
    """Extractors for tests that hypothesis runs, which take no fixtures."""
    if not _LOADED:
        registry = load_plugins().extractors
        _LOADED.update({name: registry.resolve(name) for name in NAMES})
    return _LOADED
