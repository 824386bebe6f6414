import json
import re
import shutil

import pytest

from molora_fed.contributions.manifest import load_contribution, parse_manifest
from molora_fed.contributions.reading import sign_amendment
from molora_fed.contributions.receive import (
    admit_pending,
    load_admitted,
    load_stored,
    receive_contribution,
)
from molora_fed.contributions.states import ContributionState
from molora_fed.errors import AdapterError, AdmissionError, LedgerError, SignatureError
from molora_fed.storage.files import canonical_json
from molora_fed.storage.keys import sign
from molora_fed.types import Split

ADMITTED, REJECTED = ContributionState.ADMITTED, ContributionState.REJECTED


@pytest.fixture
def receive(ledger, store, charter, base, plugins):
    """`receive(folder)`: the receipt."""

    def run(folder, **changes):
        arguments = {"charter": charter, "base": base, "plugins": plugins, **changes}
        return receive_contribution(ledger, store, folder, **arguments)

    return run


def snapshot(ledger, store):
    blobs = {p.relative_to(store.root) for p in store.root.rglob("*")}
    return ledger.contributions(), ledger.contributors(), blobs


def resign(folder, key, change):
    """Change a manifest and sign it anew, as a contributor of bad will could."""
    value = json.loads((folder / "manifest.json").read_text())
    change(value)
    (folder / "manifest.json").write_text(json.dumps(value))
    (folder / "signature").write_text(sign(key, canonical_json(value)))


def test_good_contribution_is_stored_and_admitted(receive, contribute, ledger, store):
    contribution = contribute()
    receipt = receive(contribution.folder)
    assert (receipt.state, receipt.known) == (ADMITTED, False)
    assert receipt.decision.losses is not None
    assert [event.what for event in ledger.events()][-4:] == [
        "contributor-registered",
        "contribution-received",
        "contribution-changed",
        "contribution-changed",
    ]
    shutil.rmtree(contribution.folder)  # The ledger and its store need it no more.
    (admitted,) = load_admitted(ledger, store)
    assert admitted.id == contribution.id
    assert load_contribution(admitted.folder) == admitted
    assert len(admitted.load_samples(Split.HELD_OUT)) == 2


def test_again_is_idempotent(receive, contribute, ledger, store):
    folder = contribute().folder
    first = receive(folder)
    before = snapshot(ledger, store), ledger.events()
    again = receive(folder)
    assert (snapshot(ledger, store), ledger.events()) == before
    assert again.known
    assert (again.contribution_id, again.state, again.decision) == (
        first.contribution_id,
        first.state,
        first.decision,
    )


def test_rejected_contribution_keeps_its_reasons(receive, contribute, ledger, store):
    folder = contribute(specialist_loss=3.5).folder
    receipt = receive(folder)
    assert receipt.state == REJECTED
    with pytest.raises(AdmissionError, match="'legal-07', check 'own-domain-loss'"):
        receipt.decision.check_admitted()
    assert receive(folder).decision == receipt.decision
    assert load_admitted(ledger, store) == []
    better = receive(contribute("better").folder)  # A rejection does not bar the next one.
    assert better.state == ADMITTED


@pytest.mark.parametrize(
    "name",
    [
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
        "samples/calibration.safetensors",
        "samples/held-out.safetensors",
    ],
)
def test_one_changed_byte_is_refused_and_the_right_file_goes_through(
    receive, contribute, ledger, store, name
):
    contribution = contribute()
    path = contribution.folder / name
    good = path.read_bytes()
    path.write_bytes(good[:-2] + bytes([good[-2] ^ 1]) + good[-1:])
    with pytest.raises(AdapterError, match=re.escape(f"'{name}' of 'legal-07': expected SHA-256")):
        receive(contribution.folder)
    entry = ledger.find_contribution(contribution.id)
    assert entry.state == ContributionState.RECEIVED
    assert not list(store.root.glob(".*"))
    assert ledger.events()[-1].what == "contribution-refused"
    with pytest.raises(AdapterError, match="expected a verified one"):
        load_stored(entry, store)
    path.write_bytes(good)
    assert receive(contribution.folder).state == ADMITTED


