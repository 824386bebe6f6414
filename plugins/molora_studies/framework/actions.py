"""The work behind `molora_studies.framework.substrate`: each function is one task's action."""

from collections.abc import Mapping
from typing import Any

from molora_fed.adapters.compatibility import applied
from molora_fed.adapters.files import load_adapter
from molora_fed.charter import AdapterRules, CorpusRules, TrainingRules
from molora_fed.corpus.blocks import Blocks
from molora_fed.corpus.documents import open_domain
from molora_fed.corpus.prepare import Corpus, load_corpus, prepare_corpus
from molora_fed.models.base import Base, fetch_base, load_base
from molora_fed.models.base_files import copy_checkpoint, quiet_transformers
from molora_fed.models.runtime import Placement, choose_placement
from molora_fed.plugins import get_plugins
from molora_fed.storage.compute import Compute
from molora_fed.storage.files import replace_folder, storage_errors
from molora_fed.training.adapter_job import Specialist
from molora_fed.training.builtin_base import BuiltinBaseConfig, create_builtin_base
from molora_fed.training.pooled import train_monolithic
from molora_fed.training.specialists import train_specialist
from molora_fed.types import Document, Split
from molora_studies.framework.contract import Done, Task, TaskContext
from molora_studies.framework.substrate import BaseSettings, SpecialistSettings

__all__ = [
    "apply_to_base",
    "make_base",
    "open_base",
    "open_corpus",
    "prepare_domain",
    "train_domain",
    "train_pooled",
]

_NEVER = 10**9  # validations without improvement: more than any run has
_UNLIMITED = 2**62


def _read_documents(domain: str) -> list[Document]:
    return list(open_domain(domain, get_plugins())())


def make_base(settings: Mapping[str, Any], context: TaskContext) -> dict[str, Any]:
    """Make or fetch a base into `base/`; see `plan_base`."""
    chosen = BaseSettings.model_validate(settings)
    if chosen.source != "builtin":
        base = fetch_base(chosen.source, context.folder / "base")
    else:
        config = BuiltinBaseConfig(
            **chosen.model_dump(exclude={"source", "domains", "device", "dtype"}),
            # A given number of threads, so that every machine and cooperative finds the same base.
        )
        base = create_builtin_base(
            context.folder / "base",
            {domain: _read_documents(domain) for domain in chosen.domains},
            config=config,
            cache=context.cache,
            progress=context.progress,
        )
    training = dict(base.training or {})
    return {
        "weights": base.weights,
        "hidden_size": base.hidden_size,
        "parameters": sum(parameter.numel() for parameter in base.model.parameters()),
        "tokens": training.get("tokens"),
        "validation_losses": training.get("validation_losses", {}),
    }


def open_base(done: Done) -> Base:
    """The base of a finished `plan_base` or `plan_continued_base`, where its settings put it."""
    return load_base(done.folder / "base", _choose_placement(done.task))


def _choose_placement(base: Task) -> Placement:
    """Device and dtype of a base's settings; one that was continued has those of the first."""
    settings = next(task.settings for task in base.walk() if task.action == "make-base")
    return choose_placement(Compute.parse(settings.get("device", "cpu"), settings.get("dtype")))


def open_corpus(done: Done) -> Corpus:
    """The blocks of a finished `plan_corpus`."""
    return load_corpus(done.folder / "corpus")


def prepare_domain(settings: Mapping[str, Any], context: TaskContext) -> dict[str, Any]:
    """Prepare a domain's blocks into `corpus/`; see `plan_corpus`."""
    corpus = prepare_corpus(
        settings["domain"],
        _read_documents(settings["domain"]),
        open_base(context.needs[0]).tokenizer,
        rules=CorpusRules(block_size=settings["block_size"]),
        folder=context.folder / "corpus",
        shard=(settings["shard"][0], settings["shard"][1]),
        progress=context.progress,
    )
    return corpus.report.to_json()


def train_domain(settings: Mapping[str, Any], context: TaskContext) -> dict[str, Any]:
    """Train a specialist; see `plan_specialist`."""
    chosen = SpecialistSettings.model_validate(settings)
    base, corpus = open_base(context.needs[0]), open_corpus(context.needs[1])
    specialist = train_specialist(
        base,
        corpus.blocks[Split.TRAIN],
        _take_validation(corpus, chosen),
        kind=chosen.kind,
        rules=_build_rules(chosen),
        training=_build_training(chosen),
        seed=chosen.seed,
        threads=context.threads,
        folder=context.folder,
        progress=context.progress,
    )
    return _describe(specialist)


def train_pooled(settings: Mapping[str, Any], context: TaskContext) -> dict[str, Any]:
    """Train the base on several domains in equal shares; see `plan_pooled`."""
    chosen = SpecialistSettings.model_validate(settings)
    base = open_base(context.needs[0])
    corpora = [open_corpus(done) for done in context.needs[1:]]
    specialist = train_monolithic(
        base,
        [corpus.blocks[Split.TRAIN] for corpus in corpora],
        [_take_validation(corpus, chosen) for corpus in corpora],
        kind=chosen.kind,
        steps=chosen.steps,
        rules=_build_rules(chosen),
        training=_build_training(chosen),
        seed=chosen.seed,
        threads=context.threads,
        folder=context.folder,
        progress=context.progress,
    )
    return _describe(specialist)


def apply_to_base(settings: Mapping[str, Any], context: TaskContext) -> dict[str, Any]:
    """Save base plus adapter as a base of its own in `base/`; see `plan_continued_base`."""
    base, trained = open_base(context.needs[0]), context.needs[1]
    adapter = load_adapter(trained.folder / "adapter", plugins=get_plugins(), name="continued")
    target = context.folder / "base"
    with (
        replace_folder(target) as folder,
        applied(base.model, adapter) as model,
        storage_errors(folder),
        quiet_transformers(),
    ):
        copy_checkpoint(base.folder, folder)  # the tokenizer's files stay byte for byte
        model.save_pretrained(folder)
    made = load_base(target, _choose_placement(context.needs[0].task))
    return {
        "weights": made.weights,
        "hidden_size": made.hidden_size,
        "steps": trained.result["steps"],
    }


def _take_validation(corpus: Corpus, chosen: SpecialistSettings) -> Blocks:
    blocks = corpus.blocks[Split.VALIDATION]
    return blocks if chosen.validation is None else blocks.take(chosen.validation)


def _build_rules(chosen: SpecialistSettings) -> AdapterRules:
    return AdapterRules(
        kinds=(chosen.kind,),
        max_rank=max(chosen.rank, 1),
        max_bytes=_UNLIMITED,
        frozen_depth=chosen.frozen_depth,
    )


def _build_training(chosen: SpecialistSettings) -> TrainingRules:
    return TrainingRules(
        kind=chosen.kind,
        rank=chosen.rank,
        steps=chosen.steps,
        batch=chosen.batch,
        learning_rate=chosen.learning_rate,
        validate_every=min(chosen.validate_every, chosen.steps),
        patience=_NEVER if chosen.patience is None else chosen.patience,
        options=dict(chosen.options),
    )


def _describe(specialist: Specialist) -> dict[str, Any]:
    record = specialist.record
    kept = ("steps", "tokens", "best_step", "initial_loss", "rank", "frozen_depth", "adapter_bytes")
    return {
        "domain": specialist.domain,
        "kind": specialist.kind,
        "base_loss": specialist.base_loss,
        "loss": specialist.loss,
        "adapter_hash": specialist.adapter_hash,
        **{name: record[name] for name in kept},
    }
