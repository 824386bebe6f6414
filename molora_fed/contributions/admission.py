"""Admission: runs the core's checks and the charter's on a contribution and decides.

Checks are plugins, `(AdmissionCandidate) -> Finding | None`, and collect: a contributor learns of
everything that is wrong at once. A check that fails itself decides nothing: the contribution is
quarantined, and nobody else waits for it.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from molora_fed.adapters.compatibility import applied, count_changed
from molora_fed.adapters.files import load_adapter
from molora_fed.adapters.updates import Adapter
from molora_fed.charter import Amendment, Charter
from molora_fed.contributions.decision import (
    AdmissionDecision,
    AdmissionLosses,
    ChangedModules,
    Refusal,
)
from molora_fed.contributions.manifest import Contribution
from molora_fed.contributions.states import ContributionState
from molora_fed.corpus.blocks import Blocks, load_blocks
from molora_fed.errors import (
    AdapterError,
    CharterError,
    ConfigError,
    CorpusError,
    PluginError,
    RoutingError,
    SignatureError,
    StorageError,
    UnknownNameError,
)
from molora_fed.guard import guarded, refuse
from molora_fed.models.forward import compute_block_losses
from molora_fed.models.hidden_statistics import compute_statistics_bytes, load_statistics
from molora_fed.plugins import Entry, Plugins
from molora_fed.storage.options import Choice, open_choice
from molora_fed.types import Finding, Progress, Split

if TYPE_CHECKING:
    from molora_fed.models.base import Base

__all__ = [
    "MANDATORY",
    "AdmissionCandidate",
    "AdmissionDecision",
    "AdmissionLosses",
    "Refusal",
    "Stage",
    "admit",
    "find_stage",
    "needs",
]

FILES_CHECK = "readable-files"
MANDATORY = (
    "adapter-limits",
    "base-fingerprint",
    "carried-files",
    "charter-identity",
    "claimed-base",
    "finite-values",
    "frozen-depth",
    "near-copy",
    "other-domains",
    "own-domain-loss",
    "quantised-base",
    "required-samples",
    "shared-initialisation",
    "signature",
    "tensor-layout",
)
"""Checks of the core without which nothing is admitted, whatever a charter or plugins say."""

_Check = TypeVar("_Check", bound=Callable[..., Any])


class Stage(IntEnum):
    """What a check needs; stages run in this order, checks of a stage by name.

    MANIFEST: the manifest only; runs whatever else is wrong.
    ADAPTER: the files, which could be read.
    MODEL: an adapter that no earlier check found fault with, to be run on the base.
    """

    MANIFEST = 0
    ADAPTER = 1
    MODEL = 2


def locate_public_text(folder: Path, domain: str) -> Path:
    """The file of the coordinator's public text of a domain; `domain` is a name."""
    return folder / f"{domain}.safetensors"


def needs(stage: Stage) -> Callable[[_Check], _Check]:
    """Decorate an admission check with what it needs; a check without it needs MODEL.

    Of a class with options, the class or its `__call__` is decorated.
    """

    def mark(check: _Check) -> _Check:
        check.stage = stage  # type: ignore[attr-defined]
        return check

    return mark


def find_stage(check: Callable[..., Any]) -> Stage:
    """What a check needs."""
    call: object = getattr(check, "__call__", None)  # noqa: B004 (of an instance, its method)
    found: Stage = getattr(call, "stage", getattr(check, "stage", Stage.MODEL))
    return found