def test_bad_signature_leaves_no_contribution(receive, contribute, ledger, store):
    folder = contribute().folder
    (folder / "signature").write_text("00" * 100)
    with pytest.raises(SignatureError, match="does not verify"):
        receive(folder)
    assert snapshot(ledger, store) == ([], [], set())
    assert "does not verify" in ledger.events()[-1].data["reason"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda m: m["adapter_files"]["adapter_model.safetensors"].update(bytes=2**40),
            "adapter_model.safetensors of at most 268435456 bytes, got 1099511627776",
        ),
        (
            lambda m: m["adapter_files"]["adapter_config.json"].update(bytes=2**30),
            "adapter_config.json of at most 1000000 bytes",
        ),
        (
            lambda m: m["sample_files"]["held-out"].update(blocks=3, tokens=48),
            "at most 2 held-out blocks, got 3",
        ),
        (
            lambda m: m["sample_files"]["held-out"].update(tokens=2**40),
            "32 held-out tokens, got 1099511627776",
        ),
        (
            lambda m: m["sample_files"]["admission"].update(bytes=2**40),
            "admission blocks in at most 4672 bytes, got 1099511627776",
        ),
        (lambda m: m["sample_files"].pop("calibration"), "1 to 4 calibration blocks, got none"),
    ],
)
def test_sizes_are_refused_before_a_file_is_read(
    receive, contribute, ledger, store, contributor_key, change, expected
):
    folder = contribute().folder
    resign(folder, contributor_key, change)
    manifest = parse_manifest((folder / "manifest.json").read_bytes())
    for name in ("adapter", "samples"):
        for path in (folder / name).iterdir():
            entry = manifest.files.get(f"{name}/{path.name}")
            if entry is None:
                path.unlink()
            else:
                with path.open("r+b") as file:
                    file.truncate(entry.bytes)  # Sparse, but as large as announced.
    with pytest.raises(AdmissionError, match="check 'announced-sizes'") as caught:
        receive(folder)
    assert expected in str(caught.value)
    assert snapshot(ledger, store) == ([], [], set())


def test_samples_are_counted_by_the_amendment_in_force_when_they_were_received(
    receive, contribute, ledger, charter, coordinator_key, monkeypatch
):
    folder = contribute().folder
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("molora_fed.contributions.receive._store_files", interrupt)
        receive(folder)
    fewer = charter.amendment.model_copy(
        update={
            "number": 1,
            "samples": charter.amendment.samples.model_copy(update={"held_out": 1}),
        }
    )
    ledger.add_amendment(
        sign_amendment(coordinator_key, charter.identity_hash, fewer), actor="test"
    )
    now = charter.model_copy(update={"amendment": fewer})
    assert receive(folder, charter=now).state == ADMITTED


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_name_of_another_is_refused(receive, contribute, ledger, coordinator_key):
    receive(contribute().folder)
    with pytest.raises(LedgerError, match="Withdraw that one first, or contribute under another"):
        receive(contribute("second", specialist_loss=2.0).folder)
    ledger.set_state(
        ledger.contributions(ADMITTED)[0].id, ContributionState.WITHDRAWN, actor="test"
    )
    with pytest.raises(LedgerError, match="Join under another name"):
        receive(contribute("third", key=coordinator_key).folder)
    assert receive(contribute("fourth", specialist_loss=2.0).folder).state == ADMITTED


def test_order_is_by_id_not_by_arrival(receive, contribute, write_adapter, ledger, store):
    for number in (3, 1, 2):
        adapter = write_adapter(f"a{number}", seed=number)
        name = f"legal-{number}"
        receive(contribute(f"c{number}", contributor=name, adapter=adapter).folder)
    found = [contribution.id for contribution in load_admitted(ledger, store)]
    assert found == sorted(found)
    assert len(found) == 3


def test_what_was_verified_is_judged_after_a_stop(
    receive, contribute, ledger, store, charter, base, plugins, monkeypatch
):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("molora_fed.contributions.receive.admit", interrupt)
        receive(contribute().folder)
    (entry,) = ledger.contributions()
    assert entry.state == ContributionState.VERIFIED
    (receipt,) = admit_pending(ledger, store, charter=charter, base=base, plugins=plugins)
    assert (receipt.contribution_id, receipt.state) == (entry.id, ADMITTED)
    assert admit_pending(ledger, store, charter=charter, base=base, plugins=plugins) == []


def test_unsigned_file_in_the_folder_is_never_read(receive, contribute):
    folder = contribute().folder
    (folder / "adapter" / "surprise.json").write_text("{}")
    with pytest.raises(AdapterError, match=r"surprise\.json: not signed"):
        receive(folder)
