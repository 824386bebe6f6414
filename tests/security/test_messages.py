"""The door of messages: what one node sends concerns nobody else, now and after a restart."""

import json

import pytest
from hostile import HASH, Node, count_rounds, make_key, open_coordinator, read_step, relay, state
from molora_cli.live import watching

from molora_fed.federation.coordinator_mail import acknowledge, complete_deliveries
from molora_fed.federation.server import ServerSupervisor
from molora_fed.storage.keys import load_key

HOSTILE_STATES = {
    "a loss no float holds": '{"phase": "TRAINING", "loss": 1' + "0" * 400 + "}",
    "not a number": '{"phase": "TRAINING", "loss": NaN}',
    "infinity": '{"phase": "TRAINING", "eta_seconds": Infinity}',
    "more than infinity": '{"phase": "TRAINING", "eta_seconds": 1e999}',
    "half a character": '{"phase": "TRAINING", "message": "\\ud800"}',
    "half a character as a key": '{"\\ud800": 1}',
    "5,000 digits": '{"phase": "TRAINING", "step": 1' + "0" * 5_000 + "}",
    "a negative step": '{"phase": "TRAINING", "step": -1}',
    "a phase that is none": '{"phase": "[/x]"}',
    "a list for a text": '{"phase": ["TRAINING"]}',
    "deep": '{"tasks": ' + "[" * 5_000 + "]" * 5_000 + "}",
    "deeper than Python goes": '{"tasks": ' + "[" * 100_000,
    "parts that are none": '{"held": ["../../key.pem"]}',
    "a part with 5,000 digits": f'{{"held": ["{HASH}-{"9" * 5_000}-1"]}}',
    "800,000 characters": f'{{"phase": "TRAINING", "charter": "{"x" * 800_000}"}}',
    "many tasks": json.dumps({"tasks": ["t"] * 30_000}),
    "no object": "[]",
}


def speak(body):
    return lambda letters: '[{"kind": "state", "body": ' + body + "}]"


def report(home):
    """What `molora serve` shows, through the display it shows it with."""
    events = []
    with watching("title") as board:
        supervisor = ServerSupervisor(home.root, 1, lambda e: (events.append(e), board(e)))
        supervisor._report()
    return events


@pytest.mark.parametrize("body", HOSTILE_STATES.values(), ids=HOSTILE_STATES)
def test_one_hostile_state_hides_no_other_reply(tmp_path, body):
    home = open_coordinator(tmp_path / "server")
    before, good, after = Node(1, speak(body)), Node(2, count_rounds()), Node(3, speak(body))
    carrier = relay(home, before, good, after)
    for _ in range(12):
        carrier._round()
    assert read_step(home, good) >= 10
    assert any(event.contributor == good.name for event in report(home))


def test_one_state_message_does_not_end_the_server(tmp_path, capsys):
    home = open_coordinator(tmp_path / "server")
    hostile = Node(1, speak(HOSTILE_STATES["a loss no float holds"]))
    carrier = relay(home, hostile)
    for _ in range(3):
        carrier._round()
    for _ in range(2):  # and again after a restart, for the state may lie in the mailbox
        (shown,) = [e for e in report(home) if e.contributor == hostile.name]
        assert shown.problem and "skipped" in shown.message
    # The fault is forgotten once the contributor speaks sense.
    hostile.speak = count_rounds()
    for _ in range(3):
        carrier._round()
    (shown,) = [e for e in report(home) if e.contributor == hostile.name]
    assert not shown.problem and shown.phase == "TRAINING"


WHOLE = {
    "no JSON": "{",
    "no letters": '{"kind": "state"}',
    "an unknown kind": '[{"kind": "run-code", "body": {}}]',
    "the server's own letter": '[{"kind": "result", "body": {}}]',
    "a kind that is a list": '[{"kind": [], "body": {}}]',
    "a thousand letters": json.dumps(state() * 1_000),
    "a manifest that is none": json.dumps([{"kind": "manifest", "body": {"files": 10**60}}]),
    "a manifest outside": json.dumps(
        [{"kind": "manifest", "body": {"files": [
            {"name": "../a", "sha256": HASH, "num_bytes": 1}]}}]
    ),
    "an answer to nothing": '[{"kind": "answer", "body": {"question": 1}}]',
}  # fmt: skip


