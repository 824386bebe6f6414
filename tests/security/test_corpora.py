"""Folders of text from others: links, bombs, names, and whatever bytes stand in them."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from molora_fed.corpus.documents import read_documents
from molora_fed.errors import CorpusError

FOUND = Path(__file__).parents[1] / "data" / "fuzz"


def read(*paths):
    return [(one.name, one.text) for one in read_documents(paths)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "own.txt").write_text("my own text")
    return tmp_path / "texts"


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.jsonl", "a.parquet"])
def test_a_link_out_of_a_folder_of_text_is_refused(tmp_path, folder, name):
    (tmp_path / "key.pem").write_text("private")
    (folder / name).symlink_to(tmp_path / "key.pem")
    with pytest.raises(CorpusError, match="a link that leads out of the folder"):
        read(folder)


def test_a_link_through_another_link_is_refused(tmp_path, folder):
    (tmp_path / "secret.txt").write_text("private")
    (folder / "up").symlink_to("..")
    (folder / "a.txt").symlink_to("up/secret.txt")
    with pytest.raises(CorpusError, match="a link that leads out of the folder"):
        read(folder)


def test_links_inside_and_links_that_people_name_are_read(tmp_path, folder):
    (folder / "again.md").symlink_to("own.txt")
    assert read(folder) == [("texts/again.md", "my own text")]
    (tmp_path / "named").symlink_to(folder)
    assert read(tmp_path / "named")


def test_links_and_paths_that_no_disk_can_hold_are_passed_over_or_refused(tmp_path, folder):
    (folder / "a.txt").symlink_to("x" * 300)
    assert read(folder) == [("texts/own.txt", "my own text")]
    (tmp_path / "circle.txt").symlink_to("circle.txt")
    for path in (tmp_path / ("y" * 300), tmp_path / "circle.txt"):
        with pytest.raises(CorpusError, match="Cannot read text"):
            read(path)


def test_a_snapshot_of_the_hub_is_read(tmp_path):
    snapshot = tmp_path / "datasets--a--b" / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    (tmp_path / "datasets--a--b" / "blobs").mkdir()
    (tmp_path / "datasets--a--b" / "blobs" / "ab").write_text("text")
    (snapshot / "train.txt").symlink_to("../../blobs/ab")
    assert read(snapshot) == [("1234/train.txt", "text")]


def test_names_of_files_are_shown_without_what_terminals_obey(folder):
    (folder / "\x1b]0;x\x07\u202e.txt").write_bytes(b"\0")
    (folder / "own.txt").unlink()
    with pytest.raises(CorpusError) as caught:
        read(folder)
    assert str(caught.value).isprintable()


def test_digits_without_end_beside_a_text_are_passed_over(folder):
    (folder / "a.jsonl").write_text('{"text": "good", "id": ' + "9" * 200_000 + "}\n")
    assert ("texts/a.jsonl:1", "good") in read(folder)


NAMES = ["a.txt", "a.md", "a.jsonl", "a.json", "a.csv", "a.tsv", "a.html", "a.py", "a.jsonl.gz"]
PIECES = st.sampled_from(
    [b'{"text": "good"}', b'{"text": "\\ud800"}', b"[" * 5_000, b'"text"', b"{", b"}", b":", b"\n",
     b'{"messages": [{"role": "user", "content": "x"}]}', b"text,id\n", b"<p>", b"<a b='",
     b"\x1f\x8b",
     b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"NaN", b"PAR1", b"\x1b[31m", b"9" * 5_000]
)  # fmt: skip


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from(NAMES),  # of parquet: test_fuzz.py
    st.lists(PIECES | st.binary(max_size=20), max_size=12).map(b"".join),
)
def test_whatever_stands_in_a_file_of_text_is_text_or_one_line(folder, name, data):
    (folder / name).write_bytes(data)
    try:
        for _, text in read(folder):
            text.encode()
    except CorpusError as error:
        assert "\n" not in str(error) and len(str(error)) < 2_000
    finally:
        (folder / name).unlink()


def test_a_file_over_which_its_library_ends_the_process_is_refused_in_one_line(tmp_path):
    shutil.copy(FOUND / "corpus-parquet-abort", tmp_path / "texts.parquet")
    with pytest.raises(CorpusError, match=r"no parquet that can be read \(its reader ended") as e:
        list(read_documents([tmp_path / "texts.parquet"]))
    assert "\n" not in str(e.value)


def refuse(path, reason):
    with pytest.raises(CorpusError, match=reason) as caught:
        read(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 2_000


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.csv.gz", "a.html.gz", "a.json.gz"])
def test_a_gzip_bomb_is_refused(tmp_path, name):
    with gzip.open(tmp_path / name, "wb") as file:
        for _ in range(64):
            file.write(b"x" * 2**20)
    assert (tmp_path / name).stat().st_size < 100_000
    refuse(tmp_path / name, "200 times its size and more")


def test_gzip_in_gzip_is_not_read(tmp_path):
    (tmp_path / "a.txt.gz.gz").write_bytes(gzip.compress(gzip.compress(b"text")))
    refuse(tmp_path / "a.txt.gz.gz", "is not read")


@pytest.mark.parametrize("mark", ["", '"'])
def test_a_field_of_a_hundred_megabytes_is_refused(tmp_path, mark):
    with (tmp_path / "a.csv").open("w") as file:
        file.write(f"text\n{mark}")
        for _ in range(100):
            file.write("x" * 2**20)
    refuse(tmp_path / "a.csv", r"field larger than field limit \(16777216\)")


def test_a_table_with_a_hole_is_binary_data(tmp_path):
    (tmp_path / "a.csv").write_text("text\n")
    with (tmp_path / "a.csv").open("r+b") as file:
        file.truncate(2**27)
    refuse(tmp_path / "a.csv", "binary data")


@pytest.mark.parametrize(
    "record",
    [
        '{"messages": ' + "[" * 100_000,
        '{"messages": [{"role": "user", "content": ' + '{"a":' * 100_000,
        "[" * 100_000 + "]" * 100_000,
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_deep_json_is_refused(tmp_path, name, record):
    (tmp_path / name).write_text(record)
    refuse(tmp_path / name, "no JSON object")


def test_digits_without_end_in_a_message_take_no_time(tmp_path):
    digits = "9" * 2_000_000
    record = f'{{"messages": [{{"role": "user", "content": "x", "n": {digits}, "f": {digits}.5}}]}}'
    (tmp_path / "a.jsonl").write_text(record)
    assert read(tmp_path / "a.jsonl") == [("a.jsonl:1", "User: x")]


def test_html_nested_without_end_is_text(tmp_path):
    (tmp_path / "a.html").write_text("<div><b>" * 300_000 + "text")
    assert read(tmp_path / "a.html") == [("a.html", "text\n")]


def test_a_chat_of_too_many_messages_is_refused(tmp_path):
    messages = [{"role": "user", "content": "x"}] * 2_001
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
    refuse(tmp_path / "a.jsonl", "a chat of 2001 messages")


def test_what_describes_itself_as_arrow_is_refused_in_one_line(tmp_path):
    for data in (
        b"ARROW1",
        b"ARROW1\0\0" + b"\xff" * 99,
        b"\xff" * 99,
        b"\xff\xff\xff\xff" + b"\x7f" * 99,
    ):
        (tmp_path / "a.arrow").write_bytes(data)
        refuse(tmp_path / "a.arrow", "no arrow that can be read")
