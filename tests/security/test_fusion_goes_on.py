"""H5: one contribution that cannot be fused is quarantined, and the others are fused without it."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from growing_helpers import NAMES, contribute, found

from molora_fed.charter import SampleRules
from molora_fed.contributions.figures import pick_figures
from molora_fed.contributions.ledger import Ledger
from molora_fed.contributions.receive import build_receipt
from molora_fed.contributions.states import ContributionState, CooperativeState
from molora_fed.cooperative.admit import admit_contributions
from molora_fed.cooperative.amend import amend_by_settings
from molora_fed.cooperative.cooperative import open_cooperative
from molora_fed.cooperative.fuse import fuse_contributions
from molora_fed.errors import AdapterError, AdmissionError, ExpertError
from molora_fed.models.base import load_base

ADMITTED, QUARANTINED = ContributionState.ADMITTED, ContributionState.QUARANTINED


@pytest.fixture(scope="module")
def base(tiny_checkpoint):
    return load_base(tiny_checkpoint())


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """Three admitted contributions, nothing fused; copied by each test."""
    root = tmp_path_factory.mktemp("goes-on")
    cooperative = found(root / "home", base, compare=("evidence-zero",), router="evidence-zero")
    for seed, name in enumerate(list(NAMES)[:3], start=1):
        contribute(cooperative, base, root / "made", name, seed=seed)
    admit_contributions(cooperative, [root / "made" / name for name in list(NAMES)[:3]])
    return root


@pytest.fixture
def root(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def states(cooperative):
    with cooperative.read_ledger() as ledger:
        return {entry.contributor: entry.state for entry in ledger.contributions()}


def check_without(cooperative, fused, name, reason):
    """The fusion went on without one, and says so everywhere."""
    assert name not in {one.manifest.contributor for one in fused.contributions}
    assert fused.contributions
    assert states(cooperative)[name] == QUARANTINED
    with cooperative.read_ledger() as ledger:
        (entry,) = [e for e in ledger.contributions() if e.contributor == name]
        decision = build_receipt(ledger, entry, known=True).decision
        assert ledger.cooperative_state == CooperativeState.PUBLISHED
    assert decision.refusals[0].check == "fusion" and reason in decision.refusals[0].found
    result = json.loads((cooperative.folder / "result.json").read_text())
    assert reason in result["not_measured"]["contribution"][name]
    assert name in fused.report.read_text()


def test_one_whose_numbers_break_in_the_bank_is_left_out(root, monkeypatch):
    """It behaved on every sample at admission; on some block of the bank it does not."""
    from molora_fed.bank import passes

    cooperative = open_cooperative(root / "home")
    run = passes._check_finite

    def break_it(step, what, domain):
        if what == "law-2" and domain == "art":
            step = replace(step, logprob=step.logprob * torch.nan)
        run(step, what, domain)

    monkeypatch.setattr(passes, "_check_finite", break_it)
    fused = fuse_contributions(cooperative, ())
    check_without(cooperative, fused, "law-2", "finite log-probabilities")
    again = fuse_contributions(cooperative, ())
    assert len(again.contributions) == 2 and again.left_out == ()


def test_hidden_states_beyond_what_sums_hold_name_their_expert(monkeypatch):
    from molora_fed.bank.passes import _check_finite
    from molora_fed.models.forward import Pass

    for value in (torch.inf, torch.nan, 1e12):
        hidden = torch.full((1, 4, 2), value)
        with pytest.raises(ExpertError, match="hidden states of at most") as caught:
            _check_finite(Pass(0, torch.zeros(1, 4), hidden, None), "law-2", "art")
        assert caught.value.expert == "law-2"


def spoil(root, name, file, change):
    """Change a stored file of an admitted contribution, as an earlier version let it in."""
    (path,) = [
        each
        for each in (root / "home/blobs/folders").glob(f"*/{file}")
        if json.loads((each.parents[1] / "manifest.json").read_text())["contributor"] == name
    ]
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(change(data))


def test_one_whose_files_cannot_be_read_any_more_is_left_out(root):
    spoil(root, "art-1", "adapter/adapter_model.safetensors", lambda data: data[:-9])
    spoil(root, "law-1", "samples/calibration.safetensors", lambda data: b"no")
    cooperative = open_cooperative(root / "home")
    fused = fuse_contributions(cooperative, ())
    check_without(cooperative, fused, "art-1", "whole safetensors file")
    check_without(cooperative, fused, "law-1", "safetensors file of blocks")


def test_where_nobody_can_be_fused_nobody_is_blamed_on_another(root):
    for name in list(NAMES)[:3]:
        spoil(root, name, "samples/held-out.safetensors", lambda data: b"no")
    cooperative = open_cooperative(root / "home")
    with pytest.raises(AdmissionError, match="expected at least one contribution that can be"):
        fuse_contributions(cooperative, ())
    assert set(states(cooperative).values()) == {QUARANTINED}


def test_who_came_before_calibration_blocks_were_asked_for_is_left_out(base, tmp_path):
    cooperative = found(tmp_path / "home", base, compare=(), router="evidence-zero")
    cooperative, _ = amend_by_settings(cooperative, ["samples.calibration=0"])
    early = contribute(cooperative, base, tmp_path / "made", "law-1", seed=1)
    admit_contributions(cooperative, [early])
    cooperative, _ = amend_by_settings(cooperative, ["samples.calibration=12"])
    late = contribute(cooperative, base, tmp_path / "made", "art-1", seed=2)
    admit_contributions(cooperative, [late])
    fused = fuse_contributions(cooperative, ())
    check_without(cooperative, fused, "law-1", "calibration blocks that amendment 2 asks for")


def test_blocks_that_nobody_asks_for_any_more_are_not_used(root, base):
    cooperative, _ = amend_by_settings(open_cooperative(root / "home"), ["samples.calibration=0"])
    late = contribute(cooperative, base, root / "made", "war-1", seed=4)
    admit_contributions(cooperative, [late])
    fused = fuse_contributions(cooperative, ())
    assert len(fused.contributions) == 4 and fused.left_out == ()
    assert cooperative.charter.amendment.samples == SampleRules(
        calibration=0, admission=6, held_out=12
    )


TRAININGS = [
    {"steps": "ten"}, {"steps": [1]}, {"steps": None}, {"steps": 10**400}, {"tokens": -1},
    {"seconds": "long"}, {"seconds": -1.0}, {"kind": "[/x]" * 100}, {"domain": {"a": 1}},
    {"threads": True}, {"parameters": 1.5}, {"steps": 2**60}, {"x": 10**30},
    {"deep": json.loads("[" * 60 + "]" * 60)},
]  # fmt: skip


@pytest.mark.parametrize("training", TRAININGS, ids=lambda value: repr(value)[:30])
def test_a_training_record_is_typed_at_the_door(root, base, training):
    cooperative = open_cooperative(root / "home")
    from molora_fed.contributions.manifest import parse_manifest

    folder = root / "made" / "law-1"
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["training"] = {**manifest["training"], **training}
    with pytest.raises(AdapterError) as caught:
        parse_manifest(json.dumps(manifest).encode())
    assert len(str(caught.value)) < 2_500 and "\n" not in str(caught.value)
    assert cooperative.charter is not None


def test_a_record_that_an_earlier_version_let_in_breaks_no_report(root):
    """The manifest lies in the ledger already."""
    assert pick_figures({"steps": "ten", "tokens": 10**400, "seconds": 1.5, "kind": None}) == {
        "seconds": 1.5
    }
    import sqlite3

    path = root / "home" / "ledger.db"
    connection = sqlite3.connect(path)
    (text,) = connection.execute(
        "SELECT manifest FROM contributions WHERE contributor = 'law-1'"
    ).fetchone()
    manifest = json.loads(text)
    manifest["training"] = {"steps": "ten", "tokens": 10**400, "deep": [[[[]]]]}
    connection.execute("DROP TRIGGER contributions_unchanged")
    connection.execute(
        "UPDATE contributions SET manifest = ? WHERE contributor = 'law-1'",
        (json.dumps(manifest, sort_keys=True, separators=(",", ":")),),
    )
    connection.commit()
    connection.close()
    with Ledger(path) as ledger:
        entry = next(e for e in ledger.contributions() if e.contributor == "law-1")
        assert entry.manifest.training["steps"] == "ten"