@pytest.mark.parametrize("text", WHOLE.values(), ids=WHOLE)
def test_one_hostile_message_hides_no_other_reply(tmp_path, text):
    home = open_coordinator(tmp_path / "server")
    good = Node(2, count_rounds())
    carrier = relay(home, Node(1, lambda letters: text), good)
    for _ in range(8):
        carrier._round()
    assert read_step(home, good) >= 6
    report(home)


def test_an_answer_that_flower_cannot_read_hides_no_other(tmp_path):
    home = open_coordinator(tmp_path / "server")
    bad, good = Node(1, count_rounds()), Node(2, count_rounds())
    carrier = relay(home, bad, good)
    pull, broken = carrier._grid.pull_messages, []

    def pull_messages(ids):
        if not broken:
            broken.append(ids[0])
        if broken[0] in ids:
            raise ValueError("a record that cannot be read")
        return pull(ids)

    carrier._grid.pull_messages = pull_messages
    for _ in range(8):
        carrier._round()
    assert read_step(home, good) >= 5 and read_step(home, bad) >= 4


KEPT = [
    "hello",
    "state",
    "offer",
    "refusal",
    "fault",
    "answer",
    "names",
    "acknowledgements/" + HASH,
]
GARBAGE = [
    b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"id": 1}',
    b'{"phase": "TRAINING", "loss": 1' + b"0" * 400 + b"}",
    b'{"name": "[/x]\\u001b[2J", "domain": "$\\\\frac{$", "public_key": ""}',
    b'{"state": "ADMITTED", "findings": ["' + b"x" * 1_000_000 + b'"]}',
]  # fmt: skip


@pytest.mark.parametrize("garbage", range(len(GARBAGE)))
def test_what_lies_in_a_mailbox_never_stops_a_restart(tmp_path, garbage):
    home = open_coordinator(tmp_path / "server")
    good, spoiled = Node(2, count_rounds()), Node(1, count_rounds())
    mailbox = home.contributor(spoiled.fingerprint)
    for name in KEPT:
        path = mailbox.folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(GARBAGE[garbage])
    report(home)
    carrier = relay(home, spoiled, good)
    for _ in range(6):
        carrier._round()
    assert list(complete_deliveries(home, part_bytes=100)) == []
    assert read_step(home, good) >= 4
    assert read_step(home, spoiled) >= 4  # its mailbox is in order again
    report(home)


def offer(node_bytes=b"adapter"):
    """A contribution of one file, offered and sent when it is fetched."""
    import hashlib

    sha = hashlib.sha256(node_bytes).hexdigest()
    files = [{"name": "adapter.bin", "sha256": sha, "num_bytes": len(node_bytes)}]

    def speak(letters):
        charter = next((x["body"]["id"] for x in letters if x["kind"] == "charter"), None)
        speak.known = charter or getattr(speak, "known", "")
        parts = {}
        for letter in letters:
            if letter["kind"] == "fetch":
                for name in letter["body"]["names"]:
                    _, offset, length = name.split("-")
                    parts[name] = node_bytes[int(offset) : int(offset) + int(length)]
        said = state(phase="SUBMITTED", charter=speak.known, tasks=["train-0"], received=speak.base)
        return [{"kind": "manifest", "body": {"files": files}}, *said], parts

    return speak


def get_base(home):
    from molora_fed.federation.messages import parse_shipment

    letter = json.loads((home.outbox / "charter.json").read_bytes())
    return [parse_shipment(letter["base"]).id]


def test_a_finding_of_a_megabyte_stops_nobodys_mail(tmp_path):
    home = open_coordinator(tmp_path / "server")
    speaks = offer()
    speaks.base = get_base(home)
    hostile, good = Node(1, speaks), Node(2, count_rounds())
    carrier = relay(home, hostile, good)
    for _ in range(5):
        carrier._round()
    (delivery,) = complete_deliveries(home, part_bytes=4_096)
    name = "x" * 1_000_000 + "\x1b[2J[/x]"
    acknowledge(
        delivery, load_key(home.key), contribution_id="", state="QUARANTINED",
        findings=[f"Cannot admit tensor '{name}'."] * 500, part_bytes=4_096,
    )  # fmt: skip
    for _ in range(5):
        carrier._round()
    (letter,) = [x["body"] for x in hostile.heard if x["kind"] == "acknowledgement"][:1]
    assert len(json.dumps(letter)) < 10_000
    assert "\x1b" not in "".join(letter["findings"])
    assert read_step(home, good) >= 8
    assert make_key(1) is hostile.key
