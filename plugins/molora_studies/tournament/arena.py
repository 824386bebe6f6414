"""Arenas: the frozen specialists of one training, with the text routers are fitted and measured on.

Nothing is trained. Columns that a fusion left are used again; what a router reads besides, and the
columns of text that nobody trained on, are made in the tournament's own folder.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from molora_fed.adapters.carried_files import encode_carried
from molora_fed.bank import (
    CalibrationBank,
    Expert,
    HeldOutBank,
    build_calibration_bank,
    build_held_out_bank,
)
from molora_fed.charter import CorpusRules
from molora_fed.corpus.blocks import Blocks, fingerprint_encoding
from molora_fed.corpus.documents import open_domain
from molora_fed.corpus.overlap import KnownText, Overlap, measure_overlap
from molora_fed.corpus.prepare import prepare_corpus
from molora_fed.errors import MoloraError, StorageError
from molora_fed.models.base import Base
from molora_fed.plugins import Plugins
from molora_fed.storage.files import canonical_json, hash_bytes, make_folder, storage_errors
from molora_fed.types import Progress, Reading, Split

__all__ = [
    "Arena",
    "ArenaSource",
    "TournamentSettings",
    "Unseen",
    "compare_text",
    "link_columns",
    "read_unseen",
]


@dataclass(frozen=True, eq=False)
class TournamentSettings:
    """What is the same for all arenas.

    Attributes:
        folder: Keeps banks, prepared text and finished matches, so that a tournament goes on.
        plugins: Where routers and domains are registered.
        routers: Names of the routers that play.
        unseen: Domains whose text is measured where nobody trained on it.
        unseen_tokens: Held-out tokens of each of them, in whole blocks, one at least.
    """

    folder: Path
    plugins: Plugins
    routers: tuple[str, ...]
    unseen: tuple[str, ...]
    unseen_tokens: int


@dataclass(frozen=True)
class ArenaSource:
    """An arena that is not open yet.

    Attributes:
        cooperative: Its specialists' domains, base and recipe; trainings of one are replicates.
        training: Which training, e.g. "seed 42".
        open: Opens it.
    """

    cooperative: str
    training: str
    open: Callable[[TournamentSettings], "Arena"]


@dataclass(frozen=True, eq=False)
class Unseen:
    """Text of domains that no specialist was trained on.

    Attributes:
        blocks: Held-out blocks by domain, in the order of the names.
        left_out: Why other domains are not measured, by name.
    """

    blocks: tuple[Blocks, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Arena:
    """What all routers of one training are fitted and measured on.

    Attributes:
        cooperative: See `ArenaSource`.
        training: See `ArenaSource`.
        base: The shared base.
        experts: The base first, then the specialists.
        calibration: Calibration blocks of each contributor or domain.
        held_out: Held-out blocks of the same.
        unseen: Text that nobody trained on.
        overlaps: Of `held_out`, then of the blocks of `unseen`, with all text that was trained on.
        bank: Further arguments of the banks: mixture, batch, frozen_depth.
        guard: `collapse_nats` and `restarts` of the collapse guard.
        seed: Of routers.
        folder: Where columns are.
    """

    cooperative: str
    training: str
    base: Base
    experts: tuple[Expert, ...]
    calibration: tuple[Blocks, ...]
    held_out: tuple[Blocks, ...]
    unseen: Unseen
    overlaps: tuple[Overlap, ...]
    bank: Mapping[str, Any]
    guard: Mapping[str, Any]
    seed: int
    folder: Path

    @cached_property
    def key(self) -> str:
        """SHA-256 of everything that decides a router's figures here beside the router."""
        adapters = [expert.load() for expert in self.experts]
        blocks = (*self.calibration, *self.held_out, *self.unseen.blocks)
        return hash_bytes(
            canonical_json(
                {
                    "base": self.base.weights,
                    "dtype": str(self.base.model.dtype),
                    "experts": [
                        [expert.name, "" if adapter is None else adapter.hash]
                        for expert, adapter in zip(self.experts, adapters, strict=True)
                    ],
                    "carried": {expert.name: _hash_carried(expert) for expert in self.experts},
                    "blocks": [part.fingerprint for part in blocks],
                    "kept": [overlap.kept.tolist() for overlap in self.overlaps],
                    "bank": dict(self.bank),
                    "guard": dict(self.guard),
                    "seed": self.seed,
                }
            )
        )

    @property
    def has_unseen(self) -> bool:
        """Whether there is text of a domain that nobody trained on."""
        return any(overlap.kept.any() for overlap in self.overlaps[len(self.held_out) :])

    def open_calibration(
        self, readings: frozenset[Reading], progress: Progress | None = None
    ) -> CalibrationBank:
        """The bank that routers are fitted on.

        Raises:
            BankError: See `build_calibration_bank`.
        """
        return build_calibration_bank(
            self.folder,
            self.base,
            self.experts,
            self.calibration,
            readings=readings,
            progress=progress,
            **self.bank,
        )

    def open_held_out(
        self, readings: frozenset[Reading], progress: Progress | None = None
    ) -> HeldOutBank:
        """The bank of the specialists' own domains.

        Raises:
            BankError: See `build_held_out_bank`; also if all blocks were trained on.
        """
        kept = self.overlaps[: len(self.held_out)]
        return self._open_measured(self.held_out, kept, readings, progress)

    def open_unseen(
        self, readings: frozenset[Reading], progress: Progress | None = None
    ) -> HeldOutBank:
        """The bank of text that nobody trained on.

        Raises:
            BankError: See `build_held_out_bank`; also if there is none, see `has_unseen`.
        """
        kept = self.overlaps[len(self.held_out) :]
        return self._open_measured(self.unseen.blocks, kept, readings, progress)

    def _open_measured(
        self,
        blocks: Sequence[Blocks],
        overlaps: Sequence[Overlap],
        readings: frozenset[Reading],
        progress: Progress | None,
    ) -> HeldOutBank:
        return build_held_out_bank(
            self.folder,
            self.base,
            self.experts,
            blocks,
            readings=readings,
            kept=[overlap.kept for overlap in overlaps],
            progress=progress,
            **self.bank,
        )

    def describe(self) -> dict[str, Any]:
        """What was measured on, JSON values."""
        kept = self.overlaps[: len(self.held_out)]
        unseen = self.overlaps[len(self.held_out) :]
        return {
            "cooperative": self.cooperative,
            "training": self.training,
            "base": {"id": self.base.id, "weights": self.base.weights},
            "experts": [expert.name for expert in self.experts],
            "carried": {one.name: list(one.carried) for one in self.experts if one.carried},
            "seed": self.seed,
            "calibration": _count(self.calibration, None),
            "held_out": _count(self.held_out, kept),
            "unseen": _count(self.unseen.blocks, unseen),
            "unseen_left_out": dict(self.unseen.left_out),
        }


