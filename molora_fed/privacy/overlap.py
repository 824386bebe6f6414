"""Which held-out blocks count where train text stays with its contributors; what is sent of it.

A contributor compares its held-out blocks at home: with its own text and the base's directly, with
others' by private set intersection. Blocks are left out as `molora_fed.corpus.overlap` leaves them
out where all texts lie in one place. How many leaves the home, and nothing else.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from molora_fed.corpus.blocks import Blocks
from molora_fed.corpus.overlap import KnownText, Overlap, measure_overlap
from molora_fed.errors import FederationError
from molora_fed.storage.files import canonical_json
from molora_fed.storage.untrusted import clean, parse_json

__all__ = [
    "MAX_COUNTS_BYTES",
    "OverlapCounts",
    "measure_private_overlap",
    "read_counts",
    "sum_counts",
]

MAX_COUNTS_BYTES = 256
_MAX_BLOCKS = 2**31


@dataclass(frozen=True)
class OverlapCounts:
    """Counts of one comparison; nothing else is sent.

    Attributes:
        blocks: Held-out blocks that were compared.
        left_out: Of them those that figures are not made of.
    """

    blocks: int
    left_out: int

    @classmethod
    def count(cls, overlap: Overlap) -> "OverlapCounts":
        """The counts of one contributor."""
        return cls(overlap.kept.size, int((~overlap.kept).sum()))

    def to_bytes(self) -> bytes:
        """The message."""
        return canonical_json({"blocks": self.blocks, "left_out": self.left_out})


class _Counts(BaseModel):
    """The message's content."""

    model_config = ConfigDict(extra="forbid", strict=True)

    blocks: int = Field(ge=0, le=_MAX_BLOCKS)
    left_out: int = Field(ge=0)


def measure_private_overlap(
    held_out: Blocks,
    *,
    others: NDArray[np.uint64],
    home: Iterable[KnownText],
    owner: str,
    tokenizer: Any,
) -> Overlap:
    """Compare a contributor's held-out blocks with all known text, at its home.

    Args:
        held_out: Its blocks.
        others: 8-grams of them that occur in others' text, sorted, from `Receiver.list_known`.
        home: Known text that is here: its own train text and samples, the base's where it is kept.
        owner: Its name, as in the texts of `home`.
        tokenizer: Hugging Face tokenizer the blocks were made with.

    Returns:
        What `measure_overlap` finds where all texts are in one place.
    """
    known = [*home, KnownText("train", "", lambda: others)]
    return measure_overlap({owner: held_out}, known, tokenizer)[owner]


def read_counts(data: bytes, sender: str) -> OverlapCounts:
    """Read counts from outside.

    Args:
        data: The message.
        sender: Who it is said to come from, for the error.

    Raises:
        FederationError: If they are malformed, or more blocks are left out than there are.
    """
    try:
        read = _Counts.model_validate(parse_json(data, max_bytes=MAX_COUNTS_BYTES))
        if read.left_out > read.blocks:
            raise ValueError(f"{read.left_out} of {read.blocks}")
    except (ValidationError, ValueError) as error:
        raise FederationError(
            f"Cannot read the counts of '{clean(sender, 60)}' on held-out text: expected 'blocks' "
            f"and of them 'left_out', got {clean(error, 100)}. Run the same molora-fed version on "
            "both sides."
        ) from error
    return OverlapCounts(read.blocks, read.left_out)


def sum_counts(counts: Iterable[tuple[str, OverlapCounts]]) -> dict[str, OverlapCounts]:
    """Counts by domain, those of its contributors added up.

    Args:
        counts: Domain, as the manifest states it, and counts of each contributor.
    """
    totals: dict[str, OverlapCounts] = {}
    for domain, one in sorted(counts, key=lambda row: row[0]):
        before = totals.get(domain, OverlapCounts(0, 0))
        totals[domain] = OverlapCounts(before.blocks + one.blocks, before.left_out + one.left_out)
    return totals
