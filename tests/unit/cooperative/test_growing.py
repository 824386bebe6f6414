"""Growing and shrinking: one pass where something is new, one refit, and nobody retrains."""

import shutil

import pytest
from growing_helpers import NAMES, Passes, contribute, found

import molora_fed.federation.withdrawal
import molora_fed.training.adapter_job
import molora_fed.training.language_model
from molora_fed.adapters.files import hash_adapter_files
from molora_fed.contributions.contributed import collect_contributed
from molora_fed.contributions.manifest import load_contribution
from molora_fed.contributions.receive import load_admitted, receive_contribution
from molora_fed.contributions.states import ContributionState, CooperativeState
from molora_fed.cooperative.admit import admit_contributions
from molora_fed.cooperative.amend import amend_by_settings
from molora_fed.cooperative.cooperative import open_cooperative
from molora_fed.cooperative.fuse import fuse_contributions
from molora_fed.cooperative.judging import release
from molora_fed.errors import AdapterError, LedgerError, StorageError
from molora_fed.federation.withdrawal import withdraw_contributor
from molora_fed.fusion.fuse import fuse
from molora_fed.models.base import load_base
from molora_fed.routing.bundle import load_manifest
from molora_fed.storage.files import hash_file
from molora_fed.types import Split

ADMITTED, WITHDRAWN = ContributionState.ADMITTED, ContributionState.WITHDRAWN


@pytest.fixture(scope="module")
def base(tiny_checkpoint):
    return load_base(tiny_checkpoint())


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """A published cooperative of three, a fourth contribution beside it; copied by each test."""
    root = tmp_path_factory.mktemp("growing")
    cooperative = found(root / "home", base)
    for seed, name in enumerate(NAMES, start=1):
        contribute(cooperative, base, root / "made", name, seed=seed)
    fuse_contributions(cooperative, [root / "made" / name for name in list(NAMES)[:3]])
    return root


@pytest.fixture
def root(whole, tmp_path, monkeypatch):
    """A copy of it, in which nobody may train."""
    shutil.copytree(whole, tmp_path / "copy")

    def refuse(*_, **__):
        raise AssertionError("somebody trained")

    monkeypatch.setattr(molora_fed.training.adapter_job, "train", refuse)
    monkeypatch.setattr(molora_fed.training.language_model, "train", refuse)
    return tmp_path / "copy"


def adapter_hashes(root):
    return {name: hash_adapter_files(root / "made" / name / "adapter") for name in NAMES}


def blocks_of(root, name, *splits):
    contribution = load_contribution(root / "made" / name)
    return {contribution.load_samples(split).fingerprint for split in splits}


def all_blocks(root, names, *splits):
    return set().union(*(blocks_of(root, name, *splits) for name in names))


def fuse_afresh(root, tmp_path, base, names):
    """The same fusion where nobody else ever was, from nothing."""
    charter = open_cooperative(root / "home").charter
    contributed = [collect_contributed(load_contribution(root / "made" / name)) for name in names]
    return fuse(base, charter, contributed, tmp_path / "fresh")


MEASURED = ("losses", "gain_percent", "oracle_gap_nats", "gates", "experts")


def check_equal(one, other):
    for key in MEASURED:
        assert one.result[key] == other.result[key], key
    left, right = (load_manifest(fused.fused_folder) for fused in (one, other))
    # All but where the base lies; the router's state comes with its hash.
    assert (left.experts, left.router, left.mixture) == (right.experts, right.router, right.mixture)


def split_passes(root, passes):
    """Passes of base and experts, and those of merged models, which are no experts."""
    experts = {"", *adapter_hashes(root).values()}
    done = passes.take()
    assert len(done) == len(set(done)), "a model ran over the same blocks twice"
    return {p for p in done if p[0] in experts}, {p for p in done if p[0] not in experts}


def test_a_later_contribution_costs_what_is_new_and_no_training(root, base, tmp_path, monkeypatch):
    cooperative, passes = open_cooperative(root / "home"), Passes(monkeypatch)
    old, new = list(NAMES)[:3], "war-1"
    before = {name: hash_file(root / "made" / name / "manifest.json") for name in NAMES}
    (receipt,) = admit_contributions(cooperative, [root / "made" / new])
    assert receipt.state == ADMITTED
    assert passes.take() == []  # admission measures losses and makes no column
    grown = fuse_contributions(cooperative, ())
    assert [one.manifest.contributor for one in grown.contributions] == sorted(
        NAMES, key=lambda name: load_contribution(root / "made" / name).id
    )
    experts, merged = split_passes(root, passes)
    hashes, own = adapter_hashes(root), (Split.CALIBRATION, Split.HELD_OUT)
    # The newcomer over everyone's blocks, everyone else over the newcomer's: nothing besides.
    expected = {(hashes[new], part) for part in all_blocks(root, NAMES, *own)}
    expected |= {
        (adapter, part)
        for adapter in ("", *(hashes[name] for name in old))
        for part in blocks_of(root, new, *own)
    }
    assert experts == expected
    assert {part for _, part in merged} == all_blocks(root, NAMES, Split.HELD_OUT)
    assert len({adapter for adapter, _ in merged}) == 1  # the new weight average
    with cooperative.read_ledger() as ledger:
        assert ledger.cooperative_state == CooperativeState.PUBLISHED
    assert {n: hash_file(root / "made" / n / "manifest.json") for n in NAMES} == before
    check_equal(grown.result, fuse_afresh(root, tmp_path, base, NAMES))