@dataclass(eq=False)
class AdmissionCandidate:
    """What an admission check looks at.

    Attributes:
        contribution: The contribution, its files stored and verified.
        charter: The cooperative's charter with the amendment that counts now.
        base: The cooperative's base.
        plugins: Where adapter kinds are looked up.
        others: Admitted contributions of others, which it is compared with and measured on.
        received_under: The amendment that was in force when it was received; the charter's if None.
        progress: Receives blocks done while losses are measured.
        public_folder: Where the coordinator keeps public text of its own, if it does.
    """

    contribution: Contribution
    charter: Charter
    base: "Base"
    plugins: Plugins
    others: Sequence[Contribution] = ()
    received_under: Amendment | None = None
    progress: Progress | None = None
    public_folder: Path | None = None

    @cached_property
    def adapter(self) -> Adapter:
        """The adapter, read on first use within the charter's rules and the base's sizes.

        Raises:
            AdapterError: If its files are malformed or unsafe, or against these.
            UnknownNameError: If no plugin registers its kind.
        """
        return load_adapter(
            self.contribution.adapter_folder,
            rules=self.charter.identity.adapters,
            model=self.base.model,
            plugins=self.plugins,
            name=self.contribution.manifest.contributor,
        )

    def read_adapter(self, other: Contribution) -> Adapter | None:
        """The adapter of one of `others`; None if it cannot be read, which is not this one's fault.

        Args:
            other: One of `others`.
        """
        try:
            return load_adapter(
                other.adapter_folder,
                rules=self.charter.identity.adapters,
                model=self.base.model,
                plugins=self.plugins,
                name=other.manifest.contributor,
            )
        except (AdapterError, PluginError, UnknownNameError):
            return None

    @cached_property
    def effect(self) -> ChangedModules:
        """How many of its modules the adapter changes, counted once.

        Raises:
            AdapterError: As of `adapter`.
        """
        return ChangedModules(count_changed(self.adapter), len(self.adapter.updates))

    @property
    def has_admission_blocks(self) -> bool:
        """Whether there is an admission sample; none is sent where texts are private."""
        return any(split == Split.ADMISSION for split in self.contribution.manifest.sample_files)

    @cached_property
    def admission_blocks(self) -> Blocks:
        """The admission sample, read on first use.

        Raises:
            AdapterError: If it is missing or not what the manifest states.
            CorpusError: If the file is malformed.
        """
        return self.contribution.load_samples(Split.ADMISSION)

    @property
    def has_text(self) -> bool:
        """Whether there is text of its domain here, a sample of its own or public text."""
        if self.has_admission_blocks or self.public_folder is None:
            return self.has_admission_blocks
        return locate_public_text(self.public_folder, self.contribution.manifest.domain).is_file()

    @cached_property
    def text(self) -> Blocks:
        """What it is measured on: its admission sample, or the coordinator's own public text.

        Raises:
            AdapterError: If there is no sample, or it is not what the manifest states.
            ConfigError: If the coordinator's file is malformed.
            CorpusError: If the sample is.
        """
        if self.has_admission_blocks or self.public_folder is None:
            return self.admission_blocks
        path = locate_public_text(self.public_folder, self.contribution.manifest.domain)
        try:
            return load_blocks(path)
        except CorpusError as error:  # nobody's fault but the coordinator's
            raise ConfigError(f"{error} Keep it anew with `molora coop text`.") from error

    @cached_property
    def losses(self) -> AdmissionLosses:
        """Losses of the base and of the specialist on the text that is here, measured once.

        Raises:
            AdapterError: If the adapter does not fit the base.
            ShapeError: If a token id lies outside the vocabulary.
        """
        return AdmissionLosses(self.base_loss, self.measure(self.adapter, self.text))

    @cached_property
    def base_loss(self) -> float:
        """Loss of the base on the text that is here, nats per token, measured once."""
        return self.measure(None, self.text)

    def measure(self, adapter: Adapter | None, blocks: Blocks) -> float:
        """Mean loss of an adapter, or of the base, nats per token; NaN or infinite if one is."""
        with applied(self.base.model, adapter) as model:
            losses = compute_block_losses(
                model,
                blocks.tokens,
                batch=self.charter.identity.corpus.evaluation_batch,
                progress=self.progress,
            )
        return float(losses.double().mean())


def admit(candidate: AdmissionCandidate, *, accepted: Collection[str] = ()) -> AdmissionDecision:
    """Run the core's checks and those that the charter names beside, and decide.

    Args:
        candidate: What to judge.
        accepted: Checks, by name or label, whose wish that a person looks at it a person has
            granted.

    Returns:
        REJECTED if a check refuses it for good, else QUARANTINED if a check wants a person to
        look at it or fails itself, else ADMITTED.

    Raises:
        StorageError: On I/O errors; nothing is decided then.
    """
    contributor = candidate.contribution.manifest.contributor
    registry = candidate.plugins.admission_checks
    refusals: list[Refusal] = []
    notes: list[str] = []
    checks: dict[str, Callable[[AdmissionCandidate], Finding | None]] = {}
    chosen = _list_checks(candidate)
    for key, choice in chosen.items():
        try:
            if key in MANDATORY and not registry.entry(choice.name).is_own:
                title = registry.entry(choice.name).title
                raise PluginError(f"{title} stands in place of the core's.")
            checks[key] = open_choice(registry, choice, key="admission.checks")
        except (UnknownNameError, PluginError, CharterError) as error:
            refusals.append(_describe_failure(contributor, key, error))
    refusals += _find_unreadable(candidate)
    readable = not any(refusal.check == FILES_CHECK for refusal in refusals)
    stages = {key: find_stage(check) for key, check in checks.items()}
    run: list[str] = []
    for stage in Stage:
        if stage == Stage.ADAPTER and not readable:
            continue
        if stage == Stage.MODEL and refusals:
            break
        for key in (key for key in sorted(checks) if stages[key] == stage):
            run.append(key)
            found = _run_check(checks[key], candidate, registry.entry(chosen[key].name), key)
            if found is not None and found.is_note:
                notes.append(f"{key}: expected {found.expected}, got {found.found}. {found.fix}")
                continue
            if found is None or (found.quarantine and not found.failed and key in accepted):
                continue
            refusals.append(found)
            if stage == Stage.MODEL and not found.quarantine:
                break  # refused for good: what else it does on the model is not worth a pass
    if any(not refusal.quarantine for refusal in refusals):
        state = ContributionState.REJECTED
    else:
        state = ContributionState.QUARANTINED if refusals else ContributionState.ADMITTED
    known = vars(candidate)  # only what a check asked for was measured
    return AdmissionDecision.of(
        state, refusals, run, known.get("losses"), notes, known.get("effect")
    )