def _hash_carried(expert: Expert) -> dict[str, str]:
    """SHA-256 of what an expert carries, by name."""
    found = {name: expert.carried[name] for name in expert.carried}
    return {name: hash_bytes(encode_carried(t)) for name, t in found.items() if t is not None}


def _count(blocks: Sequence[Blocks], overlaps: Sequence[Overlap] | None) -> dict[str, int]:
    """Blocks by domain, those alone that count."""
    counts: dict[str, int] = {}
    for number, part in enumerate(blocks):
        kept = len(part) if overlaps is None else int(overlaps[number].kept.sum())
        counts[part.domain] = counts.get(part.domain, 0) + kept
    return counts


def compare_text(
    held_out: Sequence[Blocks], unseen: Unseen, known: Iterable[KnownText], tokenizer: Any
) -> tuple[Overlap, ...]:
    """Overlaps of held-out blocks, then of blocks that nobody trained on, with known text."""
    parts = {str(number): part for number, part in enumerate((*held_out, *unseen.blocks))}
    return tuple(measure_overlap(parts, known, tokenizer).values())


def read_unseen(
    settings: TournamentSettings, base: Base, rules: CorpusRules, trained: Iterable[str]
) -> Unseen:
    """Held-out blocks of the settings' domains that no specialist was trained on.

    Args:
        settings: The tournament's.
        base: Its tokenizer makes the blocks.
        rules: Of the arena's corpora.
        trained: Domains of the specialists.

    Returns:
        Without domains that this machine has no text of, or too little.

    Raises:
        UnknownNameError: If nobody registers a domain.
    """
    blocks, left_out = [], {}
    known = set(trained)
    for name in settings.unseen:
        settings.plugins.domains.entry(name)
        if name in known:
            left_out[name] = "a specialist was trained on it"
            continue
        try:
            blocks.append(_prepare(settings, base, rules, name))
        except StorageError:
            raise
        except MoloraError as error:
            left_out[name] = str(error)
    return Unseen(tuple(blocks), left_out)


def _prepare(settings: TournamentSettings, base: Base, rules: CorpusRules, name: str) -> Blocks:
    documents = list(open_domain(name, settings.plugins)())
    # A corpus that is kept there already is used if it is of these documents.
    made_with = [fingerprint_encoding(base.tokenizer), rules.model_dump(mode="json")]
    folder = settings.folder / "text" / f"{name}-{hash_bytes(canonical_json(made_with))[:16]}"
    corpus = prepare_corpus(name, documents, base.tokenizer, rules=rules, folder=folder)
    return corpus.blocks[Split.HELD_OUT].take(max(1, settings.unseen_tokens // rules.block_size))


def link_columns(source: Path, target: Path) -> None:
    """Put the columns that a fusion made into another bank's folder; the fusion's stays as it is.

    A column is never changed in place, so that two folders may share its bytes.

    Args:
        source: The fusion's bank; it may be missing.
        target: The other folder; made if needed.

    Raises:
        StorageError: On I/O errors.
    """
    make_folder(target)
    with storage_errors(target):
        for column in sorted(source.glob("*-*.*")):
            place = target / column.name
            if place.exists() or column.suffix not in (".bin", ".json"):
                continue
            try:
                os.link(column, place)
            except OSError:  # another disk, or one without links
                shutil.copy2(column, place)
