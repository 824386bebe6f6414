"""A contributor's flow: text of its domain, an adapter with its losses, a signed contribution.

`molora train` and the federation's worker run the same steps. Each is durable: interrupted
anywhere and run again, it goes on and ends with the same bytes.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from molora_fed.adapters.files import load_adapter
from molora_fed.charter import load_charter
from molora_fed.contributions.build import (
    build_contribution,
)
from molora_fed.contributions.carried import CarriedContext, check_makers, compute_carried
from molora_fed.contributions.manifest import Contribution, QueryEntry
from molora_fed.cooperative.chat_tokens import find_chat_warnings
from molora_fed.cooperative.cooperative import (
    CharterAndBase,
    load_charter_base,
    open_cooperative,
)
from molora_fed.cooperative.measured_adapter import (
    MeasuredAdapter,
    measure_given,
    measure_start,
    measure_trained,
)
from molora_fed.cooperative.pins import check_pins
from molora_fed.cooperative.publish import check_described, measure_statistics
from molora_fed.corpus.documents import check_domain_options, open_domain, read_documents
from molora_fed.corpus.inventory import Inventory
from molora_fed.corpus.prepare import Corpus, prepare_corpus
from molora_fed.corpus.records import TextOptions
from molora_fed.errors import BaseCheckpointError, ConfigError, CorpusError
from molora_fed.models.hidden_statistics import HiddenStatistics
from molora_fed.plugins import Plugins, get_plugins
from molora_fed.population.private_member import carve_own
from molora_fed.privacy.overlap import open_receiver
from molora_fed.storage.compute import Compute, read_compute
from molora_fed.storage.files import hash_bytes
from molora_fed.storage.keys import build_public_pem, key_fingerprint
from molora_fed.storage.names import check_name
from molora_fed.training.choices import TrainingChoices
from molora_fed.training.specialists import train_specialist
from molora_fed.types import Document, OnMemory, Progress, Split

__all__ = [
    "MadeContribution",
    "check_choices",
    "make_contribution",
    "open_charter_and_base",
    "prepare_domain",
    "sign_adapter",
]


@dataclass(frozen=True, eq=False)
class MadeContribution:
    """A signed contribution and the adapter in it."""

    adapter: MeasuredAdapter
    contribution: Contribution


def open_charter_and_base(
    source: Path,
    *,
    base_folder: Path | None = None,
    compute: Compute | None = None,
    progress: Progress | None = None,
) -> CharterAndBase:
    """Read a charter and load its base.

    Args:
        source: A cooperative's folder, a contributor's home, or a `cooperative.toml`.
        base_folder: Where the base is; `base/` of the folder if None.
        compute: Where models are to run; the home's settings where it says nothing.
        progress: See `molora_fed.models.base.load_base`.

    Raises:
        CharterError: If there is no charter, or it is malformed.
        BaseCheckpointError: If the base is missing or another one.
        ComputeError: If this machine lacks device, dtype or memory.
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
    chosen = read_compute(folder, compute)
    return CharterAndBase(charter, load_charter_base(charter, where, chosen, progress))


