"""Encodings, and bounds of what is read and unpacked."""

import gzip
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molora_fed.corpus import raw_text
from molora_fed.corpus.raw_text import UnreadableError, decode, read_text

FRENCH = "Voilà l'été à la plage, où les élèves étaient très fatigués. Ça va?"


@pytest.mark.parametrize(
    ("encoding", "text", "shown"),
    [
        ("utf-8", "café 数", ""),
        ("utf-8-sig", "café 数", ""),
        ("utf-16", "café 数", "UTF-16"),
        ("utf-32", "café 数", "UTF-32"),
        ("latin-1", "café", "cp1252?"),
        ("latin-1", FRENCH, "cp1252?"),
        ("latin-1", "Größe und Maß: Änderungen können süß sein, während Übung fehlt.", "cp1252?"),
        ("cp1252", "“smart quotes” – it’s the café’s naïve résumé", "cp1252?"),
        ("cp1251", "Привет, как дела? Это русский текст.", "cp1251?"),
        ("shift_jis", "日本語のテキストはここにあります。漢字とかな。", "cp932?"),
        ("gbk", "这是一个中文文本，用来测试编码。", "gb18030?"),
    ],
)
def test_encodings(encoding, text, shown):
    assert decode(text.encode(encoding)) == (text, shown)


@pytest.mark.parametrize("mark", [b"\xfe\xff", b"\xff\xfe"])
def test_both_orders_of_utf_16(mark):
    order = "utf-16-be" if mark == b"\xfe\xff" else "utf-16-le"
    assert decode(mark + "数 text".encode(order)) == ("数 text", "UTF-16")


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ("ISO-8859-1", (FRENCH, "cp1252")),
        ("windows-1252", (FRENCH, "cp1252")),
        ("iso-8859-15", (FRENCH, "iso8859-15")),
        *((name, (FRENCH, "cp1252?")) for name in ("utf-8", "zlib", "punycode", "no such", "")),
    ],
)
def test_an_encoding_that_a_page_declares_is_used_if_it_is_one_of_text(declared, expected):
    assert decode(FRENCH.encode("latin-1"), declared) == expected


def test_plain_lines_do_not_hide_a_few_others():
    data = b"plain ascii text\n" * 100_000 + FRENCH.encode("latin-1")
    assert decode(data)[0].endswith(FRENCH)


@given(st.binary(max_size=300))
def test_whatever_the_bytes_there_is_text_or_a_reason(data):
    try:
        text, encoding = decode(data)
        assert "\0" not in text or encoding.startswith("UTF")
        text.encode()
    except UnreadableError as error:
        assert str(error).isprintable()


@given(st.text())
def test_utf_8_is_never_taken_for_another_encoding(text):
    if "\0" not in text:
        assert decode(text.encode()) == (text.removeprefix("\ufeff"), "")


def test_packed_text_is_unpacked_whole(tmp_path):
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(b"one ") + gzip.compress(b"two"))
    assert read_text(path, packed=True) == ("one two", "")


@pytest.mark.parametrize("data", [b"", b"no gzip", gzip.compress(b"text" * 99, mtime=0)[:-9]])
def test_what_is_no_gzip_is_refused(tmp_path, data):
    (tmp_path / "a.gz").write_bytes(data)
    if data:
        with pytest.raises(UnreadableError, match="no gzip that can be unpacked"):
            read_text(tmp_path / "a.gz", packed=True)


def test_a_small_file_does_not_become_gigabytes(tmp_path, monkeypatch):
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"x" * 2**25))
    with pytest.raises(UnreadableError, match="200 times its size and more"):
        read_text(tmp_path / "a.gz", packed=True)
    monkeypatch.setattr(raw_text, "MAX_FILE_BYTES", 2**20)
    (tmp_path / "a.txt").write_bytes(b"x" * 2**21)
    with pytest.raises(UnreadableError, match=r"more than 1,048,576 bytes of text$"):
        read_text(tmp_path / "a.txt")


def test_a_hole_of_a_terabyte_is_binary_data_at_once(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"")
    os.truncate(tmp_path / "a.txt", 2**40)
    with pytest.raises(UnreadableError, match="binary data"):
        read_text(tmp_path / "a.txt")
