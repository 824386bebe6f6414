"""Text of tokens: whole characters, stop strings over tokens, and what streaming adds up to."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molora_fed.serving.streams import TextStream
from molora_fed.testing.models import build_tiny_tokenizer

TOKENIZER = build_tiny_tokenizer()


def encode(text):
    return TOKENIZER.encode(text, add_special_tokens=False)


def stream(tokens, prompt=(), stop=()):
    """Pieces handed out, the last one at the end."""
    text = TextStream(TOKENIZER, prompt, stop)
    pieces = [text.add(token) for token in tokens]
    pieces.append(text.end())
    assert "".join(pieces) == text.text
    return pieces, text


@given(text=st.text(max_size=60), prompt=st.text(max_size=20))
def test_pieces_add_up_to_the_text_and_none_is_half_a_character(text, prompt):
    pieces, _ = stream(encode(text), encode(prompt))
    assert "".join(pieces) == text
    assert all(piece in text for piece in pieces)


def test_a_character_waits_for_its_last_byte():
    pieces, _ = stream(encode("a😀b"))
    assert pieces == ["a", "", "", "", "😀", "b", ""]


@given(tokens=st.lists(st.integers(0, 255), max_size=120))
def test_bytes_that_are_no_text_come_as_they_are_decoded_at_once(tokens):
    pieces, _ = stream(tokens)
    assert "".join(pieces) == TOKENIZER.decode(tokens)


def test_a_token_that_ends_the_text_has_none():
    pieces, _ = stream([*encode("ab"), TOKENIZER.eos_token_id])
    assert "".join(pieces) == "ab"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one\ntwo", ["\n"], "one"),
        ("say END. more", ["END."], "say "),
        ("say EN and ENDs", ["END"], "say EN and "),
        ("aab", ["ab", "aab"], ""),
        ("baa", ["a", "baa"], "b"),
        ("nothing", ["!"], "nothing"),
        ("half EN", ["END"], "half EN"),
        ("schön ß", ["ß"], "schön "),
    ],
)
def test_stop_strings_over_tokens(text, stop, expected):
    pieces, found = stream(encode(text), stop=stop)
    assert "".join(pieces) == expected
    assert found.is_stopped == (expected != text)


@given(st.text(alphabet="abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4)))
def test_the_first_complete_stop_string_ends_the_text(text, stop):
    pieces, _ = stream(encode(text), stop=stop)
    ends = [(text.find(one) + len(one), text.find(one)) for one in stop if one in text]
    assert "".join(pieces) == text[: min(ends)[1] if ends else len(text)]
