import os

import pytest

from molora_fed.contributions.store import BlobStore
from molora_fed.errors import AdapterError, StorageError
from molora_fed.storage.files import hash_bytes

DATA = b"blob" * 1000


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    path.write_bytes(DATA)
    return path


def put(store, path, expected=None, max_bytes=4000):
    sha = expected or hash_bytes(DATA)
    store.put_file(path, expected=sha, max_bytes=max_bytes, what="the file")


def names(store):
    return sorted(p.name for p in store.root.iterdir()) if store.root.exists() else []


def test_put_is_idempotent_and_content_addressed(store, source):
    put(store, source)
    sha = hash_bytes(DATA)
    assert store.put_bytes(DATA) == sha
    source.unlink()
    put(store, source)  # There already: the source is not needed.
    assert names(store) == [sha]
    assert store.path(sha).read_bytes() == DATA
    assert store.has(sha)
    assert not store.has("0" * 64)


@pytest.mark.parametrize("sha", ["", "../../etc/passwd", "A" * 64, "0" * 63, "0" * 64 + "\n"])
def test_only_hashes_are_names(store, sha):
    with pytest.raises(AdapterError, match="expected 64 lower-case hex digits"):
        store.path(sha)


def test_wrong_or_grown_or_linked_file_leaves_nothing(store, source, tmp_path):
    with pytest.raises(AdapterError, match="Cannot store the file: expected SHA-256 0000"):
        put(store, source, expected="0" * 64)
    with pytest.raises(AdapterError, match=f"at most {len(DATA) - 1} bytes"):
        put(store, source, max_bytes=len(DATA) - 1)
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(AdapterError, match="expected a readable plain file"):
        put(store, tmp_path / "link")
    with pytest.raises(AdapterError, match="No such file"):
        put(store, tmp_path / "none")
    assert names(store) == []


def test_pipe_does_not_hang(store, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(AdapterError):
        put(store, tmp_path / "pipe")
    assert names(store) == []


def test_folder_is_laid_out_whole_or_not_at_all(store):
    first, second = store.put_bytes(b"1"), store.put_bytes(b"2")
    folder = store.put_folder({"a/x": first, "y": second})
    assert (folder / "a" / "x").read_bytes() == b"1"
    assert (folder / "y").read_bytes() == b"2"
    assert store.put_folder({"y": second, "a/x": first}) == folder
    with pytest.raises(StorageError, match="expected blob 0000"):
        store.put_folder({"x": first, "gone": "0" * 64})
    assert list((store.root / "folders").iterdir()) == [folder]


def test_leftovers_of_a_killed_writer_go(store):
    sha = store.put_bytes(b"kept")
    folder = store.put_folder({"x": sha})
    (store.root / f".{sha}.abc.tmp").write_bytes(b"half")
    (folder.parent / ".folder.abc.tmp").mkdir()
    (folder.parent / ".folder.abc.tmp" / "x").write_bytes(b"half")
    store.remove_leftovers()
    assert names(store) == sorted([sha, "folders"])
    assert list(folder.parent.iterdir()) == [folder]
    BlobStore(store.root / "nowhere").remove_leftovers()
