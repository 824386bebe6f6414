"""H2: no upload ends the coordinator, not even at its next start."""

import json

import pytest
from door_helpers import Door, edit_tensors, fill, write_raw

from molora_fed import hookimpl
from molora_fed.charter import AdmissionRules
from molora_fed.contributions.admission import AdmissionDecision, admit
from molora_fed.contributions.states import ContributionState
from molora_fed.plugins import load_plugins
from molora_fed.storage.files import canonical_json

QUARANTINED, REJECTED = ContributionState.QUARANTINED, ContributionState.REJECTED
SIZES = {
    "BF16": 16,
    "F16": 16,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "I64": 64,
    "F32": 32,
    "BOOL": 8,
    "U8": 8,
}


@pytest.fixture
def door(tmp_path, tiny_checkpoint):
    made = Door(tmp_path, tiny_checkpoint())
    yield made
    made.ledger.close()


def respell(path, dtype):
    """The same blocks with another dtype in the header."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    place = 0
    for name, entry in header.items():
        if name != "__metadata__":
            count = entry["shape"][0] * entry["shape"][1]
            entry["dtype"], length = dtype, count * SIZES[dtype] // 8
            entry["data_offsets"] = [place, place + length]
            place += length
    write_raw(path, header, b"\0" * place)


@pytest.mark.parametrize("dtype", sorted(SIZES))
def test_samples_of_any_dtype_are_refused_by_their_header(door, dtype):
    folder = door.contribute()
    for path in (folder / "samples").iterdir():
        respell(path, dtype)
    receipt = door.receive(door.sign_again(folder))
    assert receipt.state == REJECTED
    assert f"int32 in 'tokens', got {dtype}" in receipt.decision.refusals[0].message


@pytest.mark.parametrize("value", [1e30, -1e30, 3e38])
def test_finite_weights_with_losses_that_are_not_are_refused_and_written_down(door, value):
    adapter = door.adapter()
    edit_tensors(adapter, fill(value))
    receipt = door.receive(door.contribute(adapter=adapter))
    assert receipt.state in (QUARANTINED, REJECTED)
    (entry,) = door.ledger.contributions()
    assert entry.decision["losses"]["specialist"] is None  # and the ledger can be read again
    assert AdmissionDecision.from_json(entry.decision).to_json() == entry.decision
    assert door.restart() == []


class Failing:
    def __init__(self, error):
        self.error = error

    @hookimpl
    def register_admission_checks(self, register):
        def look(candidate):
            raise self.error

        register("failing", look, summary="Fails", source="test")


@pytest.mark.parametrize(
    "error",
    [ValueError("no"), RecursionError(), KeyError("x" * 10_000), MemoryError(), SystemExit(3)],
    ids=lambda error: type(error).__name__,
)
def test_a_check_that_fails_quarantines_with_its_reason(door, error):
    door.amend(admission=AdmissionRules(checks=("failing",)))
    plugins = load_plugins([("failing", Failing(error))])
    receipt = door.receive(door.contribute(), plugins=plugins)
    assert receipt.state == QUARANTINED
    (refusal,) = receipt.decision.refusals
    assert refusal.check == "failing" and type(error).__name__ in refusal.found
    assert len(refusal.message) < 1_500


def test_a_core_check_that_fails_quarantines_too(door, monkeypatch):
    def fail(*_, **__):
        raise TypeError("float() argument must be a string")

    monkeypatch.setattr("molora_fed.contributions.checks.find_non_finite", fail)
    receipt = door.receive(door.contribute())
    assert receipt.state == QUARANTINED
    assert "TypeError: float() argument" in receipt.decision.refusals[0].found


def test_a_check_that_nobody_registers_any_more_quarantines(door):
    door.amend(admission=AdmissionRules(checks=("finite-value",)))
    receipt = door.receive(door.contribute())
    assert receipt.state == QUARANTINED
    assert "Did you mean 'finite-values'" in receipt.decision.refusals[0].found


def test_what_stands_at_verified_is_decided_at_the_next_start(door, monkeypatch):
    """The ledger as the crash of an earlier version left it."""
    folder = door.contribute()
    for path in (folder / "samples").iterdir():
        respell(path, "BF16")
    door.sign_again(folder)
    with monkeypatch.context() as patched:
        patched.setattr(
            "molora_fed.contributions.receive.admit", lambda *_, **__: exec("raise TypeError")
        )
        with pytest.raises(TypeError):
            door.receive(folder)
    assert door.state() == ContributionState.VERIFIED
    good = door.contribute("legal-2")
    (receipt,) = door.restart()
    assert receipt.state == REJECTED
    assert door.receive(good).state == ContributionState.ADMITTED


def test_one_whose_files_are_gone_does_not_stop_the_others_at_a_start(door, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(
            "molora_fed.contributions.receive.admit", lambda *_, **__: exec("raise TypeError")
        )
        for name in ("legal-1", "legal-2"):
            with pytest.raises(TypeError):
                door.receive(door.contribute(name))
    lost = next(e for e in door.ledger.contributions() if e.contributor == "legal-1")
    door.store.path(lost.manifest.files["adapter/adapter_model.safetensors"].sha256).unlink()
    import shutil

    shutil.rmtree(door.store.root / "folders")
    receipts = {receipt.contributor: receipt for receipt in door.restart()}
    assert receipts["legal-1"].state == QUARANTINED
    assert "nothing there" in receipts["legal-1"].decision.refusals[0].found
    assert receipts["legal-2"].state == ContributionState.ADMITTED


def test_a_decision_with_figures_that_are_not_finite_can_be_signed(door):
    from molora_fed.contributions.admission import AdmissionLosses

    losses = AdmissionLosses(float("nan"), float("inf"))
    decision = AdmissionDecision(REJECTED, losses=losses)
    assert canonical_json(decision.to_json()["losses"]) == b'{"base":null,"specialist":null}'
    assert admit is not None
