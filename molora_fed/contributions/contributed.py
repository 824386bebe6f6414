"""A contribution with what fusing reads of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from molora_fed.adapters.carried_files import CarriedFiles
from molora_fed.contributions.figures import pick_figures
from molora_fed.contributions.manifest import Contribution
from molora_fed.corpus.blocks import Blocks, load_blocks
from molora_fed.errors import CorpusError
from molora_fed.types import Split

__all__ = [
    "Contributed",
    "Entrant",
    "collect_contributed",
    "collect_entrant",
]


@dataclass(frozen=True, eq=False, kw_only=True)
class Entrant:
    """An admitted contribution without text.

    Attributes:
        id: Contribution id; experts are ordered by it.
        contributor: Name, unique in a fusion; the specialist's name in reports.
        domain: Domain it was trained on.
        adapter: Folder with the adapter's files.
        contamination: Share of held-out word 8-grams that occur in train; None if not known.
        training: Figures of the training record: steps, tokens, threads, ...
        statistics: File with statistics of hidden states over its text; None if it has none.
        carried: What plugins computed for it.
    """

    id: str
    contributor: str
    domain: str
    adapter: Path
    contamination: float | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    statistics: Path | None = None
    carried: CarriedFiles = field(default_factory=CarriedFiles)


@dataclass(frozen=True, eq=False, kw_only=True)
class Contributed(Entrant):
    """An admitted contribution with the samples that fusing reads.

    Attributes:
        held_out: Blocks of the reported figures.
        calibration: Blocks routers are fitted on; None if none are pooled.
        admission: Blocks losses are measured on for forecasts where none are pooled.
        train_text: Folder of the prepared corpus it was trained on; None if it is not here.
    """

    held_out: Blocks
    calibration: Blocks | None = None
    admission: Blocks | None = None
    train_text: Path | None = None


def collect_entrant(contribution: Contribution) -> Entrant:
    """Read what a fusion needs of a contribution whose text is not here."""
    manifest = contribution.manifest
    return Entrant(
        id=contribution.id,
        contributor=manifest.contributor,
        domain=manifest.domain,
        adapter=contribution.adapter_folder,
        contamination=manifest.contamination,
        training=pick_figures(manifest.training),
        statistics=contribution.statistics_path,
        carried=contribution.carried,
    )


def collect_contributed(contribution: Contribution, *, corpus: Path | None = None) -> Contributed:
    """Read what fusing needs of a contribution on disk.

    Args:
        contribution: On disk.
        corpus: Folder of a prepared corpus on this machine; it counts as what the specialist was
            trained on if the contribution's held-out blocks are from it.

    Raises:
        AdapterError: If its blocks are not those its manifest states, or held-out blocks are not
            among them.
        CorpusError: If a file of blocks is malformed.
    """
    manifest = contribution.manifest

    def load(split: Split) -> Blocks | None:
        has_split = any(sample == split for sample in manifest.sample_files)
        return contribution.load_samples(split) if has_split else None

    return Contributed(
        **vars(collect_entrant(contribution)),
        held_out=contribution.load_samples(Split.HELD_OUT),
        calibration=load(Split.CALIBRATION),
        admission=load(Split.ADMISSION),
        train_text=_check_text(contribution, corpus),
    )


def _check_text(contribution: Contribution, corpus: Path | None) -> Path | None:
    """The corpus if the specialist was trained on it, None if not or if that is not known.

    A contribution of a checkpoint trained elsewhere states no contamination: the corpus beside it
    is text that it was not trained on.
    """
    if corpus is None or contribution.manifest.contamination is None:
        return None
    try:
        prepared = load_blocks(corpus / f"{Split.HELD_OUT}.safetensors")
    except CorpusError:
        return None  # moved, deleted or prepared anew: the result says that it was not compared
    sent = contribution.load_samples(Split.HELD_OUT)
    return corpus if prepared.take(len(sent)).fingerprint == sent.fingerprint else None
