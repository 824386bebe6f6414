"""What the traffic test makes of finds: of figures beside decoys, of sums, of a control that fails.

The module lies in `bench/` beside those that it imports; it is imported from there.
"""

import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from traffic_helpers import Group, Needles

BENCH = Path(__file__).parents[3] / "bench"
LOSS = "loss of a token, held-out"
DECOY = f"decoy of {LOSS}"
ONE_OF_SEVERAL = "sums of one of several members, calibration"
ALONE = "sums of a member alone in its domain, calibration"


@pytest.fixture(scope="module")
def traffic():
    """The module bench/traffic_test.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        import traffic_test

        yield traffic_test
    for name in [name for name in sys.modules if name.startswith("traffic_") and name in BENCH_OWN]:
        sys.modules.pop(name)


BENCH_OWN = {path.stem for path in BENCH.glob("traffic_*.py")}


def judge(traffic, finds, *, privacy="private", summing="masked", samples=None):
    """Problems of a federation with 1,000 strings of each kind, and these finds by place."""
    kinds = ("text, train", LOSS, DECOY)
    kinds += (ONE_OF_SEVERAL, f"decoy of {ONE_OF_SEVERAL}", ALONE, f"decoy of {ALONE}")
    return traffic.find_problems(
        {
            "planted": {"text": {"raw": [2, 2]}},
            "privacy": privacy,
            "summing": summing,
            "needles": {kind: {"any": 1_000} for kind in kinds},
            "found": {
                place: {kind: {"any": {"raw": n}} for kind, n in table.items()}
                for place, table in finds.items()
            },
            "samples": samples or {},
        }
    )


def test_a_text_anywhere_is_a_problem(traffic):
    assert judge(traffic, {}) == []
    (problem,) = judge(traffic, {"memory": {"text, train": 1}})
    assert problem.startswith("memory: text, train")


def test_figures_are_a_problem_where_more_are_found_than_decoys(traffic):
    assert judge(traffic, {"memory": {LOSS: 22, DECOY: 14}}) == []
    assert judge(traffic, {"memory": {DECOY: 30}}) == []
    (problem,) = judge(traffic, {"memory": {LOSS: 60, DECOY: 14}})
    assert problem == f"memory: {LOSS}: 60 found, and 14 decoys"


def test_sums_of_one_member_are_told_by_robust_sums_alone(traffic):
    finds = {"memory": {ONE_OF_SEVERAL: 30, ALONE: 30}}
    assert judge(traffic, finds, summing="robust") == []
    (problem,) = judge(traffic, finds, summing="masked")
    assert ONE_OF_SEVERAL in problem
    (problem,) = judge(traffic, {"wire, from members": {ALONE: 30}}, summing="masked")
    assert problem.startswith("wire, from members: sums of a member alone")


def test_a_control_that_misses_a_sample_is_a_problem(traffic):
    whole = {place: {"held-out": [9, 9]} for place in traffic.CONTROLS}
    assert judge(traffic, {}, privacy="pooled", samples=whole) == []
    (problem,) = judge(
        traffic, {}, privacy="pooled", samples={**whole, "memory": {"held-out": [8, 9]}}
    )
    assert problem == "pooled: 8 of 9 runs of ids of held-out are found in memory"
    more = {place: {**row, "beyond": [3, 12]} for place, row in whole.items()}
    assert len(judge(traffic, {}, privacy="pooled", samples=more)) == len(traffic.CONTROLS)


def test_a_number_inside_another_one_is_not_found(traffic):
    needles = Needles()
    needles.add(Group("anna", LOSS, "decimal"), [b"4.12345678"])
    assert traffic.Search(needles).look("mailbox", b"at 1764472414.1234567801, ") == set()
    assert traffic.Search(needles).look("mailbox", b'{"loss": 4.1234567801}') == {b"4.12345678"}


def test_doubles_of_memory_are_told_by_where_they_lie(traffic):
    values = np.array([4.125, 5.25, 6.5], "<f8")
    needles = Needles()
    needles.add(Group("anna", LOSS, "float64"), [struct.pack("<d", one) for one in values])
    search = traffic.Search(needles)
    memory = bytes(8) + values[:1].tobytes() + b"\x01" * 3 + values[1:2].tobytes() + b"\x01" * 21
    search.look("memory", memory, deep=False)
    assert search.count_aligned() == {LOSS: [2, 1]}
