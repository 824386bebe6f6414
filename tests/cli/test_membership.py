"""Changing who and what: admit, contribute, withdraw, amend, recommend."""

import json
import re
import shutil

import pytest

from molora_fed.adapters.compatibility import applied
from molora_fed.adapters.files import load_adapter
from molora_fed.contributions.manifest import load_contribution
from molora_fed.contributions.states import ContributionState
from molora_fed.cooperative.cooperative import open_cooperative
from molora_fed.models.base import load_base


@pytest.fixture
def tiny(setup, tmp_path):
    shutil.copytree(setup.cooperative, tmp_path / "tiny")
    return tmp_path / "tiny"


def test_admit_withdraw_and_fuse_again(molora, setup, tiny):
    ran = molora("coop", "admit", tiny, *setup.trained.values())
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.count("ADMITTED") == 2
    assert len(re.findall(r"changed (\d+) of \1 modules", ran.out)) == 2
    assert "abc-1" in ran.out and "xyz-1" in ran.out
    assert molora("fuse", "--cooperative", tiny).code == 0
    assert (tiny / "fused" / "fused.json").is_file()

    ran = molora("coop", "withdraw", tiny, "xyz-1", "--reason", "changed its mind")
    assert (ran.code, ran.err) == (0, "")
    assert load_contribution(setup.trained["xyz"] / "contribution").id in ran.out
    assert "still in     abc-1" in ran.out and "retracted" in ran.out
    assert not (tiny / "fused").exists()

    assert molora("fuse", "--cooperative", tiny).code == 0
    result = json.loads((tiny / "result.json").read_text())
    assert set(result["losses"]["specialists"]) == {"abc-1"}
    ran = molora("fuse", "--cooperative", tiny, setup.trained["xyz"])
    assert ran.code == 22 and "a withdrawn one" in ran.err


def test_admit_says_what_is_wrong_and_keeps_the_rest(molora, setup, tiny, tmp_path):
    raised = molora("coop", "amend", tiny, "--set", "admission.max_loss_rise=0")
    assert raised.code == 0
    with open_cooperative(tiny).open_ledger():
        ran = molora("coop", "admit", tiny, setup.trained["abc"])
    assert ran.code == 25 and "only writer" in ran.err
    other = tmp_path / "other"
    create = ("coop", "create", "other", "--base", setup.cooperative / "base", "--folder", other)
    assert molora(*create, "--block-size", 32, "--privacy", "pooled").code == 0
    ran = molora("coop", "admit", other, *setup.trained.values())
    assert ran.code == 22
    assert len(ran.err.splitlines()) == 1
    assert ran.out.count("REJECTED") == 2 and ran.err.count("charter-identity") == 2


def test_withdraw_of_a_stranger_is_one_line(molora, tiny):
    ran = molora("coop", "withdraw", tiny, "nobody")
    assert ran.code == 25
    assert "expected one who is in (nobody is)" in ran.err
    assert len(ran.err.splitlines()) == 1


def test_amend_prints_what_changes(molora, tiny):
    ran = molora(
        "coop", "amend", tiny, "--set", "fusion.router=linear", "--set", "samples.held_out=9"
    )
    assert (ran.code, ran.err) == (0, "")
    assert "Amendment 1 of cooperative 'tiny' is signed." in ran.out
    lines = [line.split() for line in ran.out.splitlines()]
    assert ["fusion.router", "evidence-mixed", "linear"] in lines
    assert ["samples.held_out", "160", "9"] in lines
    assert open_cooperative(tiny).charter.amendment.number == 1
    again = molora("coop", "amend", tiny, "--set", "fusion.router=linear")
    assert (again.code, again.out) == (0, "Nothing changes: amendment 1 says so already.\n")
    wrong = molora("coop", "amend", tiny, "--set", "fusion.ruoter=linear")
    assert wrong.code == 11 and "such as fusion.router" in wrong.err


def test_contributions_signed_before_an_amendment_stay_valid(molora, setup, tiny):
    assert molora("coop", "amend", tiny, "--set", "training.steps=99").code == 0
    assert molora("coop", "admit", tiny, setup.trained["abc"]).code == 0
    with open_cooperative(tiny).read_ledger() as ledger:
        (entry,) = ledger.contributions(ContributionState.ADMITTED)
    assert entry.manifest.amendment == 0


def test_recommend_and_the_hint_of_create(molora, tmp_path, tiny_checkpoint):
    short, long = (molora("coop", "recommend", "--steps", n, "--blocks", 24) for n in (300, 20_000))
    assert "Frozen depth 0 for 300 steps" in short.out
    assert "Frozen depth 4 for 20,000 steps" in long.out and "2603.22755" in long.out
    create = ("coop", "create", "one", "--base", tiny_checkpoint(), "--block-size", 32)
    hinted = molora(*create, "--folder", tmp_path / "a", "--steps", 20_000)
    assert hinted.code == 0 and "This cooperative freezes 0." in hinted.err
    follows = molora(*create, "--folder", tmp_path / "b", "--steps", 20_000, "--frozen-depth", 1)
    assert (follows.code, follows.err) == (0, "")


def test_contribute_a_checkpoint_that_was_fine_tuned_elsewhere(molora, setup, tiny, tmp_path):
    base = load_base(tiny / "base")
    adapter = load_adapter(setup.trained["abc"] / "adapter")
    with applied(base.model, adapter) as model:
        model.save_pretrained(tmp_path / "tuned")
    arguments = (
        "contribute", "--cooperative", tiny, "--checkpoint", tmp_path / "tuned", "--domain", "abc",
        "--data", setup.texts["abc"], "--out", tmp_path / "out", "--name", "abc-9",
    )  # fmt: skip
    ran = molora(*arguments)
    assert ran.code == 20 and "expected one of svd, delta, got 'lora'" in ran.err
    ran = molora(*arguments, "--kind", "delta", "--started-from", tiny / "base")
    assert (ran.code, ran.err) == (0, "")
    manifest = load_contribution(tmp_path / "out" / "contribution").manifest
    assert manifest.contamination is None and manifest.start_loss > 0
    assert f"Specialist 'abc-9' (delta): validation loss {manifest.specialist_loss:.4f}" in ran.out
    trained = load_contribution(setup.trained["abc"] / "contribution").manifest
    assert manifest.specialist_loss == pytest.approx(trained.specialist_loss, abs=1e-4)
    assert molora("coop", "admit", tiny, tmp_path / "out").code == 0
    # As one of the same training: what it started from is no matter of opinion.
    more = ("--kind", "delta", "--started-from", tmp_path / "tuned", "--name", "abc-8")
    wrong = molora(*arguments, *more)
    assert wrong.code == 0
    ran = molora("coop", "admit", tiny, tmp_path / "out")
    assert ran.code == 22 and "shared-initialisation" in ran.err and "QUARANTINED" in ran.out
