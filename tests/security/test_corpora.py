"""Folders of text from others: links, bombs, names, and whatever bytes stand in them."""

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
    (folder / "\x1b]0;x\x07\u202e.txt").write_bytes(b"\xff")
    with pytest.raises(CorpusError) as caught:
        read(folder)
    assert str(caught.value).isprintable()


def test_digits_without_end_beside_a_text_are_passed_over(folder):
    (folder / "a.jsonl").write_text('{"text": "good", "id": ' + "9" * 200_000 + "}\n")
    assert ("texts/a.jsonl:1", "good") in read(folder)


PIECES = st.sampled_from(
    [b'{"text": "good"}', b'{"text": "\\ud800"}', b"[" * 5_000, b'"text"', b"{", b"}", b":", b"\n",
     b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"NaN", b"PAR1", b"\x1b[31m", b"9" * 5_000]
)  # fmt: skip


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from(["a.txt", "a.md", "a.jsonl"]),  # of parquet: test_fuzz.py
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
