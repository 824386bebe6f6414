"""What other users of the machine can do with a home: nothing."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from molora_fed.cooperative.cooperative import create_cooperative
from molora_fed.errors import StorageError
from molora_fed.federation.mailbox import hold_lock
from molora_fed.models.base import load_base
from molora_fed.storage.files import make_home, replace_folder, write_json
from molora_fed.storage.locks import try_lock
from molora_fed.tracing.locks import lock_run

NOBODY = 65534

as_another_user = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can start a process of another user"
)


@pytest.fixture
def place():
    """A folder that everybody may enter, unlike pytest's."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def mode(path):
    return path.stat().st_mode & 0o777


def run_as_nobody(*command):
    return subprocess.run(command, user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True)


def make_everything(home, checkpoint):
    """A cooperative that works, with text, a lock, a trace's lock and a contributor's files."""
    cooperative = create_cooperative(home, "tiny", load_base(checkpoint))
    with replace_folder(home / "corpus") as folder:
        save_file({"tokens": np.zeros((2, 16))}, folder / "train.safetensors")
        (folder / "inner").mkdir()
        (folder / "inner" / "sample.txt").write_text("private")
    write_json(home / "states" / "deep" / "state.json", {"text": "private"})
    (home / "trace").mkdir()
    lock_run(home / "trace", shared=True).close()
    return cooperative


def test_all_that_is_written_in_a_home_is_closed(place, tiny_checkpoint):
    cooperative = make_everything(place / "home", tiny_checkpoint())
    with cooperative.open_ledger(), hold_lock(place / "home" / "serve.lock", what="a server"):
        found = {path: mode(path) for path in (place / "home").rglob("*") if path.is_file()}
    assert mode(place / "home") == 0o700
    assert not {path.name for path, bits in found.items() if bits & 0o077}
    names = {path.name for path in found}
    assert {"ledger.db", "ledger.db-wal", "ledger.db.lock", "serve.lock", ".run.lock"} <= names


@as_another_user
def test_another_user_neither_reads_nor_locks(place, tiny_checkpoint):
    home = place / "home"
    make_everything(home, tiny_checkpoint())
    try_lock(home / "serve.lock").release()
    assert run_as_nobody("ls", str(place)).returncode == 0
    for file in ("ledger.db", "corpus/train.safetensors", "corpus/inner/sample.txt",
                 "states/deep/state.json", "cooperative.toml", "keys/coordinator.pem"):  # fmt: skip
        assert run_as_nobody("cat", str(home / file)).returncode != 0
    for lock in ("ledger.db.lock", "serve.lock", "trace/.run.lock"):
        assert run_as_nobody("flock", "-n", str(home / lock), "true").returncode != 0
    # Behind the closed folder each file is closed, too.
    home.chmod(0o755)
    for file in ("ledger.db", "corpus/inner/sample.txt", "ledger.db.lock", "serve.lock"):
        assert run_as_nobody("cat", str(home / file)).returncode != 0
        assert run_as_nobody("flock", "-n", str(home / file), "true").returncode != 0


def test_a_home_of_an_earlier_version_is_closed(place):
    home = place / "home"
    home.mkdir(mode=0o755)
    (home / "serve.lock").touch(mode=0o644)
    with hold_lock(home / "serve.lock", what="a server"):
        assert mode(home) == 0o700 and mode(home / "serve.lock") == 0o600


def test_what_is_meant_for_others_keeps_the_umask(place):
    before = os.umask(0o022)
    try:
        write_json(place / "out" / "report.json", {})
        with replace_folder(place / "out" / "fused") as folder:
            write_json(folder / "fused.json", {})
    finally:
        os.umask(before)
    assert mode(place / "out") == mode(place / "out" / "fused") == 0o755
    assert mode(place / "out" / "report.json") == mode(place / "out/fused/fused.json") == 0o644


def test_a_home_of_somebody_else_is_refused(place, monkeypatch):
    (place / "home").mkdir()

    def refuse(self, mode):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    with pytest.raises(StorageError, match="Operation not permitted"):
        make_home(place / "home")
