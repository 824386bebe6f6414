"""A bad total is divided until the group with the liar is small, never below three members."""

import numpy as np
import pytest
import torch
from sums_helpers import build_terms, find_key, list_names

from molora_fed.errors import SumError
from molora_fed.privacy.sums.bisection import narrow_down
from molora_fed.privacy.sums.coordinator import Coordinator
from molora_fed.privacy.sums.fixed_point import FixedPoint
from molora_fed.privacy.sums.local import run_masked_sum
from molora_fed.privacy.sums.member import Member
from molora_fed.privacy.sums.vectors import Part, Total, VectorLayout

LAYOUT = VectorLayout((Part("a", (2,), 100.0),))


class Crowd:
    """Members of which some give what is absurd within its bound; sums without cryptography."""

    def __init__(self, count, liars, away=()):
        self.names = tuple(list_names(count))
        self.encoding = FixedPoint(LAYOUT, count)
        self.values = {n: 100.0 if n in liars else 1.0 for n in self.names}
        self.away = away
        self.opened = []

    def open_total(self, names):
        assert len(names) >= 3
        self.opened.append(tuple(names))
        there = tuple(name for name in names if name not in self.away or len(self.opened) == 1)
        words = [self.encoding.encode(np.full(2, self.values[name])) for name in there]
        encoded = np.sum(words, axis=0, dtype=words[0].dtype)
        parts = LAYOUT.unflatten(self.encoding.decode(encoded, len(there)))
        return Total(parts, there, (), encoded)

    def narrow(self):
        return narrow_down(
            self.open_total(self.names), open_total=self.open_total, is_good=is_plausible
        )


def is_plausible(total):
    return bool((total.parts["a"] / len(total.members) <= 2.0).all())


@pytest.mark.parametrize("count", [3, 5, 6, 7, 11, 20, 64])
def test_one_liar_ends_in_a_group_of_three_to_five_and_all_others_are_good(count):
    for liar in {0, count // 2, count - 1}:
        crowd = Crowd(count, {list_names(count)[liar]})
        found = crowd.narrow()
        (group,) = found.suspects
        assert list_names(count)[liar] in group and 3 <= len(group) <= 5 and not found.notes
        cleared = [name for total in found.good for name in total.members]
        assert sorted([*group, *cleared]) == list(crowd.names)
        good = sum(total.parts["a"][0] for total in found.good)
        assert good == count - len(group)
        assert len(crowd.opened) <= 1 + 2 * np.log2(count)


def test_liars_in_both_halves_are_both_found_and_nobody_is_sought_without_reason():
    found = Crowd(20, {"member-01", "member-18"}).narrow()
    assert [("member-01" in g, "member-18" in g) for g in found.suspects] == [
        (True, False),
        (False, True),
    ]
    honest = Crowd(20, set())
    (total,) = honest.narrow().good
    assert total.members == honest.names and len(honest.opened) == 1


def test_a_group_stays_whole_where_a_member_is_away_or_changes_its_vector():
    found = Crowd(8, {"member-01"}, away=["member-06"]).narrow()
    assert found.suspects == (tuple(list_names(8)),) and not found.good
    assert "without member-06" in found.notes[0]

    crowd = Crowd(8, {"member-01"})
    whole = crowd.open_total(crowd.names)
    crowd.values["member-01"] = 1.0  # behaves once it is looked for
    found = narrow_down(whole, open_total=crowd.open_total, is_good=is_plausible)
    assert found.suspects == (crowd.names,) and "another vector than before" in found.notes[0]


def test_sums_that_fail_are_noted():
    crowd = Crowd(8, {"member-01"})
    whole = crowd.open_total(crowd.names)

    def refuse(names):
        raise SumError("nobody answers")

    found = narrow_down(whole, open_total=refuse, is_good=is_plausible)
    assert found.suspects == (crowd.names,) and found.notes == ("nobody answers",)


def test_members_open_exactly_the_totals_that_narrowing_asks_for():
    """Over the protocol: every half is a part of the division that members allow."""
    names = list_names(7)
    crowd = Crowd(7, {"member-05"})
    wholes = {name: [] for name in names}

    def open_total(group):
        terms = build_terms(group, length=2, attempt=len(crowd.opened))
        crowd.opened.append(tuple(group))
        members = [
            Member.begin(
                name,
                terms,
                crowd.encoding.encode(np.full(2, crowd.values[name])),
                secret=b"s" * 32,
                key=find_key(name),
                whole=wholes[name],
            )
            for name in group
        ]
        found, encoded = run_masked_sum(Coordinator.begin(terms), members)
        for member in members:
            wholes[member.name] = member.state.find_whole()
        values = crowd.encoding.decode(encoded, len(found))
        return Total({"a": torch.from_numpy(values)}, found, (), encoded)

    found = narrow_down(open_total(names), open_total=open_total, is_good=is_plausible)
    assert found.suspects == (tuple(names[4:]),) and not found.notes
    assert [total.members for total in found.good] == [tuple(names[:4])]
