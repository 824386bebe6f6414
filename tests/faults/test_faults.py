"""Federations that are disturbed: published all the same, with the same bytes, and nothing lost.

The long form, with hundreds of faults drawn at random, is `make chaos`.
"""

import random
import time

import httpx
import pytest
from fault_stage import MEMBERS, SERVER, Stage
from faults import KINDS, PLAIN_KINDS, STAGES, TLS_KINDS, Fault, draw_faults, is_plain
from federation import FederationRun, prepare_stage
from process_helpers import wait_until
from relay import Relay
from transport_helpers import serving

from molora_fed.serving.connections import Doorkeeper

MEMBERS_FAULTS = [
    Fault("kill", "alpha", "node", "joined", 0.5, 0.0),
    Fault("kill", "beta", "worker", "training", 0.1, 0.0),
    Fault("stop", SERVER, "link", "uploading", 0.0, 3.0),
    Fault("kill", SERVER, "command", "uploading", 0.3, 0.0),
    Fault("cut", "alpha", "", "published", 0.2, 3.0),
]
NETWORK_FAULTS = [
    Fault("repeat", "alpha", "", "started", 0.0, 8.0),
    Fault("kill", SERVER, "coordinator", "training", 0.5, 0.0),
    Fault("disk", "alpha", "", "training", 0.2, 2.0),
    Fault("kill", "beta", "letters", "fusing", 0.0, 0.0),
    Fault("stop", SERVER, "link", "received", 0.5, 8.0),
]


def test_faults_are_drawn_from_a_seed_and_hit_every_phase():
    def draw(seed):
        return draw_faults(random.Random(seed), 5, tuple(MEMBERS))

    assert draw(3) == draw(3) != draw(4)
    drawn = [draw(seed) for seed in range(400)]
    faults = [fault for one in drawn for fault in one]
    assert {fault.kind for fault in faults} == {*TLS_KINDS, *PLAIN_KINDS} <= set(KINDS)
    assert {fault.stage for fault in faults} == set(STAGES)
    assert {fault.side for fault in faults} == {SERVER, *MEMBERS}
    assert any(fault.kind == "stop" and fault.seconds == 90.0 for fault in faults)
    for one in drawn:
        places = [(STAGES.index(fault.stage), fault.delay) for fault in one]
        assert places == sorted(places)
        kinds = {fault.kind for fault in one}
        assert not (is_plain(one) and "certificate" in kinds)


def test_a_line_can_be_cut_be_silent_and_repeat_itself():
    counted = []

    async def answer(scope, receive, send):
        message = await receive()
        counted.append(message["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": message["body"]})

    def ask(body):
        with httpx.Client(timeout=1.0) as client:
            return client.post(f"http://127.0.0.1:{relay.port}/", content=body).content

    def is_out_of_order():
        order = [int(body) for body in counted if body.isdigit()]
        return order != sorted(order)

    with serving(answer, Doorkeeper()) as port, Relay(port, reads_requests=True) as relay:
        assert ask(b"first") == b"first"
        relay.cut()
        with pytest.raises(httpx.TransportError):
            ask(b"cut")
        relay.silence()
        with pytest.raises(httpx.ReadTimeout):
            ask(b"silent")
        relay.restore()
        relay.slow_down(0.2)
        started = time.monotonic()
        assert ask(b"slow") == b"slow" and time.monotonic() - started >= 0.4
        relay.restore()
        relay.repeat()
        for number in range(20):
            assert ask(b"%d" % number) == b"%d" % number
        wait_until(is_out_of_order, what="requests said again, later")
    assert {b"cut", b"silent"}.isdisjoint(counted) and relay.num_repeated > 0


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """Homes, and what an undisturbed run makes of them."""
    root = tmp_path_factory.mktemp("faults")
    stage = Stage(root / "stage")
    prepare_stage(stage, root / "undisturbed")
    assert "router.safetensors" in stage.fused
    return stage


@pytest.mark.processes
@pytest.mark.parametrize(
    "faults", [MEMBERS_FAULTS, NETWORK_FAULTS], ids=["with members", "without TLS"]
)
def test_a_disturbed_federation_publishes_the_same_bytes(stage, tmp_path, faults):
    with FederationRun(stage, tmp_path / "run", faults) as run:
        found = run.run()
        tails = run.read_tails()
    assert found["problems"] == [], tails
    assert found["outcome"] == "published"
    assert sum(bool(fault["met"]) for fault in found["faults"]) >= len(faults) - 1