def prepare_domain(
    under: CharterAndBase,
    domain: str,
    data: Sequence[Path],
    folder: Path,
    *,
    shard: tuple[int, int] = (0, 1),
    text: TextOptions | None = None,
    options: Mapping[str, Any] | None = None,
    plugins: Plugins | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """Turn a contributor's text into blocks.

    Args:
        under: Charter and base.
        domain: Domain name.
        data: Files and folders of text; empty takes the registered domain of that name.
        folder: Gets `corpus/`.
        shard: (i, n): share i of n of the domain's documents.
        text: How files are read, and which tokens count in the training loss.
        options: Options of the registered domain.
        plugins: Where domains are registered; the installed plugins by default.
        progress: Receives documents compared of all.

    Returns:
        The corpus; its report says what was read of the files and what was left out.

    Raises:
        UnknownNameError: If there are no data and nobody registers the domain.
        ConfigError: If the domain does not know its options, or there are data beside them.
        CorpusError: If there is too little text, or it cannot be read.
    """
    plugins = plugins or get_plugins()
    check_domain_options(domain, data, options)
    inventory: Inventory | None = None
    documents: Iterable[Document]
    if not data:
        documents = open_domain(domain, plugins, options)()
    else:
        inventory = Inventory()
        tokenizer = under.base.tokenizer
        documents = list(read_documents(data, text, tokenizer=tokenizer, inventory=inventory))
    try:
        return prepare_corpus(
            domain,
            documents,
            under.base.tokenizer,
            rules=under.charter.identity.corpus,
            folder=folder / "corpus",
            shard=shard,
            inventory=inventory,
            options=options,
            progress=progress,
        )
    except CorpusError as error:
        left_out = inventory.describe_left_out() if inventory else ""
        if not left_out:
            raise
        raise CorpusError(f"{error} Of the files, left out were: {left_out}.") from error


def check_choices(
    under: CharterAndBase,
    *,
    domain: str,
    name: str = "",
    kind: str | None = None,
    plugins: Plugins | None = None,
) -> None:
    """Refuse what a cooperative has no use for, before any work is done.

    Args:
        under: Charter and base.
        domain: Domain to train on.
        name: Contributor's name; empty if it is not chosen.
        kind: Adapter kind; None if it is not chosen.
        plugins: What is registered here; the installed plugins by default.

    Raises:
        ConfigError: If a name cannot stand in a contribution, or the charter refuses domain or
            kind.
        PluginError: If plugins that the charter pins are not here as they are pinned.
    """
    charter = under.charter
    check_pins(charter, plugins or get_plugins())
    check_name("domain", domain)
    if name:
        check_name("name", name)
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


def make_contribution(
    under: CharterAndBase,
    corpus: Corpus,
    folder: Path,
    *,
    key: EllipticCurvePrivateKey,
    name: str = "",
    given: Path | None = None,
    training_folder: Path | None = None,
    kind: str | None = None,
    options: Mapping[str, Any] | None = None,
    choices: TrainingChoices | None = None,
    seed: int | None = None,
    threads: int = 1,
    plugins: Plugins | None = None,
    on_phase: Callable[[str], None] = lambda phase: None,
    on_warning: Callable[[str], None] = lambda text: None,
    on_memory: OnMemory | None = None,
    progress: Progress | None = None,
) -> MadeContribution:
    """Train an adapter, or measure one trained earlier, and sign a contribution made of it.

    Args:
        under: Charter and base.
        corpus: Prepared text of the domain.
        folder: Gets `contribution/`.
        key: The contributor's private key.
        name: Contributor's name; domain and start of the key if empty.
        given: Folder of an adapter trained earlier; None trains one.
        training_folder: Gets `adapter/`, `record.json` and `metrics.jsonl`; `folder` if None.
        kind: Adapter kind; the charter's if None.
        options: Options of the kind; the charter's if None and the kind is the charter's.
        choices: What is trained otherwise than the charter says.
        seed: Seed of training; the charter's if None.
        threads: Torch threads; kept in the training record.
        plugins: Where kinds are registered; the installed plugins by default.
        on_phase: Told what begins: "training" or "measuring", then "building".
        on_warning: Told what to know of chat templates and their tokens, one line each.
        on_memory: Told the bytes that the training needs beside the base, about, and those that
            are free, before its first step; in launched processes nobody is told.
        progress: Told the step with loss, validation_loss, tokens_per_second and eta_seconds.

    Raises:
        AdapterError: If the adapter trained earlier is malformed or does not fit the base.
        ConfigError: If the charter refuses domain or kind, or the name cannot stand in a
            contribution, or a plugin is missing that computes what contributions carry.
        TrainingError: If the folder holds another training.
        CorpusError: If the charter asks for blocks that the corpus has not.
        PopulationError: If the charter keeps texts private and there is too little of it.
        MoloraError: Whatever training raises; a StorageError on I/O errors.
    """
    plugins = plugins or get_plugins()
    charter = under.charter
    check_choices(under, domain=corpus.domain, name=name, kind=kind, plugins=plugins)
    check_makers(charter, plugins)
    if charter.is_private and charter.amendment.fusion.mode == "population":
        carve_own(corpus.blocks, charter)  # too little text is said before training
    if charter.publishes_statistics:
        check_described(under.base, charter, corpus.blocks[Split.CALIBRATION])  # likewise
    for text in find_chat_warnings(under.base, given):
        on_warning(text)
    if given is not None:
        on_phase("measuring")
        adapter = measure_given(under, corpus, given, folder, plugins=plugins, progress=progress)
    else:
        on_phase("training")
        rules = charter.amendment.training
        if options is not None:
            changes = {"kind": kind or rules.kind, "options": dict(options)}
            rules = rules.model_copy(update=changes)
        specialist = train_specialist(
            under.base,
            corpus.blocks[Split.TRAIN],
            corpus.blocks[Split.VALIDATION],
            kind=kind or rules.kind,
            rules=charter.identity.adapters,
            training=rules,
            seed=charter.amendment.seed if seed is None else seed,
            threads=threads,
            folder=training_folder or folder,
            choices=choices,
            plugins=plugins,
            domain_options=corpus.report.options,
            evaluation_batch=charter.identity.corpus.evaluation_batch,
            on_memory=on_memory,
            progress=progress,
        )
        adapter = measure_trained(under.base, specialist, measure_start(under, corpus), plugins)
    on_phase("building")
    contribution = sign_adapter(
        under,
        corpus,
        adapter,
        folder / "contribution",
        key=key,
        name=name,
        contamination=corpus.report.contamination,
        threads=threads,
        plugins=plugins,
        progress=progress,
    )
    return MadeContribution(adapter, contribution)


def sign_adapter(
    under: CharterAndBase,
    corpus: Corpus,
    adapter: MeasuredAdapter,
    folder: Path,
    *,
    key: EllipticCurvePrivateKey,
    name: str = "",
    contamination: float | None = None,
    threads: int = 1,
    plugins: Plugins | None = None,
    progress: Progress | None = None,
) -> Contribution:
    """Sign a contribution made of an adapter and what the charter asks for of its corpus.

    Args:
        under: Charter and base.
        corpus: Prepared text of the domain.
        adapter: On disk, with its losses.
        folder: The contribution's folder, made whole or not at all; what statistics are measured
            from lies beside it for a while.
        key: The contributor's private key.
        name: Contributor's name; domain and start of the key if empty.
        contamination: Share of held-out word 8-grams that occur in train; None if not known.
        threads: Torch threads of plugins that compute what it carries.
        plugins: Where these are registered; the installed plugins by default.
        progress: Told what they tell: steps done and in all.

    Raises:
        AdapterError: If a value cannot stand in a manifest.
        CorpusError: If the charter asks for blocks that the corpus has not, or for statistics of
            more text.
        PluginError: If a plugin fails that computes what it carries.
        UnknownNameError: If nobody registers such a plugin.
        StorageError: On I/O errors.
    """
    name = name or f"{corpus.domain}-{key_fingerprint(build_public_pem(key))[:6]}"
    return build_contribution(
        folder,
        adapter=adapter.folder,
        kind=adapter.kind,
        samples=corpus.blocks,
        key=key,
        charter=under.charter,
        contributor=name,
        domain=corpus.domain,
        # Options of a domain may hold paths of this machine: they stay in the record here.
        training={k: v for k, v in adapter.record.items() if k != "domain_options"},
        base_loss=adapter.base_loss,
        specialist_loss=adapter.loss,
        contamination=contamination,
        start_loss=adapter.start_loss,
        origin=adapter.origin,
        held_out_query=_commit_query(under, corpus, key, name),
        statistics=_measure_statistics(under, corpus, folder.parent / "statistics"),
        carried=_compute_all(
            under, corpus, adapter.folder, plugins or get_plugins(), threads, progress
        ),
    )


def _compute_all(
    under: CharterAndBase,
    corpus: Corpus,
    folder: Path,
    plugins: Plugins,
    threads: int,
    progress: Progress | None,
) -> dict[str, bytes]:
    """What the charter has contributions carry, by name of the file."""
    charter, base = under.charter, under.base
    found = {}
    for choice in charter.amendment.fusion.carried:
        # Read anew for each: what a plugin does to an adapter is nobody else's business.
        adapter = load_adapter(
            folder,
            rules=charter.identity.adapters,
            model=base.model,
            plugins=plugins,
            name=corpus.domain,
        )
        context = CarriedContext(
            base=base,
            adapter=adapter,
            rules=charter.amendment.training,
            seed=charter.amendment.seed,
            max_bytes=charter.amendment.fusion.max_carried_bytes,
            samples=corpus.blocks,
            progress=progress,
        )
        found[choice.key] = compute_carried(choice, context, plugins, threads=threads)
    return found


def _measure_statistics(
    under: CharterAndBase, corpus: Corpus, folder: Path
) -> HiddenStatistics | None:
    """What is published of hidden states; None where routers are not made from it."""
    if not under.charter.publishes_statistics:
        return None
    calibration = corpus.blocks[Split.CALIBRATION]
    return measure_statistics(under.base, under.charter, calibration, folder)


def _commit_query(
    under: CharterAndBase, corpus: Corpus, key: EllipticCurvePrivateKey, name: str
) -> QueryEntry | None:
    """What the manifest states of the query about held-out blocks; None where it asks nobody.

    Held-out blocks with more word 8-grams than a query takes are compared at home only.
    """
    charter = under.charter
    held_out = corpus.blocks[Split.HELD_OUT].take(charter.amendment.samples.held_out)
    if not (charter.is_private and charter.amendment.fusion.mode == "router" and len(held_out)):
        return None
    receiver = open_receiver(
        held_out, under.base.tokenizer, key=key, identity=charter.identity_hash, name=name
    )
    if receiver is None:
        return None
    query = receiver.query.to_bytes()
    return QueryEntry(sha256=hash_bytes(query), bytes=len(query), blocks=len(held_out))
