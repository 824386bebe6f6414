"""Text of HTML pages, well-formed and not."""

import html
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molora_fed.corpus.documents import read_documents
from molora_fed.corpus.html_text import extract_text


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<p>One <b>bold</b>\n  word.<p>Two", "One bold word.\n\nTwo\n"),
        ("a<br>b<div>c</div>d", "a\nb\nc\nd\n"),
        ("<title>A &amp; B</title><body>x &lt; y &eacute;", "A & B\n\nx < y é\n"),
        ("<script>if (a<b) '</p>'</script>x<style>p{}</STYLE >y", "xy\n"),
        ("x<!-- <p>no --> y <![CDATA[no]]>z<!doctype html>", "x y z\n"),
        ("<table><tr><td>1<td>2<tr><td>3", "1\t2\n3\n"),
        ("<pre>\n  a = 1\n\n  b\n</pre> after   it", "  a = 1\n\n  b\n\nafter it\n"),
        ("<a href='x>y' title=\"</p>\">link</a> tail", "link tail\n"),
        ("1 < 2 and <3 and a<b", "1 < 2 and <3 and a\n"),
        ("<textarea><p>raw</textarea>", "<p>raw\n"),
        ("kept <p unclosed='", "kept\n"),
        ("<script>never closed", ""),
        ("", ""),
        ("İ<script>no</script>yes", "İyes\n"),
    ],
)
def test_pages(page, text):
    assert extract_text(page) == text


PIECES = ["<a ", "<!--", "<![CDATA[", '<a b="', "<", "</", "<!", "<?", "&#1", "<script>", "<div>",
          "<a b='\" ", "<script></", "<a b=c d", "<a/", "<pre>\n", "<td>x", "<b> </b>"]  # fmt: skip


@pytest.mark.parametrize("piece", PIECES)
def test_malformed_pages_take_linear_time(piece):
    """Python's own parser takes 20 seconds for 20,000 of some of these, and hours for these."""
    start = time.perf_counter()
    extract_text(piece * 200_000)
    assert time.perf_counter() - start < 20


@given(st.lists(st.sampled_from([*PIECES, "-->", ">", "]]>", '"', "'", "</script>", "text"])))
def test_whatever_the_markup_there_is_text(pieces):
    assert "<script" not in extract_text("".join(pieces))


@given(st.text(st.characters(exclude_categories=("Cs", "Cc", "Zs", "Zl", "Zp"))))
def test_escaped_text_comes_back(text):
    assert extract_text(f"<p>{html.escape(text)}</p>").rstrip("\n") == text


def test_a_page_in_the_encoding_it_declares(tmp_path):
    page = "<html><head><meta charset='iso-8859-2'></head><p>Zażółć gęślą jaźń"
    (tmp_path / "a.html").write_bytes(page.encode("iso-8859-2"))
    (document,) = read_documents([tmp_path / "a.html"])
    assert document.text == "Zażółć gęślą jaźń\n"
