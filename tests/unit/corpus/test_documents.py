import json
import os
import tempfile
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from molora_fed.corpus.documents import read_documents
from molora_fed.corpus.inventory import Inventory
from molora_fed.corpus.sizes import choose_evenly, cut_long_documents
from molora_fed.errors import CorpusError
from molora_fed.types import Document

NOBODY = 65534


def read(*paths):
    return [(d.name, d.text) for d in read_documents(paths)]


def write_jsonl(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_every_kind_of_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfplain \xc3\xa9")
    (tmp_path / "b.md").write_text("# head\n")
    write_jsonl(tmp_path / "c.jsonl", {"text": "one", "id": 1}, {"text": " "}, {"text": "three"})
    pq.write_table(pa.table({"text": ["x", "y"], "n": [1, 2]}), tmp_path / "d.parquet")
    assert read(*(tmp_path / name for name in ("a.txt", "b.md", "c.jsonl", "d.parquet"))) == [
        ("a.txt", "plain é"),
        ("b.md", "# head\n"),
        ("c.jsonl:1", "one"),
        ("c.jsonl:3", "three"),
        ("d.parquet:1", "x"),
        ("d.parquet:2", "y"),
    ]


def test_folders_are_read_in_order_and_other_files_passed_over(tmp_path):
    folder = tmp_path / "mine"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git").mkdir()
    for name in ("z.txt", "sub/a.MD", "b.txt", ".hidden.txt", ".git/c.txt", "image.png"):
        (folder / name).write_text(name)
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "pipe.txt")
    assert [name for name, _ in read(folder)] == ["mine/b.txt", "mine/sub/a.MD", "mine/z.txt"]


def test_a_file_given_twice_is_read_once_and_names_are_unique(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.txt").write_text(folder)
    one, two = tmp_path / "one" / "same.txt", tmp_path / "two" / "same.txt"
    assert read(one, two, one) == [("same.txt", "one"), ("same.txt~2", "two")]


def assert_refused(paths, *parts):
    with pytest.raises(CorpusError) as caught:
        list(read_documents(paths))
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 12
    for part in parts:
        assert part in message, message


def test_missing_path(tmp_path):
    assert_refused([tmp_path / "no"], "no such file or folder")


def test_no_path():
    assert_refused([], "(no path)", "got 0 files")


def test_empty_folder(tmp_path):
    (tmp_path / "x.png").write_bytes(b"1")
    assert_refused([tmp_path], "got 0 files of kinds that are read", "ending '.png' is not read: ")


def test_white_space_only(tmp_path):
    (tmp_path / "a.txt").write_text(" \n\t")
    assert_refused([tmp_path], "at least one document with text", "got 1 files")


def test_other_ending(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"x")
    assert_refused([tmp_path / "a.pdf"], "ending '.pdf' is not read")


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.txt", b"abc\0def", "binary data"),
        ("a.txt", b"caf\xe9\x01", "no UTF-8 at byte 3, and no other encoding that is known"),
        ("a.md", "text".encode("utf-16-le"), "binary data"),
        ("a.md", "text".encode("utf-16")[:-1], "no UTF-16 at byte 8"),
        ("a.jsonl", b'{"text": "x"}\nno\n', "line 2: no JSON object"),
        ("a.jsonl", b"[1]\n", "line 1: no JSON object but list"),
        ("a.jsonl", b'{"text": null}\n', "line 1: no text in field 'text' but NoneType"),
        ("a.jsonl", b'{"id": "x"}\n', "line 1: no field of text among id; name it with --text"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: half a character"),
        ("a.jsonl", b"[" * 100_000, "line 1: no JSON object"),
        ("a.parquet", b"PAR1 is only the beginning", "no parquet that can be read"),
        ("a.parquet", b"", "no parquet that can be read"),
    ],
)
def test_unreadable_content(tmp_path, name, data, reason):
    (tmp_path / name).write_bytes(data)
    assert_refused([tmp_path], reason, name)


def test_parquet_without_text(tmp_path):
    pq.write_table(pa.table({"id": ["x"]}), tmp_path / "a.parquet")
    assert_refused([tmp_path], "no column of text among id; name it with --text-field")
    pq.write_table(pa.table({"text": [1]}), tmp_path / "a.parquet")
    assert_refused([tmp_path], "row 1: no text in field 'text' but int")


