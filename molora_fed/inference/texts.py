"""A fused or evolved model on anyone's own text, through the one evaluator."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from molora_fed.bank import Expert, build_held_out_bank
from molora_fed.corpus.blocks import Blocks, pack_documents
from molora_fed.corpus.clusters import cluster_documents
from molora_fed.corpus.documents import read_documents
from molora_fed.corpus.records import TextOptions
from molora_fed.errors import ConfigError, CorpusError
from molora_fed.evaluation.evaluate import Evaluation, evaluate
from molora_fed.inference.opening import Model, PlainModel
from molora_fed.models.base import Base
from molora_fed.models.batches import fit_batch
from molora_fed.population.bundle import EvolvedModel
from molora_fed.population.losses import evaluate_population
from molora_fed.types import Progress, Split

__all__ = ["evaluate_texts"]


def evaluate_texts(
    model: Model,
    data: Mapping[str, Sequence[Path]],
    *,
    block_size: int = 128,
    text: TextOptions | None = None,
    batch: int | None = None,
    seed: int = 42,
    on_phase: Callable[[str], None] = lambda phase: None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure base, specialists or slots alone, and the model on texts.

    All text counts as held-out: that none of it was trained on is for the caller to know.

    Args:
        model: The fused or evolved model.
        data: Files and folders by a name of the text.
        block_size: T, tokens per block.
        text: How files are read.
        batch: Blocks per forward pass; by tokens if None.
        seed: Of clusters and bootstraps.
        on_phase: Told what begins.
        progress: Receives progress within a phase.

    Raises:
        ConfigError: If it is neither fused nor evolved, or blocks are longer than the base's
            positions.
        CorpusError: If a text cannot be read, or is shorter than one block.
        StorageError: If the temporary disk has no room.
    """
    if isinstance(model, PlainModel):
        raise ConfigError(
            f"Cannot evaluate '{model.base.folder}': expected a fused or evolved model, got a base "
            "or a specialist alone. Fuse it, or evolve it."
        )
    batch = fit_batch(model.base.model, block_size, batch)
    blocks = _read_all(model.base, data, block_size, text, seed, on_phase, progress)
    on_phase("measuring")
    with tempfile.TemporaryDirectory(prefix="molora-texts-") as temporary:
        if isinstance(model, EvolvedModel):
            return evaluate_population(
                model, blocks, Path(temporary), batch=batch, seed=seed, progress=progress
            )
        bank = build_held_out_bank(
            Path(temporary),
            model.base,
            [Expert(expert.name, expert.adapter) for expert in model.experts],
            blocks,
            readings=model.router.reads(model.router.options),
            mixture=model.mixture,
            batch=batch,
            frozen_depth=model.frozen_depth,
            progress=progress,
        )
        return evaluate(bank, {model.router_name: model.router}, seed=seed)


def _read_all(
    base: Base,
    data: Mapping[str, Sequence[Path]],
    block_size: int,
    text: TextOptions | None,
    seed: int,
    on_phase: Callable[[str], None],
    progress: Progress | None,
) -> list[Blocks]:
    """All texts as held-out blocks.

    Raises:
        ConfigError: If blocks are longer than the base's positions.
        CorpusError: If a text is shorter than one block.
    """
    positions = base.max_positions
    if positions is not None and block_size > positions:
        raise ConfigError(
            f"Cannot evaluate in blocks of {block_size} tokens: expected at most the base's "
            f"{positions} positions, got more. Choose smaller blocks."
        )
    blocks = []
    for name, paths in data.items():
        on_phase(f"reading {name}")
        blocks.append(_read_blocks(base, name, paths, block_size, text, seed, progress))
    return blocks


def _read_blocks(
    base: Base,
    name: str,
    paths: Sequence[Path],
    block_size: int,
    text: TextOptions | None,
    seed: int,
    progress: Progress | None,
) -> Blocks:
    """One text as held-out blocks, near-duplicates clustered for the intervals.

    Raises:
        CorpusError: If it is shorter than one block.
    """
    documents = list(read_documents(paths, text, tokenizer=base.tokenizer))
    packed = pack_documents(
        documents,
        cluster_documents(documents, seed=seed, progress=progress),
        base.tokenizer,
        domain=name,
        split=Split.HELD_OUT,
        block_size=block_size,
    )
    if len(packed) == 0:
        characters = sum(len(document.text) for document in documents)
        raise CorpusError(
            f"Cannot evaluate on '{name}': expected at least one block of {block_size} tokens, "
            f"got {characters} characters in all. Add text, or choose smaller blocks."
        )
    return packed
