"""What an upload does to the coordinator's worker: a reason for its contributor, nothing else."""

from types import SimpleNamespace

import pytest
from hostile import PART_BYTES, make_key, open_coordinator

from molora_fed.contributions.states import ContributionState
from molora_fed.contributions.store import BlobStore
from molora_fed.errors import AdmissionError
from molora_fed.federation import coordinator as coordinating
from molora_fed.federation.coordinator import CoordinatorWorker
from molora_fed.federation.envelopes import keep_letter, read_letter
from molora_fed.federation.homes import CoordinatorHome
from molora_fed.federation.kept import HelloRecord, Offer
from molora_fed.federation.letters import Acknowledgement
from molora_fed.federation.mailbox import read_parts
from molora_fed.federation.messages import describe_folder, plan_parts
from molora_fed.federation.quota import check_quota, discard_rejected
from molora_fed.storage.keys import build_public_pem, key_fingerprint, load_key

CONTRIBUTION_BYTES = 100


class FakeLedger:
    """What the quota asks of a ledger."""

    def __init__(self, *entries):
        self.entries = entries

    def contributors(self):
        fingerprint = key_fingerprint(build_public_pem(make_key(1)))
        mine = SimpleNamespace(name="mine", fingerprint=fingerprint)
        return [mine, SimpleNamespace(name="other", fingerprint="f" * 64)]

    def contributions(self, *states):
        return list(self.entries)

    def find_contribution(self, contribution_id):
        return next((one for one in self.entries if one.id == contribution_id), None)


def entry(name, state, size, number=0):
    return SimpleNamespace(
        id=f"{name}-{number}", contributor=name, state=ContributionState(state),
        manifest=SimpleNamespace(num_bytes=size),
    )  # fmt: skip


def manifest(size, contribution_id="new"):
    return SimpleNamespace(
        contribution_id=contribution_id, contributor="mine", num_bytes=size,
        public_key=build_public_pem(make_key(1)),
    )  # fmt: skip


def test_one_key_keeps_only_so_much():
    kept = [entry("mine", "QUARANTINED", 100, n) for n in range(3)]
    others = [entry("other", "ADMITTED", 10_000), entry("mine", "REJECTED", 10_000, 8)]
    ledger = FakeLedger(*kept, *others, entry("mine", "WITHDRAWN", 10_000, 9))
    check_quota(ledger, manifest(100), contribution_bytes=CONTRIBUTION_BYTES)
    check_quota(ledger, manifest(10_000, "mine-0"), contribution_bytes=CONTRIBUTION_BYTES)
    with pytest.raises(AdmissionError, match="under one key") as caught:
        check_quota(ledger, manifest(101), contribution_bytes=CONTRIBUTION_BYTES)
    assert "\n" not in str(caught.value)


def test_files_of_refused_uploads_are_deleted(tmp_path, monkeypatch):
    from molora_fed.contributions import receive

    store = BlobStore(tmp_path)
    files = {n: {f"f{n}": store.put_bytes(b"blob %d" % n)} for n in range(4)}
    shared = store.put_bytes(b"shared")
    entries = [
        entry("mine", "REJECTED", 1, 0), entry("mine", "RECEIVED", 1, 1),
        entry("mine", "QUARANTINED", 1, 2), entry("other", "REJECTED", 1, 3),
    ]  # fmt: skip
    for one in entries:
        one.files = {**files[int(one.id[-1])], "shared": shared}
    monkeypatch.setattr(receive, "list_stored_files", lambda one: one.files)
    freed = discard_rejected(FakeLedger(*entries), store, build_public_pem(make_key(1)))
    assert freed == len(b"blob 0blob 1")
    assert [store.has(one.files[f"f{n}"]) for n, one in enumerate(entries)] == [
        False, False, True, True,
    ]  # fmt: skip
    assert store.has(shared)


@pytest.mark.parametrize(
    "error", [RecursionError("deep"), ValueError("\x1b[2J" * 10**5), OSError(5)]
)
def test_whatever_a_check_does_the_others_are_taken(tmp_path, monkeypatch, error):
    open_coordinator(tmp_path)
    home = CoordinatorHome(tmp_path)
    for number in (1, 2):
        pem = build_public_pem(make_key(number))
        mailbox = home.contributor(key_fingerprint(pem))
        source = tmp_path / "sources" / str(number)
        source.mkdir(parents=True)
        (source / "a.bin").write_bytes(b"%d" % number)
        files = describe_folder(source)
        record = HelloRecord(public_key=pem, name=f"node-{number}", domain="python")
        keep_letter(mailbox.hello_file, record)
        keep_letter(mailbox.offer_file, Offer(id=files.id, files=files))
        for part in read_parts(source, files, plan_parts(files, part_bytes=PART_BYTES)):
            mailbox.parts.put(part)
    worker = CoordinatorWorker.__new__(CoordinatorWorker)
    worker._home, worker._key, worker._message_bytes = home, load_key(home.key), PART_BYTES
    worker._ledger, worker._cooperative = FakeLedger(), SimpleNamespace(store=BlobStore(tmp_path))
    monkeypatch.setattr(worker, "_show", lambda: None)

    def receive(delivery, folder):
        if delivery.name == "node-1":
            raise error
        return SimpleNamespace(contribution_id="c", state="ADMITTED", decision=None)

    monkeypatch.setattr(worker, "_receive", receive)
    for delivery in list(coordinating.complete_deliveries(home, part_bytes=PART_BYTES)):
        worker._take(delivery)
    states = {}
    for mailbox in home.contributors():
        (path,) = mailbox.list_acknowledgements()
        letter = read_letter(path, Acknowledgement)
        states[mailbox.name] = letter.state
        assert all(len(one) <= 1_000 and "\x1b" not in one for one in letter.findings)
        assert mailbox.parts.held() == set()
    assert states == {"node-1": "REJECTED", "node-2": "ADMITTED"}
