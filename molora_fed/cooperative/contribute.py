"""Every step without a network: train and sign a contribution, receive and fuse on folders.

The federation's workers call the same functions of the core; here folders take the place of mail.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from molora_fed.charter import Charter, load_charter
from molora_fed.contributions.build import build_contribution, measure_start_loss
from molora_fed.contributions.manifest import Contribution
from molora_fed.cooperative.cooperative import open_cooperative
from molora_fed.corpus.documents import read_documents
from molora_fed.corpus.prepare import Corpus, prepare_corpus
from molora_fed.errors import BaseCheckpointError, ConfigError
from molora_fed.fusion.plan import BASE_EXPERT
from molora_fed.models.base import Base, check_base, load_base
from molora_fed.plugins import Plugins, get_plugins
from molora_fed.storage.keys import build_public_pem, key_fingerprint, load_or_make_key
from molora_fed.training.specialists import Specialist, train_specialist
from molora_fed.types import Document, Progress, Split

__all__ = [
    "Terms",
    "Trained",
    "check_choices",
    "open_terms",
    "prepare_domain",
    "sign_specialist",
    "train_contribution",
]


_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


@dataclass(frozen=True, eq=False)
class Terms:
    """What a contributor trains under.

    Attributes:
        charter: The cooperative's charter.
        base: Its base checkpoint, checked against the charter.
    """

    charter: Charter
    base: Base


@dataclass(frozen=True, eq=False)
class Trained:
    """A specialist and the contribution made of it."""

    specialist: Specialist
    contribution: Contribution


def open_terms(source: Path, *, base_folder: Path | None = None) -> Terms:
    """Read a charter and load its base.

    Args:
        source: A cooperative's folder, a contributor's home, or a `cooperative.toml`.
        base_folder: Where the base is; `base/` of the folder if None.

    Raises:
        CharterError: If there is no charter, or it is malformed.
        BaseCheckpointError: If the base is missing or another one.
    """
    folder = source if source.is_dir() else source.parent
    if source.is_dir() and (source / "ledger.db").is_file():
        charter = open_cooperative(source).charter
    elif (source / "charter" / "cooperative.toml").is_file():
        charter = load_charter(source / "charter")
    else:
        charter = load_charter(source)
    where = base_folder or folder / "base"
    if not where.is_dir():
        identity = charter.identity.base
        raise BaseCheckpointError(
            f"Cannot load the base of cooperative '{charter.identity.name}': expected "
            f"{identity.id} with weights {identity.weights[:12]} in '{where}', got no such folder. "
            "Say where the base is."
        )
    base = load_base(where)
    check_base(base, charter.identity.base)
    return Terms(charter, base)


def prepare_domain(
    terms: Terms,
    domain: str,
    data: Sequence[Path],
    folder: Path,
    *,
    shard: tuple[int, int] = (0, 1),
    plugins: Plugins | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """Turn a contributor's text into blocks.

    Args:
        terms: Charter and base.
        domain: Domain name.
        data: Files and folders of text; empty takes the registered domain of that name.
        folder: Gets `corpus/`.
        shard: (i, n): share i of n of the domain's documents.
        plugins: Where domains are registered; the installed plugins by default.
        progress: Receives documents compared of all.

    Raises:
        UnknownNameError: If there are no data and nobody registers the domain.
        CorpusError: If there is too little text, or it cannot be read.
    """
    plugins = plugins or get_plugins()
    documents: Iterable[Document] = (
        read_documents(data) if data else plugins.domains.resolve(domain)()
    )
    return prepare_corpus(
        domain,
        documents,
        terms.base.tokenizer,
        rules=terms.charter.identity.corpus,
        folder=folder / "corpus",
        shard=shard,
        progress=progress,
    )


def check_choices(terms: Terms, *, domain: str, name: str = "", kind: str | None = None) -> None:
    """Refuse what a cooperative has no use for, before any work is done.

    Args:
        terms: Charter and base.
        domain: Domain to train on.
        name: Contributor's name; empty if it is not chosen.
        kind: Adapter kind; None if it is not chosen.

    Raises:
        ConfigError: If a name cannot stand in a contribution, or the charter refuses domain or
            kind.
    """
    charter = terms.charter
    _check_name("domain", domain)
    if name:
        _check_name("name", name)
    allowed = {
        "domain": (domain, charter.amendment.domains),
        "kind": (kind, charter.identity.adapters.kinds),
    }
    for what, (chosen, asked) in allowed.items():
        if chosen is not None and asked and chosen not in asked:
            raise ConfigError(
                f"Cannot train for cooperative '{charter.identity.name}': expected a {what} among "
                f"{', '.join(asked)}, got '{chosen}'. Choose one of these."
            )


def _check_name(what: str, name: str) -> None:
    """Refuse what no manifest can hold, before any work is done.

    Raises:
        ConfigError: Naming what and why.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"Cannot use {what} '{name}': expected lower-case letters, digits and dashes, got "
            f"something else. Choose another with --{what}."
        )
    if what == "name" and name == BASE_EXPERT:
        raise ConfigError(
            f"Cannot use name '{name}': expected another name, got that of the base in every "
            "report. Choose another with --name."
        )