def test_a_withdrawal_costs_no_pass_of_those_who_stay(root, base, tmp_path, monkeypatch):
    cooperative, passes = open_cooperative(root / "home"), Passes(monkeypatch)
    done = withdraw_contributor(cooperative, "law-2", reason="asked for it")
    assert done.remaining == ("art-1", "law-1") and done.retracted and done.freed_bytes > 0
    # One pass of the leaver, which takes it out of the average that `linear` reads.
    left = all_blocks(root, ["law-1", "art-1"], Split.CALIBRATION, Split.HELD_OUT)
    assert set(passes.take()) == {(adapter_hashes(root)["law-2"], part) for part in left}
    shrunk = fuse_contributions(cooperative, ())
    experts, merged = split_passes(root, passes)
    assert experts == set()
    assert len({adapter for adapter, _ in merged}) == 1
    names = {expert.name for expert in load_manifest(cooperative.folder / "fused").experts}
    assert names == {"base", "law-1", "art-1"}
    check_equal(shrunk.result, fuse_afresh(root, tmp_path, base, ["law-1", "art-1"]))


def test_without_a_router_that_reads_the_average_a_withdrawal_runs_nothing(
    root, base, tmp_path, monkeypatch
):
    cooperative = found(tmp_path / "plain", base, compare=("evidence-zero",))
    # Samples and adapters are those of the other cooperative; only who signs for what differs.
    for seed, name in enumerate(list(NAMES)[:3], start=1):
        contribute(cooperative, base, tmp_path / "made", name, seed=seed)
    fuse_contributions(cooperative, [tmp_path / "made" / name for name in list(NAMES)[:3]])
    passes = Passes(monkeypatch)
    withdraw_contributor(cooperative, "law-2")
    assert passes.take() == []
    fuse_contributions(cooperative, ())
    assert split_passes(root, passes)[0] == set()


