"""Admission: runs the charter's checks on a contribution and decides.

Checks are plugins, `(AdmissionCandidate) -> Finding | None`, and collect: a contributor learns of
everything that is wrong at once. Reading the files is not a check that can be left out.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from molora_fed.adapters.compatibility import applied
from molora_fed.adapters.files import load_adapter
from molora_fed.adapters.updates import Adapter
from molora_fed.charter import Charter
from molora_fed.contributions.manifest import Contribution
from molora_fed.contributions.states import ContributionState
from molora_fed.corpus.blocks import Blocks
from molora_fed.errors import (
    AdapterError,
    AdmissionError,
    CorpusError,
    RoutingError,
    UnknownNameError,
    describe_mismatch,
)
from molora_fed.guard import guarded, one_line, refuse
from molora_fed.models.forward import compute_block_losses
from molora_fed.plugins import Entry, Plugins
from molora_fed.types import Finding, Progress, Split

if TYPE_CHECKING:
    from molora_fed.models.base import Base

__all__ = [
    "AdmissionCandidate",
    "AdmissionDecision",
    "AdmissionLosses",
    "Refusal",
    "Stage",
    "admit",
    "needs",
]

FILES_CHECK = "readable-files"
_FINDING_CHARACTERS = 2_000
_Check = TypeVar("_Check", bound=Callable[..., Finding | None])


class Stage(IntEnum):
    """What a check needs; stages run in this order, checks of a stage by name.

    MANIFEST: the manifest only; runs whatever else is wrong.
    ADAPTER: the files, which could be read.
    MODEL: an adapter that no earlier check found fault with, to be run on the base.
    """

    MANIFEST = 0
    ADAPTER = 1
    MODEL = 2


def needs(stage: Stage) -> Callable[[_Check], _Check]:
    """Decorate an admission check with what it needs; a check without it needs MODEL."""

    def mark(check: _Check) -> _Check:
        check.stage = stage  # type: ignore[attr-defined]
        return check

    return mark


@dataclass(frozen=True)
class AdmissionLosses:
    """Mean losses on a contribution's admission sample, nats per token."""

    base: float
    specialist: float


@dataclass(eq=False)
class AdmissionCandidate:
    """What an admission check looks at.

    Attributes:
        contribution: The contribution, its files stored and verified.
        charter: The cooperative's charter with the amendment that counts now.
        base: The cooperative's base.
        plugins: Where adapter kinds are looked up.
        progress: Receives blocks done while losses are measured.
    """

    contribution: Contribution
    charter: Charter
    base: "Base"
    plugins: Plugins
    progress: Progress | None = None

    @cached_property
    def adapter(self) -> Adapter:
        """The adapter, read on first use.

        Raises:
            AdapterError: If its files are malformed or unsafe.
            UnknownNameError: If no plugin registers its kind.
        """
        return load_adapter(
            self.contribution.adapter_folder,
            plugins=self.plugins,
            name=self.contribution.manifest.contributor,
        )

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

    @cached_property
    def losses(self) -> AdmissionLosses:
        """Losses of the base and of the specialist on the admission sample, measured once.

        Raises:
            AdapterError: If the adapter does not fit the base.
            ShapeError: If a token id lies outside the vocabulary.
        """
        return AdmissionLosses(self.base_loss, self._measure(self.adapter))

    @cached_property
    def base_loss(self) -> float:
        """Loss of the base on the admission sample, nats per token, measured once."""
        return self._measure(None)

    def _measure(self, adapter: Adapter | None) -> float:
        with applied(self.base.model, adapter) as model:
            losses = compute_block_losses(
                model,
                self.admission_blocks.tokens,
                batch=self.charter.identity.corpus.evaluation_batch,
                progress=self.progress,
            )
        return float(losses.double().mean())


@dataclass(frozen=True)
class Refusal:
    """A finding with the contributor and the check it belongs to."""

    contributor: str
    check: str
    expected: str
    found: str
    fix: str
    quarantine: bool = False

    @property
    def message(self) -> str:
        """The one line that people see."""
        return describe_mismatch(
            f"Cannot admit contribution of '{self.contributor}', check '{self.check}'",
            expected=self.expected,
            got=self.found,
            fix=self.fix,
        )


