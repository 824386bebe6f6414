"""H3: what is quoted of an upload is cut, so that ledger, acknowledgement and trace can hold it."""

import json

import pytest
import torch
from door_helpers import Door, edit_json, edit_tensors

from molora_fed.contributions.decision import MAX_DECISION, AdmissionDecision, Refusal
from molora_fed.contributions.states import ContributionState
from molora_fed.cooperative.audit import build_audit_records
from molora_fed.errors import AdapterError
from molora_fed.storage.files import canonical_json
from molora_fed.tracing.records import MAX_LINE_BYTES, encode_json
from molora_fed.types import Finding

LONG = "x" * 1_000_000
ESCAPES = "\x1b[31mred\x1b[0m\u202e[/x]\n"


@pytest.fixture
def door(tmp_path, tiny_checkpoint):
    made = Door(tmp_path, tiny_checkpoint())
    yield made
    made.ledger.close()


def name_tensors(text):
    def change(folder):
        edit_tensors(folder, lambda tensors: tensors.update({text: torch.zeros(1)}))

    return change


def set_config(**values):
    return lambda folder: edit_json(
        folder / "adapter_config.json", lambda config: config.update(values)
    )


def set_meta(**values):
    return lambda folder: edit_json(
        folder / "molora_adapter.json", lambda meta: meta.update(values)
    )


SPOILED = {
    "tensor": name_tensors(LONG),
    "tensors": lambda folder: [name_tensors(f"{LONG}{n}")(folder) for n in range(3)],
    "escapes": name_tensors(f"a{ESCAPES}b"),
    "target": set_config(target_modules=[LONG[:500_000]]),
    "key": set_config(**{LONG[:500_000]: 1}),
    "value": set_config(bias=LONG[:500_000]),
    "init": set_config(init_lora_weights=[LONG[:500_000]]),
    "rank": set_config(r=LONG[:500_000]),
    "pattern": set_config(rank_pattern={LONG[:500_000]: 1}),
    "kind": set_meta(kind=LONG[:500_000]),
    "meta": set_meta(**{ESCAPES: LONG[:500_000]}),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_finding_is_short_whatever_was_sent(door, what):
    adapter = door.adapter()
    SPOILED[what](adapter)
    receipt = door.receive(door.contribute(adapter=adapter))
    assert receipt.state == ContributionState.REJECTED
    messages = [refusal.message for refusal in receipt.decision.refusals]
    assert sum(map(len, messages)) <= MAX_DECISION
    assert "x" * 201 not in " ".join(messages)
    assert all(message.isprintable() and "\x1b" not in message for message in messages)
    for _, body in build_audit_records(door.ledger):
        assert len(encode_json(body)) < 3 * MAX_DECISION


def test_many_findings_together_are_short():
    finding = Finding("e" * 9_000, "f" * 9_000, "g" * 9_000)
    refusals = [Refusal.of("a" * 63, "c" * 9_000, finding) for _ in range(100)]
    decision = AdmissionDecision.of(ContributionState.REJECTED, refusals)
    assert sum(len(refusal.message) for refusal in decision.refusals) <= MAX_DECISION
    assert "more findings" in decision.refusals[-1].found
    assert AdmissionDecision.from_json(decision.to_json()) == decision


def test_a_long_decision_of_an_earlier_version_is_cut_when_it_is_read():
    old = {
        "state": "REJECTED",
        "refusals": [
            {
                "contributor": "a",
                "check": "readable-files",
                "expected": "b",
                "found": LONG,
                "fix": "c",
                "quarantine": False,
            }
        ],
        "checks": [],
        "losses": None,
    }
    decision = AdmissionDecision.from_json(old)
    assert len(decision.refusals[0].message) <= MAX_DECISION


def test_a_trace_records_what_an_earlier_version_let_into_the_ledger(door):
    data = {"reason": "y" * 5_000_000}
    door.ledger.add_event("contribution-refused", actor="server", subject="x", data=data)
    bodies = [body for _, body in build_audit_records(door.ledger)]
    assert all(len(encode_json(body)) < MAX_LINE_BYTES - 200 for body in bodies)
    assert bodies[-1]["data"]["bytes"] > 5_000_000 and len(bodies[-1]["data"]["sha256"]) == 64
    door.ledger.add_event("contribution-refused", actor="server", subject="x", data={"a": "z" * 9})
    assert list(build_audit_records(door.ledger))[-1][1]["data"] == {"a": "z" * 9}


@pytest.mark.parametrize("name", ["x" * 250, "a\nb", ESCAPES.replace("/", "")])
def test_a_file_that_is_not_signed_is_quoted_shortly(door, name):
    folder = door.contribute()
    (folder / "adapter" / name).write_text("{}")
    with pytest.raises(AdapterError, match="not signed") as caught:
        door.receive(folder)
    line = str(caught.value)
    assert len(line) < 1_000 and line.isprintable()
    assert len(canonical_json(door.ledger.events()[-1].data)) < 2_000


def test_a_manifest_quotes_little(door):
    folder = door.contribute()
    edit_json(
        folder / "manifest.json", lambda m: m.update({f"k{n}": LONG[:9_000] for n in range(50)})
    )
    with pytest.raises(AdapterError) as caught:
        door.receive(folder)
    assert len(str(caught.value)) < 2_500
    assert json.dumps(door.ledger.events()[-1].data)
