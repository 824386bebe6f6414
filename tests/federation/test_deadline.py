"""How long a server waits: deadline, quorum, and a clock that goes on whatever is done to it."""

import pytest

from molora_fed.charter import (
    Amendment,
    BaseIdentity,
    Charter,
    Identity,
    load_charter,
    read_amendment,
    write_charter,
)
from molora_fed.federation.deadline import Patience, count_needed, count_quorum
from molora_fed.storage.files import canonical_json, write_json


class Machine:
    """A machine's two clocks; it may be switched off, and somebody may set one of them."""

    def __init__(self, path, **amendment):
        self.path, self.amendment = path, Amendment(**amendment)
        self.now, self.tick = 1_800_000_000.0, 500.0
        self.patience = None
        self.start()

    def start(self):
        self.patience = Patience(
            self.path, self.amendment, now=lambda: self.now, tick=lambda: self.tick
        )

    def run(self, seconds, step=10.0):
        """Serve for so long, looking now and then as a server does."""
        for _ in range(int(seconds / step)):
            self.now, self.tick = self.now + step, self.tick + step
            self.patience.is_late()

    def kill_and_start(self, *, off=0.0):
        """Off for so long; the clock that only goes forward begins anew."""
        self.now, self.tick = self.now + off, 3.0
        self.start()


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path / "opened.json", expected=3, deadline_seconds=3_600)


def test_a_deadline_passes_once_over_any_number_of_restarts(machine):
    for _ in range(5):
        machine.run(600)
        machine.kill_and_start(off=60)
    assert machine.patience.count_seconds() == pytest.approx(5 * 660)
    assert not machine.patience.is_late()
    machine.run(300)
    assert machine.patience.is_late()
    machine.kill_and_start()
    assert machine.patience.is_late()


@pytest.mark.parametrize("step", [-(10**9), -7_200.0, 7_200.0, 10**9])
def test_setting_the_clock_of_a_server_that_runs_changes_nothing(machine, step):
    machine.run(1_200)
    machine.now += step
    machine.run(1_200)
    machine.kill_and_start(off=60)
    assert machine.patience.count_seconds() == pytest.approx(2_460)


def test_a_clock_set_while_the_server_is_off_counts_forward_only(machine):
    machine.run(1_200)
    machine.now -= 10**6
    machine.kill_and_start(off=60)
    assert machine.patience.count_seconds() == pytest.approx(1_200, abs=60)
    machine.now += 1_000
    machine.kill_and_start(off=60)
    assert machine.patience.count_seconds() == pytest.approx(2_260, abs=60)


def test_a_server_killed_at_any_moment_loses_none_of_its_time(machine):
    for seconds in (10, 50, 70, 130):
        machine.run(seconds)
        machine.kill_and_start()
    assert machine.patience.count_seconds() == pytest.approx(260)


def test_the_opening_that_an_earlier_version_kept_goes_on(tmp_path):
    write_json(tmp_path / "opened.json", {"time": 1_800_000_000.0 - 900})
    machine = Machine(tmp_path / "opened.json", deadline_seconds=1_000)
    assert machine.patience.count_seconds() == pytest.approx(900)
    for kept in ([], {}, {"time": "then"}):
        write_json(tmp_path / "opened.json", kept)
        machine.start()
        assert machine.patience.count_seconds() == 0


@pytest.mark.parametrize(
    ("amendment", "needed", "quorum"),
    [
        ({}, 2, 2),
        ({"expected": 1}, 1, 1),
        ({"expected": 5}, 5, 2),
        ({"expected": 5, "quorum": 1}, 5, 1),
        ({"domains": ("a", "b", "c")}, 3, 2),
        ({"domains": ("a", "b", "c"), "quorum": 4}, 4, 4),
    ],
)
def test_who_is_waited_for(amendment, needed, quorum):
    wanted = Amendment(**amendment)
    assert (count_needed(wanted), count_quorum(wanted)) == (needed, quorum)


def test_before_the_deadline_all_are_needed_and_after_it_the_quorum(tmp_path):
    machine = Machine(tmp_path / "opened.json", expected=5, quorum=3, deadline_seconds=100)
    assert [machine.patience.is_enough(count) for count in (3, 4, 5)] == [False, False, True]
    assert machine.patience.describe(2, is_settled=False) == "2 of 5 contributions admitted"
    machine.run(100)
    assert [machine.patience.is_enough(count) for count in (2, 3)] == [False, True]
    said = machine.patience.describe(2, is_settled=False)
    assert said.endswith("the deadline has passed, and the quorum is 3: waiting for 1 more")
    for count, is_settled in ((3, False), (2, True)):
        assert "deadline" not in machine.patience.describe(count, is_settled=is_settled)


def test_without_a_deadline_nothing_but_all_is_enough(tmp_path):
    machine = Machine(tmp_path / "opened.json", expected=3)
    machine.run(10_000, step=1_000)
    assert not machine.patience.is_enough(2) and machine.patience.is_enough(3)


def test_a_quorum_is_left_out_of_the_charter_where_there_is_none(tmp_path):
    assert b"quorum" not in canonical_json(Amendment(expected=3).model_dump(mode="json"))
    assert read_amendment({"number": 1, "expected": 3}).quorum == 0
    base = BaseIdentity(id="tiny", weights="0" * 64, tokenizer="1" * 64)
    charter = Charter(
        identity=Identity(name="test", base=base),
        amendment=Amendment(expected=3, quorum=2, deadline_seconds=60),
    )
    write_charter(charter, tmp_path / "cooperative.toml")
    assert load_charter(tmp_path) == charter
