"""The recipe of the built-in base: a byte-level BPE and a small GPT-NeoX, from local text only.

It is sized to be trained in about two minutes on two cores. It reads the domains' train splits (and
their validation splits to report losses). Contributors of the same domains are measured on none of
it; domains made of the same sources may be, so the word 8-grams of the train splits are kept beside
the base, for fusions to leave out held-out blocks that lie in it. Small
batches and larger initial weights than usual (0.06, not 0.02) are what such a short run needs:
after 1.2M tokens the mean validation loss was 4.09 nats with batch 16 and 0.02, 3.99 with batch 4,
3.85 with batch 4 and 0.06 (one seed).
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedTokenizerFast,
)

from molora_fed.corpus.batches import mix_domains
from molora_fed.corpus.blocks import Blocks, pack_documents
from molora_fed.corpus.clusters import index_shingles
from molora_fed.corpus.overlap import copy_index, find_base_index, load_index, save_index
from molora_fed.corpus.prepare import SplitDocuments, split_documents
from molora_fed.errors import CorpusError
from molora_fed.models.base import CARD_FILE, Base, check_free, fetch_base, load_base, write_card
from molora_fed.models.base_files import (
    quiet_transformers,
)
from molora_fed.models.forward import compute_block_losses
from molora_fed.models.runtime import limit_threads
from molora_fed.storage.files import (
    canonical_json,
    hash_bytes,
    replace_folder,
    storage_errors,
)
from molora_fed.training.language_model import TrainConfig, train
from molora_fed.training.loop import METRICS_NAME
from molora_fed.types import Document, Progress, Split

__all__ = [
    "BUILTIN_ID",
    "BuiltinBaseConfig",
    "TrainedBase",
    "compute_recipe_key",
    "create_builtin_base",
    "split_domains",
    "train_builtin_base",
    "train_tokenizer",
]


BUILTIN_ID = "builtin"
RECIPE_VERSION = 1  # raise on any change below that changes the weights
_TRAINING_FOLDER = "training"
END_OF_TEXT = "<|endoftext|>"
VALIDATIONS = 6
WATCHED_BLOCKS = 24  # validation blocks of a domain looked at during training
REPORTED_BLOCKS = 128  # and those its reported loss is measured on


@dataclass(frozen=True)
class BuiltinBaseConfig:
    """Settings of the built-in base; all of them decide its fingerprint.

    Attributes:
        vocab_size: Tokens of the vocabulary, the end-of-text token included.
        hidden: D, hidden size.
        layers: L, decoder blocks.
        heads: Attention heads.
        init_std: Standard deviation of initial weights.
        steps: Optimiser steps.
        batch: Blocks per step.
        learning_rate: Peak of AdamW's rate.
        weight_decay: AdamW's decay of matrices.
        beta2: AdamW's second-moment decay.
        seed: Seed of weights and data order.
        block_size: T, tokens per block.
        split_seed: Seed of the charter's corpus rules.
        threads: Torch threads; fixed, so that all machines get the same sums.
    """

    vocab_size: int = 2048
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    init_std: float = 0.06
    steps: int = 2600
    batch: int = 4
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    beta2: float = 0.99
    seed: int = 42
    block_size: int = 128
    split_seed: int = 42
    threads: int = 2


@dataclass(frozen=True, eq=False)
class TrainedBase:
    """A base that was just trained.

    Attributes:
        model: The model.
        tokenizer: The tokenizer.
        record: Steps, tokens, validation loss by domain, settings, versions; no wall time.
        metrics: The run's metrics file.
    """

    model: Any
    tokenizer: Any
    record: Mapping[str, Any]
    metrics: Path

    def save(self, folder: Path) -> None:
        """Write a Hugging Face checkpoint with the metrics of its training.

        Raises:
            StorageError: On I/O errors.
        """
        with storage_errors(folder), quiet_transformers():
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            (folder / METRICS_NAME).write_bytes(self.metrics.read_bytes())


def split_domains(
    documents_by_domain: Mapping[str, Iterable[Document]], config: BuiltinBaseConfig
) -> dict[str, SplitDocuments]:
    """Split each domain's documents as its contributors will, domains sorted by name.

    Raises:
        CorpusError: If there is no domain, or one has too little text.
    """
    if not documents_by_domain:
        raise CorpusError(
            "Cannot make the built-in base: expected at least one domain, got none. "
            "Name a domain, or pass a base."
        )
    splits = {}
    for domain in sorted(documents_by_domain):
        try:
            splits[domain] = split_documents(documents_by_domain[domain], seed=config.split_seed)
        except CorpusError as error:
            raise CorpusError(
                f"Cannot make the built-in base, domain '{domain}': {error}"
            ) from error
    return splits


def compute_recipe_key(splits: Mapping[str, SplitDocuments], config: BuiltinBaseConfig) -> str:
    """SHA-256 over the settings and all text the base reads, lower-case hex."""
    texts = {
        domain: [hash_bytes(d.text.encode()) for s in _READ_SPLITS for d in documents[s]]
        for domain, documents in splits.items()
    }
    return hash_bytes(canonical_json([RECIPE_VERSION, asdict(config), texts]))


_READ_SPLITS = (Split.TRAIN, Split.VALIDATION)


def train_tokenizer(splits: Mapping[str, SplitDocuments], config: BuiltinBaseConfig) -> Any:
    """Train a byte-level BPE on the train splits, as in GPT-2 and Pythia."""
    texts = [d.text for documents in splits.values() for d in documents[Split.TRAIN]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def _build_model(config: BuiltinBaseConfig, end_of_text: int) -> Any:
    """GPT-NeoX (Pythia's architecture) with random weights from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                intermediate_size=4 * config.hidden,
                hidden_act="gelu_pytorch_tanh",  # a fifth faster on CPUs than the exact form
                max_position_embeddings=max(512, 4 * config.block_size),
                rope_parameters={
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "partial_rotary_factor": 1.0,  # 0.01 nats better than Pythia's quarter
                },
                initializer_range=config.init_std,
                bos_token_id=end_of_text,
                eos_token_id=end_of_text,
                pad_token_id=end_of_text,
                tie_word_embeddings=False,
            )
        )