def train_contribution(
    terms: Terms,
    corpus: Corpus,
    folder: Path,
    *,
    name: str = "",
    kind: str | None = None,
    options: Mapping[str, Any] | None = None,
    steps: int | None = None,
    seed: int | None = None,
    threads: int = 1,
    key_path: Path | None = None,
    plugins: Plugins | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train a specialist and sign a contribution made of it; killed and called again, it goes on.

    Args:
        terms: Charter and base.
        corpus: Prepared text of the domain.
        folder: Gets `adapter/`, `record.json`, `metrics.jsonl` and `contribution/`.
        name: Contributor's name; domain and start of the key if empty.
        kind: Adapter kind; the charter's if None.
        options: Options of the kind; the charter's if None and the kind is the charter's.
        steps: Optimiser steps; the charter's if None.
        seed: Seed of training; the charter's if None.
        threads: Torch threads; kept in the training record.
        key_path: The contributor's private key, made if it is not there; `key.pem` of the folder
            if None.
        plugins: Where kinds are registered; the installed plugins by default.
        progress: Told the step with loss, validation_loss, tokens_per_second and eta_seconds.

    Raises:
        ConfigError: If the charter refuses domain or kind, or the name cannot stand in a
            contribution.
        TrainingError: If the folder holds another training.
        CorpusError: If the charter asks for blocks that the corpus has not.
        MoloraError: Whatever training or the disk refuses.
    """
    charter = terms.charter
    rules = charter.amendment.training
    if options is not None:
        rules = rules.model_copy(update={"kind": kind or rules.kind, "options": dict(options)})
    if steps is not None:
        rules = rules.model_copy(update={"steps": steps})
    check_choices(terms, domain=corpus.domain, name=name, kind=kind)
    key = load_or_make_key(key_path or folder / "key.pem")
    specialist = train_specialist(
        terms.base,
        corpus.blocks[Split.TRAIN],
        corpus.blocks[Split.VALIDATION],
        kind=kind or rules.kind,
        rules=charter.identity.adapters,
        training=rules,
        seed=charter.amendment.seed if seed is None else seed,
        threads=threads,
        folder=folder,
        plugins=plugins,
        evaluation_batch=charter.identity.corpus.evaluation_batch,
        progress=progress,
    )
    return sign_specialist(
        terms,
        corpus,
        specialist,
        key=key,
        name=name,
        contamination=corpus.report.contamination,
        start_loss=measure_start_loss(
            terms.base.model, corpus.blocks, charter, domain=corpus.domain
        ),
    )


def sign_specialist(
    terms: Terms,
    corpus: Corpus,
    specialist: Specialist,
    *,
    key: EllipticCurvePrivateKey,
    name: str = "",
    contamination: float | None = None,
    start_loss: float | None = None,
) -> Trained:
    """Sign a contribution made of a specialist and samples of its corpus.

    Args:
        terms: Charter and base.
        corpus: Prepared text of the domain.
        specialist: On disk; its folder gets `contribution/`.
        key: The contributor's private key.
        name: Contributor's name; domain and start of the key if empty.
        contamination: Share of held-out word 8-grams that occur in train; None if not known.
        start_loss: Loss of the model that training started from on the admission sample; None
            states nothing.

    Raises:
        AdapterError: If a value cannot stand in a manifest.
        CorpusError: If the charter asks for blocks that the corpus has not.
        StorageError: If the disk refuses.
    """
    contribution = build_contribution(
        specialist.folder / "contribution",
        adapter=specialist.adapter_folder,
        kind=specialist.kind,
        samples=corpus.blocks,
        key=key,
        charter=terms.charter,
        contributor=name or f"{corpus.domain}-{key_fingerprint(build_public_pem(key))[:6]}",
        domain=corpus.domain,
        training=specialist.record,
        base_loss=specialist.base_loss,
        specialist_loss=specialist.loss,
        contamination=contamination,
        start_loss=start_loss,
    )
    return Trained(specialist, contribution)