def hash_files(folder):
    return {
        path.relative_to(folder).as_posix(): hash_file(path)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_in_and_out_again_leaves_the_model_as_it_was(root, monkeypatch):
    cooperative = open_cooperative(root / "home")
    fused = cooperative.folder / "fused"
    before = hash_files(fused)
    admit_contributions(cooperative, [root / "made" / "war-1"])
    fuse_contributions(cooperative, ())
    assert hash_files(fused)["fused.json"] != before["fused.json"]
    withdraw_contributor(cooperative, "war-1")
    passes = Passes(monkeypatch)
    fuse_contributions(cooperative, ())
    assert split_passes(root, passes)[0] == set()
    assert hash_files(fused) == before


def test_an_amended_router_costs_one_refit(root, monkeypatch):
    cooperative = open_cooperative(root / "home")
    amended, _ = amend_by_settings(cooperative, ["fusion.router=linear", "fusion.compare="])
    passes = Passes(monkeypatch)
    fused = fuse_contributions(amended, ())
    assert passes.take() == []
    methods = fused.result.result["losses"]["fused"]
    assert "linear" in methods and "evidence" not in methods
    assert load_manifest(cooperative.folder / "fused").router.name == "linear"


def find_traces(folder, contribution):
    """Files that hold, byte by byte, something only this contribution brought."""
    wanted = {
        hash_file(path) for path in contribution.folder.rglob("*") if path.suffix == ".safetensors"
    }
    return [
        path
        for path in folder.rglob("*")
        if path.is_file() and (path.name in wanted or hash_file(path) in wanted)
    ]


def test_nothing_of_the_withdrawn_is_left_but_what_the_ledger_proves(root):
    cooperative = open_cooperative(root / "home")
    gone, kept = (load_contribution(root / "made" / name) for name in ("law-2", "art-1"))
    assert find_traces(cooperative.folder, gone)
    columns = len(list((cooperative.folder / "bank").iterdir()))
    withdraw_contributor(cooperative, "law-2", reason="left the project")
    assert find_traces(cooperative.folder, gone) == []
    assert find_traces(cooperative.folder, kept)
    # Losses of two experts and the base, what is left of two totals, and what leaves the frozen
    # blocks, on samples of two.
    left = [path.suffix for path in (cooperative.folder / "bank").iterdir()]
    assert (left.count(".bin"), left.count(".json")) == ((3 + 1 + 1) * 2 * 2, 2 * 2)
    assert len(left) < columns
    with cooperative.read_ledger() as ledger:
        entry = ledger.find_contribution(gone.id)
        assert entry.state == WITHDRAWN
        assert entry.manifest == gone.manifest and entry.signature == gone.signature
        (event,) = [e for e in ledger.events() if e.what == "withdrawal-decided"]
        assert event.data == {"contributor": "law-2", "reason": "left the project"}
        assert len(load_admitted(ledger, cooperative.store)) == 2


def test_a_withdrawal_stopped_in_between_goes_on(root, monkeypatch):
    cooperative = open_cooperative(root / "home")
    gone = load_contribution(root / "made" / "law-2")

    def fail(*_, **__):
        raise StorageError("Cannot write: full. Free some space.")

    with monkeypatch.context() as patched:
        patched.setattr(molora_fed.federation.withdrawal, "prune_bank", fail)
        with pytest.raises(StorageError):
            withdraw_contributor(cooperative, "law-2")
    assert find_traces(cooperative.folder, gone)
    first = withdraw_contributor(cooperative, "law-2")
    assert first.freed_bytes > 0
    assert find_traces(cooperative.folder, gone) == []
    again = withdraw_contributor(cooperative, "law-2")
    assert (again.freed_bytes, again.remaining) == (0, first.remaining)
    with cooperative.read_ledger() as ledger:
        assert [e.what for e in ledger.events()].count("withdrawal-decided") == 1


def test_what_others_share_with_the_withdrawn_stays(root, base):
    """Two contributors with the same samples: the files are one blob."""
    cooperative = open_cooperative(root / "home")
    twin = contribute(cooperative, base, root / "made", "law-3", seed=3, domain="law")
    # The same adapter and text as law-2's under another key: a person has to let it in.
    (receipt,) = admit_contributions(cooperative, [twin])
    assert receipt.state == ContributionState.QUARANTINED
    assert release(cooperative, "law-3", reason="the same person").state == ADMITTED
    withdraw_contributor(cooperative, "law-2")
    with cooperative.read_ledger() as ledger:
        left = load_admitted(ledger, cooperative.store)
    for contribution in left:
        assert load_contribution(contribution.folder) == contribution
        for split in contribution.manifest.sample_files:
            contribution.load_samples(split)
    fuse_contributions(cooperative, ())


def test_the_withdrawn_may_come_back_with_another_contribution_only(root, base):
    cooperative = open_cooperative(root / "home")
    withdraw_contributor(cooperative, "law-2")
    with cooperative.open_ledger() as ledger:
        again = receive_contribution(
            ledger,
            cooperative.store,
            root / "made" / "law-2",
            charter=cooperative.charter,
            base=base,
        )
        assert (again.state, again.known) == (WITHDRAWN, True)
        entry = ledger.find_contribution(again.contribution_id)
        with pytest.raises(AdapterError, match="withdrawn one, whose files are deleted"):
            from molora_fed.contributions.receive import load_stored

            load_stored(entry, cooperative.store)
    other = contribute(cooperative, base, root / "made", "law-2", seed=9)
    (receipt,) = admit_contributions(cooperative, [other])
    assert receipt.state == ADMITTED
    assert len(fuse_contributions(cooperative, ()).contributions) == 3


def test_the_last_one_out_leaves_no_model(root):
    cooperative = open_cooperative(root / "home")
    left = [withdraw_contributor(cooperative, name) for name in ("law-1", "law-2", "art-1")]
    assert [one.retracted for one in left] == [True, False, False]
    assert left[-1].remaining == ()
    assert not (cooperative.folder / "fused").exists()
    assert list((cooperative.folder / "bank").iterdir()) == []


@pytest.mark.parametrize("name", ["war-1", "nobody"])
def test_who_is_not_in_cannot_be_withdrawn(root, name):
    with pytest.raises(LedgerError, match=r"one who is in \(art-1, law-1, law-2\)") as caught:
        withdraw_contributor(open_cooperative(root / "home"), name)
    assert "\n" not in str(caught.value)


def test_a_cooperative_that_is_served_is_not_touched(root):
    cooperative = open_cooperative(root / "home")
    with cooperative.open_ledger(), pytest.raises(LedgerError, match="only writer"):
        withdraw_contributor(cooperative, "law-2")
    assert (cooperative.folder / "fused").exists()