def _pack(
    splits: Mapping[str, SplitDocuments], split: Split, tokenizer: Any, block_size: int
) -> dict[str, Blocks]:
    """Blocks of one split by domain.

    Raises:
        CorpusError: If a domain has none.
    """
    packed = {
        domain: pack_documents(
            documents[split],
            documents.clusters[split],
            tokenizer,
            domain=domain,
            split=split,
            block_size=block_size,
        )
        for domain, documents in splits.items()
    }
    empty = [domain for domain, blocks in packed.items() if len(blocks) == 0]
    if empty:
        raise CorpusError(
            f"Cannot make the built-in base: expected at least one block of {block_size} tokens "
            f"in split '{split}', got none for {', '.join(empty)}. Add text or drop these domains."
        )
    return packed


def train_builtin_base(
    splits: Mapping[str, SplitDocuments],
    config: BuiltinBaseConfig,
    folder: Path,
    progress: Progress | None = None,
) -> TrainedBase:
    """Train tokenizer and model; resumes a run that was stopped in the folder.

    Args:
        splits: Documents of each domain, from `split_domains`.
        config: Settings.
        folder: Gets checkpoint and metrics.
        progress: Told the step with loss, validation_loss, tokens_per_second and eta_seconds.

    Raises:
        CorpusError: If a domain has too little text for one block.
        TrainingError: See `molora_fed.training.language_model.train`.
        StorageError: On I/O errors.
    """
    tokenizer = train_tokenizer(splits, config)
    packed = _pack(splits, Split.TRAIN, tokenizer, config.block_size)
    validation = _pack(splits, Split.VALIDATION, tokenizer, config.block_size)
    rows = mix_domains(
        [blocks.tokens for blocks in packed.values()], config.steps * config.batch, seed=config.seed
    )
    watched = np.concatenate([b.take(WATCHED_BLOCKS).tokens for b in validation.values()])
    model = _build_model(config, tokenizer.eos_token_id)
    result = train(
        model,
        list(model.parameters()),
        rows,
        watched,
        TrainConfig(
            steps=config.steps,
            batch=config.batch,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            beta2=config.beta2,
            seed=config.seed,
            threads=config.threads,
            validate_every=max(1, -(-config.steps // VALIDATIONS)),
        ),
        folder,
        context={"recipe": compute_recipe_key(splits, config)},
        progress=progress,
    )
    with limit_threads(result.threads):
        losses = {
            domain: float(
                compute_block_losses(model, blocks.take(REPORTED_BLOCKS).tokens).double().mean()
            )
            for domain, blocks in validation.items()
        }
    record = {
        **result.to_record(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "validation_losses": losses,
        "train_tokens": {domain: int(blocks.tokens.size) for domain, blocks in packed.items()},
        "settings": asdict(config),
    }
    return TrainedBase(model.requires_grad_(False), tokenizer, record, folder / METRICS_NAME)


def create_builtin_base(
    folder: Path,
    documents_by_domain: Mapping[str, Iterable[Document]],
    *,
    config: BuiltinBaseConfig | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Base:
    """Make the built-in base: a byte-level BPE and a small GPT-NeoX, on the domains' train splits.

    The same documents, settings, versions and kind of processor give the same fingerprint.
    A base made before is found again without training; a kill in the middle costs only the
    steps since the last checkpoint.

    The word 8-grams of its train text lie beside it, see `find_base_index`.

    Args:
        folder: Target; absent, empty, or holding this base or the training of it.
        documents_by_domain: Documents of each domain; each gets an equal share of the tokens.
        config: Settings.
        cache: Folder shared by cooperatives; the base is made in a subfolder and copied.
        progress: Told steps with loss, validation_loss, tokens_per_second and eta_seconds.

    Raises:
        BaseCheckpointError: If the target holds something else.
        CorpusError: If a domain has too little text.
        TrainingError: See `molora_fed.training.language_model.train`.
        StorageError: On I/O errors.
    """
    settings = config or BuiltinBaseConfig()
    splits = split_domains(documents_by_domain, settings)
    key = compute_recipe_key(splits, settings)
    made = folder if cache is None else cache / f"{BUILTIN_ID}-{key[:16]}"
    if (made / CARD_FILE).exists():
        base = load_base(made)
        if base.training is None or base.training.get("recipe") != key:
            check_free(made)
    else:
        check_free(made, _TRAINING_FOLDER)
        trained = train_builtin_base(splits, settings, made / _TRAINING_FOLDER, progress)
        with replace_folder(made) as target:
            trained.save(target)
            write_card(target, BUILTIN_ID, key[:16], {**trained.record, "recipe": key})
        base = load_base(made)
    _keep_index(made, key, splits)
    if made == folder:
        return base
    base = fetch_base(str(made), folder)
    copy_index(made, folder)
    return base


def _keep_index(folder: Path, key: str, splits: Mapping[str, SplitDocuments]) -> None:
    """Write the index of the train text beside a base, unless it is there."""
    path = find_base_index(folder)
    if load_index(path, key) is None:
        texts = (d.text for documents in splits.values() for d in documents[Split.TRAIN])
        save_index(path, index_shingles(texts), key)
