"""Files are whole or not there, also when the disk refuses."""

import os
import resource
import stat
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molora_fed.errors import StorageError
from molora_fed.storage.files import canonical_json, replace_folder, write_bytes, write_json

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=20,
)


@given(st.dictionaries(st.text(max_size=8), JSON))
def test_canonical_json_does_not_depend_on_key_order(value):
    backwards = dict(reversed(list(value.items())))
    assert canonical_json(value) == canonical_json(backwards)


def test_canonical_json_refuses_what_json_cannot_carry():
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"loss": float("nan")})


def test_write_replaces_whole_files_and_keeps_the_mode(tmp_path):
    target = tmp_path / "deep" / "key.pem"
    write_bytes(target, b"one", mode=0o600)
    write_bytes(target, b"two", mode=0o600)
    assert target.read_bytes() == b"two"
    assert target.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in target.parent.iterdir()] == ["key.pem"]


def test_a_file_is_on_disk_before_it_has_its_name_and_the_name_after(tmp_path, monkeypatch):
    target, flushed, fsync = tmp_path / "ledger.json", [], os.fsync

    def watch(descriptor):
        flushed.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), target.exists()))
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", watch)
    write_bytes(target, b"whole")
    assert flushed == [(False, False), (True, True)]  # (is the folder, has its name)


def test_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    """A real file-size limit in a real process; the message is one line and says what to do."""
    target = tmp_path / "ledger.json"
    write_json(target, {"kept": True})
    before = target.read_bytes()
    code = (
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "import sys; from pathlib import Path; from molora_fed.storage.files import write_bytes\n"
        "from molora_fed.errors import StorageError\n"
        "try: write_bytes(Path(sys.argv[1]), b'x' * 100_000)\n"
        "except StorageError as error: print(error); sys.exit(error.exit_code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(target)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )
    assert done.returncode == StorageError.exit_code, done.stderr
    assert done.stdout.count("\n") == 1 and "Free some space" in done.stdout
    assert target.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["ledger.json"]


def test_folder_is_replaced_only_when_the_block_succeeds(tmp_path):
    target = tmp_path / "fused"
    with replace_folder(target) as folder:
        (folder / "a").write_text("1")
    with pytest.raises(RuntimeError, match="boom"), replace_folder(target) as folder:
        (folder / "b").write_text("2")
        raise RuntimeError("boom")
    assert [p.name for p in target.iterdir()] == ["a"]
    with replace_folder(target) as folder:
        (folder / "c").write_text("3")
    assert [p.name for p in target.iterdir()] == ["c"]
    assert os.listdir(tmp_path) == ["fused"]
