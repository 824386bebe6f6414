"""Which held-out blocks a fusion's figures are made of: those that no part of it has read.

A contributor's held-out text may lie in another's train text, or in the base's. Compared is
whatever is on this machine: train text of contributors whose prepared corpora lie here, the
samples that all of them sent, and the base's train text where its index was kept. What lies
elsewhere counts as far as somebody found its 8-grams by private set intersection.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
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

__all__ = ["Elsewhere", "HeldOutChoice", "choose_held_out", "compare_held_out", "list_known"]


@dataclass(frozen=True, eq=False)
class Elsewhere:
    """What a private comparison found of train text and samples that lie elsewhere.

    Attributes:
        shingles: Word 8-grams of held-out blocks that occur in them, sorted.
        trained: Contributors whose train text was compared.
    """

    shingles: NDArray[np.uint64]
    trained: tuple[str, ...]


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

    def check_kept(self) -> None:
        """Refuse a choice of nothing.

        Raises:
            ConfigError: If no block of any domain is left.
        """
        if not any(overlap.kept.any() for overlap in self.overlaps.values()):
            count = sum(overlap.kept.size for overlap in self.overlaps.values())
            raise ConfigError(
                f"Cannot measure on held-out text: expected held-out blocks with at most "
                f"{MAX_BLOCK_OVERLAP:.0%} of their word 8-grams in text that was trained on, got "
                f"none among {count}. Leave out contributors who hold the same text."
            )

    def fingerprint_kept(self, contributions: Sequence[Contributed]) -> dict[str, str]:
        """Fingerprint of each contributor's held-out blocks that were kept."""
        return {
            c.contributor: c.held_out.select(self.overlaps[c.contributor].kept).fingerprint
            for c in contributions
        }


def choose_held_out(contributions: Sequence[Contributed], base: Base) -> HeldOutChoice:
    """Compare every held-out block with all known text; see `compare_held_out`.

    A domain of which nothing is left is in no figure; the others are measured.

    Raises:
        ConfigError: If no block of any domain is left.
        CorpusError: If a prepared corpus or the index is malformed.
    """
    choice = compare_held_out(contributions, base)
    choice.check_kept()
    return choice


def compare_held_out(
    contributions: Sequence[Contributed], base: Base, elsewhere: Elsewhere | None = None
) -> HeldOutChoice:
    """Compare every held-out block with all known text, though none may be left.

    Args:
        contributions: With their blocks.
        base: Its tokenizer decodes them; its train text counts if the index lies beside it.
        elsewhere: What is known of text that is not here.

    Raises:
        CorpusError: If a prepared corpus or the index is malformed.
    """
    recipe = str((base.training or {}).get("recipe", ""))
    index = load_index(find_base_index(base.folder), recipe) if recipe else None
    known = [*list_known(contributions, base.tokenizer)]
    if elsewhere is not None:
        known.append(KnownText("train", "", lambda: elsewhere.shingles))
    if index is not None:
        known.append(KnownText("base", "", lambda: index))
    held_out = {c.contributor: c.held_out for c in contributions}
    trained = [c.contributor for c in contributions if c.train_text]
    return HeldOutChoice(
        overlaps=measure_overlap(held_out, known, base.tokenizer),
        trained=(*trained, *(() if elsewhere is None else elsewhere.trained)),
        absent=tuple(c.contributor for c in contributions if not c.train_text),
        has_base=index is not None,
    )


def list_known(contributions: Iterable[Contributed], tokenizer: Any) -> Iterator[KnownText]:
    """Text of contributions that parts of a fused model read; loaded one at a time.

    Args:
        contributions: With their samples; train text counts where it is here.
        tokenizer: Hugging Face tokenizer the blocks were made with.
    """
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
