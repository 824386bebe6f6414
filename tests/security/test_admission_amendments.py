"""H4, M12: neither an earlier amendment nor a charter nor a plugin is a way round the checks."""

from dataclasses import replace

import pytest
from door_helpers import Door, make_blocks

from molora_fed.charter import AdmissionRules, FusionRules, PopulationRules, SampleRules
from molora_fed.contributions.admission import MANDATORY
from molora_fed.contributions.states import ContributionState
from molora_fed.errors import AdmissionError
from molora_fed.plugins import load_plugins
from molora_fed.types import Split

ADMITTED, REJECTED = ContributionState.ADMITTED, ContributionState.REJECTED
PRIVATE = FusionRules(mode="population")
POOLED = FusionRules()


@pytest.fixture
def door(tmp_path, tiny_checkpoint):
    made = Door(tmp_path, tiny_checkpoint())
    yield made
    made.ledger.close()


def stop(monkeypatch, door, folder, at):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(f"molora_fed.contributions.receive.{at}", interrupt)
        door.receive(folder)


def test_a_newcomer_signs_an_earlier_private_amendment_and_is_not_admitted(door):
    door.amend(fusion=PRIVATE, population=PopulationRules(data="private"))
    folder = door.contribute()
    assert not list((folder / "samples").glob("*"))
    door.amend(fusion=POOLED)
    with pytest.raises(AdmissionError, match=r"1 to 3 admission blocks.*got none") as caught:
        door.receive(folder)
    assert "announced-sizes" in str(caught.value)


@pytest.mark.parametrize("at", ["_store_files", "admit"])
def test_what_came_under_a_private_amendment_is_not_admitted_under_a_pooled_one(
    door, monkeypatch, at
):
    door.amend(fusion=PRIVATE, population=PopulationRules(data="private"))
    folder = door.contribute()
    stop(monkeypatch, door, folder, at)
    door.amend(fusion=POOLED)
    receipt = door.receive(folder) if at == "_store_files" else door.restart()[0]
    assert receipt.state == REJECTED
    assert receipt.decision.losses is None
    (refusal,) = receipt.decision.refusals
    assert refusal.check == "required-samples" and "Sign it again under amendment 2" in refusal.fix


def test_what_was_received_under_an_amendment_is_counted_by_it(door, monkeypatch):
    folder = door.contribute()
    stop(monkeypatch, door, folder, "_store_files")
    fewer = SampleRules(calibration=2, admission=1, held_out=1)
    door.amend(samples=fewer)
    assert door.receive(folder).state == ADMITTED
    late = door.contribute("legal-2", charter=door.charter.model_copy(
        update={"amendment": door.charter.amendment.model_copy(
            update={"number": 0, "samples": SampleRules(calibration=4, admission=3, held_out=2)}
        )}
    ))  # fmt: skip
    with pytest.raises(AdmissionError, match="at most 1 admission blocks"):
        door.receive(late)


def test_an_admitted_one_stays_in_whatever_is_amended(door):
    door.receive(door.contribute())
    door.amend(samples=SampleRules(calibration=9, admission=9, held_out=9))
    assert door.restart() == []
    assert door.state() == ADMITTED


def test_the_history_says_which_amendment_was_in_force(door, monkeypatch):
    first = door.contribute()
    stop(monkeypatch, door, first, "_store_files")
    door.amend(seed=1)
    door.receive(door.contribute("legal-2"))
    door.amend(seed=2)
    entries = {entry.contributor: entry for entry in door.ledger.contributions()}
    assert door.ledger.find_amendment(entries["legal-1"].id).number == 0
    assert door.ledger.find_amendment(entries["legal-2"].id).number == 1
    assert door.ledger.find_amendment("0" * 64).number == 2


def test_no_charter_leaves_a_mandatory_check_out(door):
    for checks in ((), ("charter-identity",)):
        door.amend(admission=AdmissionRules(checks=checks))
        receipt = door.receive(door.contribute(f"legal-{len(checks)}"))
        assert receipt.state == ADMITTED
        assert set(receipt.decision.checks) >= set(MANDATORY)


def test_a_plugin_cannot_stand_in_place_of_the_core(door):
    plugins = load_plugins()
    entries = plugins.admission_checks._entries
    entries["near-copy"] = replace(entries["near-copy"], origin="mine (molora-mine 1.0)")
    receipt = door.receive(door.contribute(), plugins=plugins)
    assert receipt.state == ContributionState.QUARANTINED
    assert "in place of the core's" in receipt.decision.refusals[0].found


@pytest.mark.parametrize("missing", ["signature", "near-copy", "finite-values"])
def test_without_a_mandatory_check_nobody_is_admitted(door, missing):
    plugins = load_plugins()
    plugins.admission_checks._entries.pop(missing)
    receipt = door.receive(door.contribute(), plugins=plugins)
    assert receipt.state == ContributionState.QUARANTINED
    assert receipt.decision.refusals[0].check == missing


def test_a_sample_of_another_split_in_its_place_is_refused(door):
    samples = {s: make_blocks(s, 10) for s in Split}
    folder = door.contribute(samples=samples)
    source = (folder / "samples/held-out.safetensors").read_bytes()
    (folder / "samples/admission.safetensors").write_bytes(source)
    receipt = door.receive(door.sign_again(folder))
    assert receipt.state == REJECTED
