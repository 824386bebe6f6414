"""Which held-out blocks a fusion's figures are made of: those that no part of it has read.

A contributor's held-out text may lie in another's train text, or in the base's. Compared is
whatever is on this machine: train text of contributors whose prepared corpora lie here, the
samples that all of them sent, and the base's train text where its index was kept.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molora_fed.contributions.contributed import Contributed
from molora_fed.corpus.blocks import load_blocks
from molora_fed.corpus.overlap import (
    MAX_BLOCK_OVERLAP,
    KnownText,
    Overlap,
    find_base_index,
    index_blocks,
    load_index,
    measure_overlap,
    summarise_overlap,
)
from molora_fed.corpus.report import MAX_CONTAMINATION
from molora_fed.errors import ConfigError
from molora_fed.models.base import Base
from molora_fed.types import Split

__all__ = ["HeldOutChoice", "choose_held_out"]


@dataclass(frozen=True, eq=False)
class HeldOutChoice:
    """What was compared, and which blocks count.

    Attributes:
        overlaps: By contributor.
        trained: Contributors whose train text was compared.
        absent: Contributors whose train text is not on this machine.
        has_base: Whether the base's train text was compared.
    """

    overlaps: Mapping[str, Overlap]
    trained: tuple[str, ...]
    absent: tuple[str, ...]
    has_base: bool

    def to_json(self) -> dict[str, Any]:
        """The report's `overlap`; shares that were not measured are None."""
        domains = summarise_overlap(self.overlaps.values())
        for name, found in domains.items():
            owners = {c for c, overlap in self.overlaps.items() if overlap.domain == name}
            if not owners <= set(self.trained):
                found["own"] = None
            if not self.has_base:
                found["base"] = None
        return {
            "limit": MAX_CONTAMINATION,
            "max_block_overlap": MAX_BLOCK_OVERLAP,
            "compared": {"train": list(self.trained), "samples": True, "base": self.has_base},
            "absent": list(self.absent),
            "domains": domains,
        }

    def fingerprint_kept(self, contributions: Sequence[Contributed]) -> dict[str, str]:
        """Fingerprint of each contributor's held-out blocks that were kept."""
        return {
            c.contributor: c.held_out.select(self.overlaps[c.contributor].kept).fingerprint
            for c in contributions
        }


def choose_held_out(contributions: Sequence[Contributed], base: Base) -> HeldOutChoice:
    """Compare every held-out block with all text that is known here.

    A domain of which nothing is left is in no figure; the others are measured.

    Args:
        contributions: With their blocks.
        base: Its tokenizer decodes them; its train text counts if the index lies beside it.

    Raises:
        ConfigError: If no block of any domain is left.
        CorpusError: If a prepared corpus or the index is malformed.
    """
    recipe = str((base.training or {}).get("recipe", ""))
    index = load_index(find_base_index(base.folder), recipe) if recipe else None
    known = [*_list_known(contributions, base.tokenizer)]
    if index is not None:
        known.append(KnownText("base", "", lambda: index))
    held_out = {c.contributor: c.held_out for c in contributions}
    choice = HeldOutChoice(
        overlaps=measure_overlap(held_out, known, base.tokenizer),
        trained=tuple(c.contributor for c in contributions if c.train_text),
        absent=tuple(c.contributor for c in contributions if not c.train_text),
        has_base=index is not None,
    )
    if not any(overlap.kept.any() for overlap in choice.overlaps.values()):
        count = sum(overlap.kept.size for overlap in choice.overlaps.values())
        raise ConfigError(
            f"Cannot measure on held-out text: expected held-out blocks with at most "
            f"{MAX_BLOCK_OVERLAP:.0%} of their word 8-grams in text that was trained on, got none "
            f"among {count}. Leave out contributors who hold the same text."
        )
    return choice


def _list_known(contributions: Sequence[Contributed], tokenizer: Any) -> Iterator[KnownText]:
    """Train text where it is here, then the samples; read one at a time."""
    for c in contributions:
        if c.train_text is not None:
            path = c.train_text / f"{Split.TRAIN}.safetensors"
            yield KnownText("train", c.contributor, partial(_index_file, path, tokenizer))
        for sample in (c.calibration, c.admission):
            if sample is not None:
                load = partial(index_blocks, sample, tokenizer)
                yield KnownText("sample", c.contributor, load)


def _index_file(path: Path, tokenizer: Any) -> NDArray[np.uint64]:
    return index_blocks(load_blocks(path), tokenizer)