def test_what_cannot_be_read_of_many_is_left_out_and_listed(tmp_path):
    (tmp_path / "texts").mkdir()
    files = {"a.txt": b"\0", "b.txt": b"good", "c.png": b"", ".d": b"", "e.txt": b""}
    for name, data in files.items():
        (tmp_path / "texts" / name).write_bytes(data)
    inventory = Inventory()
    documents = list(read_documents([tmp_path / "texts"], inventory=inventory))
    assert [d.text for d in documents] == ["good"]
    table = inventory.to_json()
    assert [(row["kind"], row["files"], row["characters"]) for row in table["read"]] == [
        ("text", 1, 4)
    ]
    assert {row["reason"]: row["names"] for row in table["left_out"]} == {
        "binary data": ["texts/a.txt"],
        "ending '.png' is not read": ["texts/c.png"],
        "hidden": ["texts/.d"],
        "no text in it": ["texts/e.txt"],
    }


def test_what_was_named_itself_has_to_be_read(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("good")
    (tmp_path / "texts" / "b.txt").write_bytes(b"\0")
    (tmp_path / "none").mkdir()
    assert_refused([tmp_path / "texts", tmp_path / "texts" / "b.txt"], "b.txt': binary data")
    assert_refused([tmp_path / "texts", tmp_path / "none"], "none': nothing in it that can be read")


def test_the_table_is_bounded():
    inventory = Inventory()
    for number in range(1_000):
        inventory.leave_out(f"{'n' * 9_999}{number}", f"{'r' * 500 if number % 2 else ''}{number}")
    table = inventory.to_json()
    assert len(table["left_out"]) == 31 and sum(r["files"] for r in table["left_out"]) == 1_000
    assert len(json.dumps(table)) < 30_000
    assert len(inventory.describe_left_out()) < 2_500


def test_all_problems_are_told_at_once(tmp_path):
    for name in ("a", "b", "c", "d", "e"):
        (tmp_path / f"{name}.txt").write_bytes(b"\0")
    assert_refused([tmp_path], "a.txt", "b.txt", "c.txt", "and 2 more")


def test_forbidden_file():
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        folder = Path(name)
        (folder / "a.txt").write_text("x")
        (folder / "a.txt").chmod(0)
        folder.chmod(0o755)
        if user == 0:
            os.seteuid(NOBODY)  # root may read everything
        try:
            assert_refused([folder], "a.txt", "Permission denied")
        finally:
            os.seteuid(user)


def test_one_large_document_is_cut_without_loss(make_text):
    text = "\n\n".join(make_text(n, 60) for n in range(800))
    pieces = cut_long_documents([Document("book", text), Document("note", "short")])
    assert "".join(p.text for p in pieces[:-1]) == text
    assert pieces[-1] == Document("note", "short")
    assert pieces[0].name == "book#1"
    size = max(len(text) // 250, 2_000)
    assert all(size / 2 <= len(p.text) <= size for p in pieces[:-2])
    assert all(p.text.endswith("\n\n") for p in pieces[:-2])


@pytest.mark.parametrize("unit", ["x", "word ", "a line\n"])
def test_cutting_falls_back_to_lines_words_and_characters(unit):
    text = unit * 9_000
    pieces = cut_long_documents([Document("a", text)])
    assert "".join(p.text for p in pieces) == text
    assert len(pieces) > 3
    assert all(len(p.text) <= 2_000 for p in pieces)
    if unit != "x":
        assert all(p.text.endswith(unit) for p in pieces)


def test_usual_documents_stay_whole(make_documents):
    documents = make_documents(40)
    assert cut_long_documents(documents) == documents


def test_choosing_is_even():
    items = list(range(1_000))
    kept = choose_evenly(items, [10] * 1_000, 2_500)
    assert len(kept) == 250
    assert {b - a for a, b in pairwise(kept)} == {4}
    assert choose_evenly(items, [10] * 1_000, 10_000) == items
    assert choose_evenly([], [], 10) == []


def test_a_path_with_a_line_break_is_refused_in_one_line(tmp_path):
    with pytest.raises(CorpusError, match="a b': no such file") as caught:
        list(read_documents([tmp_path / "a\nb"]))
    assert "\n" not in str(caught.value)