@dataclass(frozen=True)
class AdmissionDecision:
    """What admission decided.

    Attributes:
        state: ADMITTED, QUARANTINED or REJECTED.
        refusals: What was found wrong; empty if admitted.
        checks: Names of the checks that ran, in order.
        losses: What was measured on the admission sample; None if no check asked.
    """

    state: ContributionState
    refusals: tuple[Refusal, ...] = ()
    checks: tuple[str, ...] = ()
    losses: AdmissionLosses | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON values for the ledger; `from_json` reads them back."""
        return {
            "state": str(self.state),
            "refusals": [asdict(refusal) for refusal in self.refusals],
            "checks": list(self.checks),
            "losses": None if self.losses is None else asdict(self.losses),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "AdmissionDecision":
        """The decision that `to_json` wrote."""
        losses = value["losses"]
        return cls(
            ContributionState(value["state"]),
            tuple(Refusal(**refusal) for refusal in value["refusals"]),
            tuple(value["checks"]),
            None if losses is None else AdmissionLosses(**losses),
        )

    def check_admitted(self) -> None:
        """Refuse to go on unless the contribution was admitted.

        Raises:
            AdmissionError: With a sentence for each refusal, in one line.
        """
        if self.state != ContributionState.ADMITTED:
            raise AdmissionError(" ".join(refusal.message for refusal in self.refusals))


def admit(candidate: AdmissionCandidate) -> AdmissionDecision:
    """Run the core's checks and those that the charter names beside, and decide.

    Args:
        candidate: What to judge.

    Returns:
        REJECTED if a check refuses it for good, else QUARANTINED if a check wants a person to
        look at it, else ADMITTED.

    Raises:
        UnknownNameError: If the charter names a check that nobody registers.
        PluginError: If a check itself fails; nothing is decided then.
    """
    contributor = candidate.contribution.manifest.contributor
    registry = candidate.plugins.admission_checks
    core = [entry.name for entry in registry if entry.is_own]
    names = {*core, *candidate.charter.amendment.admission.checks}
    checks = {name: registry.resolve(name) for name in sorted(names)}
    stages = {name: getattr(check, "stage", Stage.MODEL) for name, check in checks.items()}
    refusals = [
        Refusal(contributor, FILES_CHECK, **asdict(finding))
        for finding in _find_unreadable(candidate)
    ]
    readable = not refusals
    run: list[str] = []
    for name in sorted(checks, key=lambda n: (stages[n], n)):
        if (stages[name] == Stage.ADAPTER and not readable) or (
            stages[name] == Stage.MODEL and refusals
        ):
            continue
        run.append(name)
        finding = _run_check(checks[name], candidate, registry.entry(name))
        if finding is not None:
            refusals.append(Refusal(contributor, name, **asdict(finding)))
    if any(not refusal.quarantine for refusal in refusals):
        state = ContributionState.REJECTED
    else:
        state = ContributionState.QUARANTINED if refusals else ContributionState.ADMITTED
    measured = candidate.__dict__.get("losses")  # Only what a check asked for was measured.
    return AdmissionDecision(state, tuple(refusals), tuple(run), measured)


def _run_check(
    check: Callable[[AdmissionCandidate], Finding | None],
    candidate: AdmissionCandidate,
    entry: Entry,
) -> Finding | None:
    place = "admission"
    passing = (AdapterError, CorpusError, RoutingError)
    try:
        with guarded(entry, place, passing=passing):
            finding = check(candidate)
    except passing as error:
        return Finding(
            expected="a contribution that can be measured on the base",
            found=str(error),
            fix="Train on the cooperative's base and export again.",
        )
    if finding is None:
        return None
    if type(finding) is not Finding:
        raise refuse(entry, place, expected="a Finding or None", got=type(finding).__name__)
    texts = (finding.expected, finding.found, finding.fix)
    if not all(isinstance(text, str) and text.strip() for text in texts):
        wanted = "a Finding that says what is expected, what was found and what to do"
        raise refuse(entry, place, expected=wanted, got=texts)
    expected, found, fix = (one_line(text, _FINDING_CHARACTERS) for text in texts)
    return replace(finding, expected=expected, found=found, fix=fix)


def _find_unreadable(candidate: AdmissionCandidate) -> Iterator[Finding]:
    """Read every file once; what cannot be read safely is found here."""
    fix = "Build the contribution again and send it."
    try:
        candidate.adapter  # noqa: B018 (reading is the check)
    except (AdapterError, UnknownNameError) as error:
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
