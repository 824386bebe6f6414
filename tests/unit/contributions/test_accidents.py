"""Receiving survives a kill at any moment and a full disk; real processes, nothing mocked."""

import shutil
import signal

import pytest
from forking_helpers import run_forked
from receive_in_process import receive_with_accident

from molora_fed.charter import write_charter
from molora_fed.contributions.ledger import Ledger, LedgerReader
from molora_fed.contributions.manifest import load_contribution
from molora_fed.contributions.receive import load_admitted, receive_contribution
from molora_fed.contributions.store import BlobStore
from molora_fed.errors import StorageError
from molora_fed.storage.files import hash_file

STATE_AFTER_KILL = {
    "first-commit": None,
    "before-files": "RECEIVED",
    "mid-file": "RECEIVED",
    "verified-commit": "RECEIVED",
    "before-admission": "VERIFIED",
    "decision-commit": "VERIFIED",
    "before-receipt": "ADMITTED",
}


def run(home, contribution, accident, *more):
    arguments = (home / "ledger.db", contribution, home.parent / "cooperative.toml", accident)
    return run_forked(home.parent / "said", receive_with_accident, *arguments, *more)


def check_whole(home):
    """Every blob hashes to its name; everything admitted can be opened."""
    store = BlobStore(home / "blobs")
    if store.root.exists():
        for path in store.root.iterdir():
            if path.is_file() and not path.name.startswith("."):
                assert hash_file(path) == path.name
    with LedgerReader(home / "ledger.db") as ledger:
        for admitted in load_admitted(ledger, store):
            assert load_contribution(admitted.folder) == admitted
        return [str(entry.state) for entry in ledger.contributions()]


@pytest.fixture
def home(tmp_path, ledger_path, charter):
    write_charter(charter, tmp_path / "cooperative.toml")
    return ledger_path.parent


@pytest.fixture
def go_on(charter, base, plugins):
    """`go_on(home, folder)`: the receipt of receiving the same contribution again."""

    def run(home, folder):
        with Ledger(home / "ledger.db") as ledger:
            store = BlobStore(home / "blobs")
            return receive_contribution(
                ledger, store, folder, charter=charter, base=base, plugins=plugins
            )

    return run


def test_kill_at_any_moment_loses_nothing(home, contribute, go_on, tmp_path):
    contribution = contribute()
    homes = {name: shutil.copytree(home, tmp_path / name / "home") for name in STATE_AFTER_KILL}
    for name in homes:
        shutil.copy(tmp_path / "cooperative.toml", tmp_path / name)

    for name in homes:
        killed = run(homes[name], contribution.folder, name)
        assert killed.code == -signal.SIGKILL, (name, killed.err)
    for name, expected in STATE_AFTER_KILL.items():
        assert check_whole(homes[name]) == ([] if expected is None else [expected]), name
        receipt = go_on(homes[name], contribution.folder)
        assert (receipt.state, receipt.known) == ("ADMITTED", expected == "ADMITTED"), name
        assert check_whole(homes[name]) == ["ADMITTED"], name
        assert not list((homes[name] / "blobs").glob(".*")), name
        with LedgerReader(homes[name] / "ledger.db") as ledger:
            events = [event.what for event in ledger.events()]
        assert events == [
            "amendment-added",
            "contributor-registered",
            "contribution-received",
            "contribution-changed",
            "contribution-changed",
        ], name


@pytest.mark.parametrize(
    ("limit", "states", "what"),
    [(2_000, [], "ledger.db"), (50_000, ["RECEIVED"], "blobs")],
    ids=["ledger", "adapter"],
)
def test_disk_full_leaves_nothing_half_written(
    home, contribute, write_adapter, go_on, limit, states, what
):
    contribution = contribute(adapter=write_adapter(kind="delta"), kind="delta")
    assert max(entry.bytes for entry in contribution.manifest.files.values()) > 50_000
    refused = run(home, contribution.folder, "disk-full", limit)
    assert refused.code == StorageError.exit_code, refused.err
    assert refused.out == ""
    message = refused.err.strip()
    assert message.startswith("Cannot ")
    assert what in message
    assert "Free some space" in message
    assert "\n" not in message
    assert check_whole(home) == states
    blobs = home / "blobs"
    assert not blobs.exists() or not list(blobs.glob(".*"))
    assert go_on(home, contribution.folder).state == "ADMITTED"
    assert check_whole(home) == ["ADMITTED"]
