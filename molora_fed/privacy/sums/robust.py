"""Sums by coordinate that a few absurd members cannot move: trimmed mean times n.

The coordinator sees every member's vector. Source: Yin et al., "Byzantine-Robust Distributed
Learning", arXiv 1803.01498, definition 2; times n, because callers expect sums.
"""

import math
from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray

from molora_fed.errors import SumError
from molora_fed.privacy.sums.vectors import Total, VectorLayout

__all__ = ["MAX_TRIM_SHARE", "count_trimmed", "sum_by_group"]

MAX_TRIM_SHARE = 0.4
_COLUMNS = 2**16  # sorted at a time


def count_trimmed(members: int, trim_share: float) -> int:
    """Values cut at each end of every coordinate: the share of the members, rounded down.

    Raises:
        SumError: If the share is not above 0 and at most 0.4.
    """
    if not 0 < trim_share <= MAX_TRIM_SHARE:
        raise SumError(
            f"Cannot trim sums: expected a share above 0 and at most {MAX_TRIM_SHARE}, got "
            f"{trim_share}. Amend the charter."
        )
    # A share of 0.3 times 10 members is below 3 in float64.
    return math.floor(members * trim_share + 1e-9)


def sum_by_group(
    vectors: Mapping[str, NDArray[np.float64]],
    layout: VectorLayout,
    groups: Mapping[str, str],
    sizes: Mapping[str, float],
    *,
    trim_share: float,
    exact: Collection[str],
) -> Total:
    """Sum members' vectors, trimmed among members of one group, each vector per unit of its size.

    Each vector is clipped to the layout's bounds. In every coordinate the lowest and the highest
    values per unit of size, a share of the group's members at each end, are left out, and the mean
    of the rest is taken times the group's size. With too few members to leave one out at each end
    the clipped values are summed plainly, and the total's notes say so. Members of one group hold
    text of one kind, so that their vectors by token are alike; those of different groups are not,
    and cutting one group's away would bias the total.

    Args:
        vectors: (N,) float64 by member; their order does not matter.
        layout: Parts with bounds.
        groups: Group of each member.
        sizes: Size of each member, > 0, e.g. its tokens.
        trim_share: Share that is cut at each end, above 0, at most 0.4.
        exact: Names of parts that are clipped and summed plainly.

    Raises:
        SumError: If there is no vector, or one has another length or is not finite; it is named.
    """
    names = tuple(sorted(vectors))
    plain = np.zeros(layout.length, dtype=np.bool_)
    for part, place in layout.places():
        plain[place] = part.name in exact
    total, notes = np.zeros(layout.length), []
    for group in sorted({groups[name] for name in names}):
        own = {name: vectors[name] for name in names if groups[name] == group}
        cut = count_trimmed(len(own), trim_share)
        rows = []
        for name, vector in own.items():
            row, beyond = layout.clip(vector, who=name)
            rows.append(row)
            if beyond:
                notes.append(
                    f"{beyond:,} entries of '{name}' lay beyond their bound, and count so."
                )
        stacked = np.stack(rows)  # (M, N)
        if not cut:
            notes.append(f"Nothing was trimmed among {len(own)} members of '{group}'.")
        scale = np.array([[sizes[name]] for name in own])
        for start in range(0, layout.length, _COLUMNS):
            piece = slice(start, start + _COLUMNS)
            # Sorted also where nothing is cut: the sum does not depend on the members' order.
            shares = np.sort(stacked[:, piece] / scale, axis=0)
            kept = shares[cut : len(own) - cut].mean(axis=0) * scale.sum()
            total[piece] += np.where(plain[piece], stacked[:, piece].sum(axis=0), kept)
    if not names:
        raise SumError(
            "Cannot sum robustly: expected at least one member's vector, got none. Wait for the "
            "members to connect."
        )
    return Total(layout.unflatten(total), names, tuple(notes))
