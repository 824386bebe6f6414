"""Which totals over the same vectors may be opened: one whole, and its halves of halves.

Two totals whose members differ by one are that member's vector. No member knows all totals that
were opened: one that took part in a whole and its second half cannot see that the first half was
opened without somebody. So the sums that may follow a whole are fixed by its members alone: these
are divided in the middle again and again, as long as both halves have three members. However many
of these totals are opened, whatever is computed from them, at least three members stay together.
"""

from collections.abc import Iterator, Sequence

from molora_fed.charter import MIN_MEMBERS
from molora_fed.errors import SumRefusedError

__all__ = ["check_division", "divide"]


def divide(names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Both halves of a group, sorted by name; None where one would be fewer than three members."""
    if len(names) < 2 * MIN_MEMBERS:
        return None
    ordered = tuple(sorted(names))
    middle = (len(ordered) + 1) // 2
    return ordered[:middle], ordered[middle:]


def check_division(whole: Sequence[str], names: Sequence[str]) -> None:
    """Refuse to open a total that is neither the whole nor a part of its division.

    Args:
        whole: Members of the first total over the same vectors.
        names: Members of the one that is asked for.

    Raises:
        SumRefusedError: If it is another.
    """
    wanted = tuple(sorted(names))
    if wanted not in _list_groups(tuple(sorted(whole))):
        left = sorted(set(whole) - set(wanted))
        raise SumRefusedError(
            f"Cannot agree to the survivors of a masked sum: expected the {len(whole)} members of "
            "the first total over the same vectors, or a half of a half of these, got others "
            f"(without {', '.join(left[:5])}{' …' if len(left) > 5 else ''}), which could tell "
            "single members. Repeat the sum once all of its members are connected."
        )


def _list_groups(names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    yield names
    for half in divide(names) or ():
        yield from _list_groups(half)