def _list_checks(candidate: AdmissionCandidate) -> dict[str, Choice]:
    """What runs, by key: the core's own checks as they are, and those that the charter names.

    Nothing of a charter stands in place of a check of the core.
    """
    own = {entry.name for entry in candidate.plugins.admission_checks if entry.is_own}
    core = {name: Choice(name=name) for name in {*own, *MANDATORY}}
    named = {choice.key: choice for choice in candidate.charter.amendment.admission.checks}
    return dict(sorted({**named, **core}.items()))


_REFUSING = (AdapterError, CorpusError, RoutingError, SignatureError)
"""What a check may raise about a contribution, instead of describing it."""


def _run_check(
    check: Callable[[AdmissionCandidate], Finding | None],
    candidate: AdmissionCandidate,
    entry: Entry,
    key: str,
) -> Refusal | None:
    contributor = candidate.contribution.manifest.contributor
    try:
        with guarded(entry, "admission", passing=_REFUSING):
            finding = check(candidate)
        _check_finding(finding, entry)
    except StorageError:  # a full disk is nobody's fault, and passes
        raise
    except _REFUSING as error:
        finding = Finding(
            expected="a contribution that can be measured on the base",
            found=str(error),
            fix="Train on the cooperative's base and export again.",
        )
    except Exception as error:
        return _describe_failure(contributor, key, error)
    return None if finding is None else Refusal.of(contributor, key, finding)


def _check_finding(finding: object, entry: Entry) -> None:
    """Refuse what a check may not give back."""
    place = "admission"
    if finding is None:
        return
    if type(finding) is not Finding:
        raise refuse(entry, place, expected="a Finding or None", got=type(finding).__name__)
    texts = (finding.expected, finding.found, finding.fix)
    if not all(isinstance(text, str) and text.strip() for text in texts):
        wanted = "a Finding that says what is expected, what was found and what to do"
        raise refuse(entry, place, expected=wanted, got=texts)


def _describe_failure(contributor: str, check: str, error: Exception) -> Refusal:
    """A check that failed found nothing, good or bad: a person has to look."""
    reason = str(error) if isinstance(error, (PluginError, UnknownNameError)) else ""
    finding = Finding(
        expected="a check that comes to an end",
        found=reason or f"{type(error).__name__}: {error}",
        fix="The coordinator corrects the check, or its plugin, and has this judged again with "
        "`molora coop release`.",
        quarantine=True,
    )
    return Refusal.of(contributor, check, finding, failed=True)


def _find_unreadable(candidate: AdmissionCandidate) -> list[Refusal]:
    """Read every file once; what cannot be read safely is found here."""
    contributor = candidate.contribution.manifest.contributor
    try:
        return [
            Refusal.of(contributor, FILES_CHECK, finding) for finding in _list_unreadable(candidate)
        ]
    except StorageError:
        raise
    except Exception as error:
        return [_describe_failure(contributor, FILES_CHECK, error)]


def _list_unreadable(candidate: AdmissionCandidate) -> Iterator[Finding]:
    fix = "Build the contribution again and send it."
    try:
        candidate.adapter  # noqa: B018 (reading is the check)
    except AdapterError as error:
        yield Finding("adapter files that can be read safely", str(error).rstrip("."), fix)
    vocabulary = candidate.base.model.get_input_embeddings().weight.shape[0]
    size = candidate.charter.identity.corpus.block_size
    for split in candidate.contribution.manifest.sample_files:
        try:
            blocks = candidate.contribution.load_samples(split)
        except (AdapterError, CorpusError) as error:
            yield Finding(f"{split} blocks that can be read safely", str(error).rstrip("."), fix)
            continue
        low, high = int(blocks.tokens.min()), int(blocks.tokens.max())
        if blocks.block_size != size or low < 0 or high >= vocabulary:
            yield Finding(
                f"{split} blocks of {size} tokens, ids 0 to {vocabulary - 1}",
                f"blocks of {blocks.block_size} tokens, ids {low} to {high}",
                "Prepare the corpus with the cooperative's tokenizer and block size.",
            )
    for name in candidate.contribution.manifest.carried_files:
        try:
            candidate.contribution.carried[name]
        except AdapterError as error:
            yield Finding("carried files that can be read safely", str(error).rstrip("."), fix)
    yield from _list_misfits(candidate)


def _list_misfits(candidate: AdmissionCandidate) -> Iterator[Finding]:
    """Statistics of hidden states that cannot be read, or that no text asked for could have."""
    contribution, charter = candidate.contribution, candidate.charter
    path, width = contribution.statistics_path, candidate.base.hidden_size
    if path is None:
        return
    fix = "Build the contribution again under the charter's rules and send it."
    who, domain = contribution.manifest.contributor, contribution.manifest.domain
    try:
        found = load_statistics(path, domain, who=who, max_bytes=compute_statistics_bytes(width))
    except CorpusError as error:
        yield Finding("statistics that can be read safely", str(error).rstrip("."), fix)
        return
    size = charter.identity.corpus.block_size
    most = (candidate.received_under or charter.amendment).samples.calibration * size
    fault = found.find_misfit(width, most)
    if fault is not None:
        yield Finding(f"statistics of {fault[0]}", fault[1], fix)
