"""Where an absurd vector came from: a masked sum repeated among halves.

In one total a lying member cannot be seen: nobody sees its vector, and the total shows nobody's
share. What can be seen is that the total is bad, by whatever the caller judges it with
(held-out loss of the router it gives). Then the same question is summed over halves, and the halves
of bad halves (`division`), never over fewer than three members.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from molora_fed.errors import SumError
from molora_fed.privacy.sums.division import divide
from molora_fed.privacy.sums.vectors import Total

__all__ = ["Narrowed", "narrow_down"]


@dataclass(frozen=True, eq=False)
class Narrowed:
    """What repeated sums found.

    Attributes:
        suspects: Groups with a bad total that could not be divided further, three members or more.
        good: Totals that were judged good; together they hold everybody else.
        notes: Why a group was not divided, a sentence each.
    """

    suspects: tuple[tuple[str, ...], ...]
    good: tuple[Total, ...]
    notes: tuple[str, ...]


def narrow_down(
    whole: Total,
    *,
    open_total: Callable[[Sequence[str]], Total],
    is_good: Callable[[Total], bool],
) -> Narrowed:
    """Repeat a masked sum among halves while a total is bad.

    Members must take part with the vectors they gave before: the halves' totals have to add up to
    their group's to the last bit, or somebody has changed its vector and the group stays a suspect
    as a whole.

    Args:
        whole: Total that was opened, with `encoded`.
        open_total: Sums the same question over these members, an attempt of its own each. Asked
            again, it returns the same.
        is_good: Judges a total, for instance by the held-out loss of what is fitted on it.

    Returns:
        What was found; only the whole in `good` where there was nothing to find.
    """
    suspects: list[tuple[str, ...]] = []
    good: list[Total] = []
    notes: list[str] = []
    pending = [whole]
    while pending:
        group = pending.pop(0)
        if is_good(group):
            good.append(group)
        elif (halves := divide(group.members)) is None:
            suspects.append(group.members)
        else:
            try:
                pending[:0] = _divide(group, halves, open_total)
            except SumError as error:
                suspects.append(group.members)
                notes.append(str(error))
    return Narrowed(tuple(suspects), tuple(good), tuple(notes))


def _divide(
    group: Total,
    halves: tuple[tuple[str, ...], ...],
    open_total: Callable[[Sequence[str]], Total],
) -> list[Total]:
    """Totals of both halves."""
    totals = [open_total(half) for half in halves]
    what = f"Cannot divide the total of {len(group.members)} members"
    missing = sorted(set(group.members).difference(*(total.members for total in totals)))
    if missing or [total.members for total in totals] != list(halves):
        raise SumError(
            f"{what}: expected all members of each half, got them without "
            f"{', '.join(missing[:5])}. Repeat it when they are connected."
        )
    first, second, both = totals[0].encoded, totals[1].encoded, group.encoded
    if first is None or second is None or both is None or not np.array_equal(first + second, both):
        raise SumError(
            f"{what}: expected halves that add up to it to the last bit, got others, so that one "
            f"of {', '.join(group.members[:5])}{' …' if len(group.members) > 5 else ''} gave "
            "another vector than before. Leave the group out."
        )
    return totals
