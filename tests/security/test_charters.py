"""Charters and other TOML from outside: time and memory linear in bytes, one-line refusals."""

import subprocess
import sys
import time

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from molora_fed.cascade.config import load_config
from molora_fed.charter import (
    MAX_CHARTER_BYTES,
    Amendment,
    BaseIdentity,
    Charter,
    Identity,
    load_charter,
    parse_charter,
    write_charter,
)
from molora_fed.errors import CascadeError, CharterError
from molora_fed.storage.toml import parse_toml

GOOD = (
    '[identity]\nname = "coop"\n[identity.base]\nid = "tiny"\nweights = "' + "a" * 64
    + '"\ntokenizer = "' + "b" * 64 + '"\n'
)  # fmt: skip
HOSTILE = {
    "one dotted key": "a." * 100_000 + "a = 1",
    "one dotted key with spaces": "a . " * 100_000 + "a = 1",
    "one dotted key of texts": '"a".' * 100_000 + "a = 1",
    "one dotted table": "[" + "a." * 100_000 + "a]",
    "a dotted key in a table": "t = {" + "a." * 100_000 + "a = 1}",
    "a dotted key in a list": "t = [{" + "a." * 100_000 + "a = 1}]",
    "a deep list": "a = " + "[" * 100_000,
    "a deep list over lines": "a = " + "[\n" * 100_000 + "]" * 100_000,
    "a deep table": "a = " + "{a = " * 100_000,
    "long digits": "a = " + "9" * 300_000,
    "long digits with lines": "a = " + "9_9" * 100_000,
    "a long key": "a" * 300_000 + " = 1",
    "many keys": "".join(f"k{n} = 1\n" for n in range(80_000)),
    "many tables": "".join(f"[t{n}]\n" for n in range(80_000)),
    "many nested tables": "".join(f"[{'a.' * 15}t{n}]\n" for n in range(25_000)),
    "quotes without end": "a = '''" + "'" * 300_000 + "x",
    "backslashes": 'a = "' + "\\" * 300_000,
    "hashes": "#" * 300_000 + "\n" + '"#' * 100_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_charter_is_refused_in_little_time(name):
    began = time.process_time()
    for text in (HOSTILE[name], GOOD + HOSTILE[name]):
        with pytest.raises(CharterError) as caught:
            parse_charter(text[:MAX_CHARTER_BYTES])
        assert len(str(caught.value)) < 2_500 and str(caught.value).isprintable()
    assert time.process_time() - began < 3


LIMITED = """
import resource, sys, time
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
from molora_fed.charter import load_charter
from molora_fed.errors import CharterError
began = time.process_time()
try:
    load_charter(__import__("pathlib").Path(sys.argv[1]))
except CharterError as error:
    print("refused", str(error).count("\\n"), time.process_time() - began < 2)
"""


def test_the_worst_charter_fits_a_gigabyte(tmp_path):
    file = tmp_path / "cooperative.toml"
    file.write_text(HOSTILE["one dotted key"])
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(file)], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "refused 0 True\n", done.stderr


@pytest.mark.parametrize(
    "line",
    [
        "a = inf", "a = nan", "a = 18446744073709551616", "a = 1979-05-27", "a = 07:32:00",
        "a = " + "9" * 500, 'a = "\\ud800"',
    ],
)  # fmt: skip
def test_values_that_could_not_be_signed_are_refused(line):
    text = GOOD + "[amendment.fusion.options]\n" + line
    with pytest.raises(CharterError):
        parse_charter(text)


def test_keys_are_shown_without_what_terminals_obey():
    with pytest.raises(CharterError) as caught:
        parse_charter(GOOD + '"\\u001b[31m\\u202ered" = "\\u001b[31m"')
    assert str(caught.value).isprintable()


def test_a_charter_with_long_texts_and_many_options_is_read(tmp_path):
    options = {f"option-{n}": ["x" * 3_000, {"deep": [[1.5] * 50]}] for n in range(20)}
    amendment = Amendment.model_validate({"fusion": {"options": options}})
    charter = Charter(
        identity=Identity(
            version=2,
            name="coop",
            base=BaseIdentity(
                id="tiny", weights="a" * 64, tokenizer="b" * 64, config="c" * 64,
                files={f"model-{n:05d}-of-00500.safetensors": "d" * 64 for n in range(500)},
            ),
        ),
        amendment=amendment,
    )  # fmt: skip
    write_charter(charter, tmp_path / "cooperative.toml")
    assert load_charter(tmp_path) == charter


VALUES = st.recursive(
    st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=("Cs",)), max_size=30),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(st.characters(exclude_categories=("Cs",)), max_size=9), inner,
                      max_size=4),
    max_leaves=15,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(st.characters(exclude_categories=("Cs",)), max_size=20), VALUES))
def test_whatever_is_written_as_toml_is_read_back(value):
    assert parse_toml(tomli_w.dumps(value), max_bytes=10**6) == value


PIECES = st.sampled_from(
    ['"', "'", '"""', "'''", "\\", "#", "\n", "[", "]", "[[", "{", "}", "=", ",", ".", "a", " ",
     "1", "9" * 30, "true", "identity", "amendment", "\x1b", "\u202e", "é", "1979-05-27"]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=60).map("".join))
def test_whatever_stands_in_a_charter_ends_in_one_line(text):
    for whole in (text, GOOD + text):
        try:
            parse_charter(whole)
        except CharterError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("name", ["one dotted key", "a deep list", "long digits"])
def test_a_hostile_description_of_a_cascade_is_refused_in_little_time(tmp_path, name):
    (tmp_path / "cascade.toml").write_text(HOSTILE[name])
    began = time.process_time()
    with pytest.raises(CascadeError, match="Cannot read cascade"):
        load_config(tmp_path / "cascade.toml")
    assert time.process_time() - began < 2
