"""The charter: what contributors of a cooperative agreed on, `cooperative.toml`.

Its identity, the hash of `[identity]`, can never change; everything else is an amendment
(numbered; signed and kept in the ledger), so that a cooperative can grow without voiding
anyone's signature.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from molora_fed.errors import CharterError, ConfigError
from molora_fed.storage.files import canonical_json, hash_bytes, write_bytes
from molora_fed.storage.settings import StrictModel, describe_offenders
from molora_fed.storage.toml import parse_toml
from molora_fed.types import Mixture

__all__ = [
    "MIN_MEMBERS",
    "AdapterRules",
    "Amendment",
    "BaseIdentity",
    "Charter",
    "CorpusRules",
    "FusionRules",
    "Identity",
    "OperatorRules",
    "PopulationRules",
    "PrivacyRules",
    "TrainingRules",
    "choose_privacy",
    "load_charter",
    "parse_charter",
    "read_amendment",
    "write_charter",
]

# What a key that an amendment leaves out has always meant. Signed amendments leave keys out, so
# these names stay, whatever is registered under them; the core names no plugin anywhere else than
# here and in the next lines.
_UNNAMED_ROUTER = "evidence"
_UNNAMED_COMPARISONS = ("evidence-zero", "linear")
# What a new cooperative is founded with where nobody chooses; its charter has them in writing.
_DEFAULT_ROUTER = "evidence-mixed"
_DEFAULT_COMPARISONS = ("evidence", "evidence-zero", "linear")
# The same where each round of a fit is an exchange of messages with everybody.
_DEFAULT_SUMMED = ("evidence", "evidence-zero")
# The same where routers are made from published statistics, of those that can be.
_DEFAULT_PUBLISHED_ROUTER = "statistics"
_DEFAULT_PUBLISHED = ("evidence-zero",)
_UNNAMED_FALLBACK = "evidence-zero"
_UNNAMED_HEADLINE = ("measured-alone", "measured-specialist")
_UNNAMED_SLOT_ROUTER = "parallel-sigmoid"
_UNNAMED_SCOPE = "per-domain"
_UNNAMED_OPERATORS = ("death", "slot-reallocation", "inheritance", "svd-mutation")


class OperatorRules(BaseModel):
    """One lifecycle operator.

    Attributes:
        name: Its registered name.
        options: Its options; unknown keys are refused by it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    options: dict[str, Any] = {}


class PopulationRules(BaseModel):
    """How the coordinator evolves a population out of admitted contributions.

    Attributes:
        slots: P; 0 is one a contribution.
        rank: Largest rank of a slot.
        filling: What slots beyond the contributions get.
        router: The adapter router.
        options: Its options; unknown keys are refused by it.
        scope: The fitness scope.
        lifecycle: Operators in the order in which they run; none gives adaptation alone.
        generations: Generations with a lifecycle.
        start_steps: Adaptation steps before the first of them.
        steps: Adaptation steps of each.
        blocks_per_domain: Blocks of every domain in a step.
        learning_rate: Peak of AdamW's rate for the slots.
        router_learning_rate: The same for the router.
        guard: Whether a lifecycle is kept only if it does no harm, and on which documents.
        delta: Largest upper bound of the harm that is kept, nats.
        level: Of the bound.
        adaptation_share: Part of the calibration text that adapts.
        fitness_share: Part of it that fitness is measured on.
        guard_share: Part of it that guards.
        data: Where the text lies: "pooled", with the coordinator, as samples that contributors
            send; "private", with each contributor, who sends figures and adapted slots instead.
        rounds: Rounds of an adaptation on private text; each trains one factor of every slot at
            all contributors, and takes the mean.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    slots: int = Field(default=0, ge=0, le=1024)
    rank: int = Field(default=8, ge=1)
    filling: Literal["clone", "fresh"] = "clone"
    router: str = _UNNAMED_SLOT_ROUTER
    options: dict[str, Any] = {}
    scope: str = _UNNAMED_SCOPE
    lifecycle: tuple[OperatorRules, ...] = tuple(
        OperatorRules(name=operator) for operator in _UNNAMED_OPERATORS
    )
    generations: int = Field(default=3, ge=0)
    start_steps: int = Field(default=100, ge=0)
    steps: int = Field(default=100, ge=0)
    blocks_per_domain: int = Field(default=2, ge=1)
    learning_rate: float = Field(default=1e-3, ge=0)
    router_learning_rate: float = Field(default=1e-2, ge=0)
    guard: Literal["fresh", "spending", "off"] = "fresh"
    delta: float = Field(default=0.002, allow_inf_nan=False)
    level: float = Field(default=0.95, gt=0, lt=1)
    adaptation_share: float = Field(default=0.5, gt=0)
    fitness_share: float = Field(default=0.25, gt=0)
    guard_share: float = Field(default=0.25, gt=0)
    # Left out where not set, so that amendments signed before there were any still verify.
    data: Literal["pooled", "private"] = Field(
        default="pooled", exclude_if=lambda data: data == "pooled"
    )
    rounds: int = Field(default=2, ge=1, exclude_if=lambda rounds: rounds == 2)

    @property
    def guard_samples(self) -> int:
        """Disjoint guard samples that a whole evolution needs."""
        draws = {"fresh": self.generations, "spending": min(1, self.generations), "off": 0}
        return draws[self.guard]


MAX_CHARTER_BYTES = 1_000_000


_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}$")]


class BaseIdentity(StrictModel):
    """Which base checkpoint, by content.

    Attributes:
        id: Name for people, e.g. "builtin" or "EleutherAI/pythia-410m".
        revision: Revision for people; the fingerprints decide.
        weights: Hash over sorted tensor names, shapes, dtypes and bytes.
        tokenizer: Hash over the tokenizer's files.
        config: Hash over what of the effective config decides the function; from version 2 on.
        files: SHA-256 of each file of the checkpoint by name; from version 2 on.
    """

    id: str
    revision: str = ""
    weights: _Hash
    tokenizer: _Hash
    # Left out where absent, so that identities of version 1 have the bytes they always had.
    config: _Hash | None = Field(default=None, exclude_if=lambda config: config is None)
    files: dict[_FileName, _Hash] = Field(
        default={}, max_length=1_000, exclude_if=lambda files: not files
    )


class AdapterRules(StrictModel):
    """What an adapter may be.

    Attributes:
        kinds: Names of registered adapter kinds that are accepted.
        max_rank: Largest rank of a low-rank update.
        max_bytes: Largest adapter file, bytes.
        frozen_depth: K; the first K blocks stay bit-identical to the base.
    """

    kinds: tuple[str, ...] = ("lora", "svd", "delta")
    max_rank: int = Field(default=64, ge=1)
    max_bytes: int = Field(default=256 * 2**20, ge=1)
    frozen_depth: int = Field(default=0, ge=0)


class CorpusRules(StrictModel):
    """How text becomes blocks; part of the evaluation protocol.

    Attributes:
        block_size: T, tokens per block.
        split_seed: Seed of the assignment of clusters to splits.
        evaluation_batch: Blocks per forward pass wherever a loss is reported; a bank takes fewer
            where the device's memory does not suffice.
    """

    block_size: int = Field(default=128, ge=8)
    split_seed: int = 42
    evaluation_batch: int = Field(default=16, ge=1)


MIN_MEMBERS = 3
"""No masked total of fewer members is opened."""
PrivacyMode = Literal["pooled", "private", "statistics"]
Summing = Literal["masked", "robust"]


class PrivacyRules(StrictModel):
    """What a cooperative is founded with; see `Identity`, which has these keys of its own.

    Attributes:
        mode: What leaves contributors beside adapters.
        summing: How sums are added up.
    """

    mode: PrivacyMode = "private"
    summing: Summing = "masked"

    @property
    def router(self) -> str:
        """The router that a new cooperative publishes where nobody chooses."""
        return _DEFAULT_PUBLISHED_ROUTER if self.mode == "statistics" else _DEFAULT_ROUTER

    @property
    def comparisons(self) -> tuple[str, ...]:
        """Routers that a new cooperative compares where nobody chooses."""
        return {
            "pooled": _DEFAULT_COMPARISONS,
            "private": _DEFAULT_SUMMED,
            "statistics": _DEFAULT_PUBLISHED,
        }[self.mode]

    @property
    def min_members(self) -> int:
        """Fewest members whose texts can be fused."""
        return MIN_MEMBERS if self.mode != "pooled" and self.summing == "masked" else 1


def choose_privacy(name: str, mode: str | None, summing: str | None) -> PrivacyRules:
    """What somebody chose of the privacy of a new cooperative; the usual of the rest.

    Args:
        name: The cooperative's, for errors.
        mode: None if not chosen.
        summing: Likewise.

    Raises:
        ConfigError: If there is no such mode or way, or texts are pooled and not summed.
    """
    known = {"mode": get_args(PrivacyMode), "summing": get_args(Summing)}
    chosen = {what: value for what, value in (("mode", mode), ("summing", summing)) if value}
    for what, value in chosen.items():
        if value not in known[what]:
            option = {"mode": "privacy", "summing": "summing"}[what]
            raise ConfigError(
                f"Cannot create '{name}': expected --{option} {' or '.join(known[what])}, got "
                f"'{value[:80]}'. Choose one of these."
            )
    rules = PrivacyRules.model_validate(chosen)
    if rules.mode == "pooled" and summing:
        raise ConfigError(
            f"Cannot create '{name}': expected --summing with --privacy private, got "
            f"'{rules.mode}', where nothing is summed. Leave --summing out, or pass --privacy "
            "private."
        )
    return rules


class Identity(StrictModel):
    """What can never change.

    Attributes:
        version: Which keys there are. Version 1, the one of charters that name none, has those of
            the first release, and binds weights and tokenizer of the base; version 2 binds its
            effective config and its files as well, and has modes of privacy.
        name: The cooperative's name: lower-case letters, digits and dashes.
        privacy_mode: What leaves a contributor beside its adapter: "pooled", samples of its text;
            "private", sums over its text and nothing else; "statistics", statistics of the base's
            hidden states over its text, once, from which routers are made, and sums that measure.
        summing: How such sums are added up: "masked", so that the coordinator sees totals over
            three members at least; "robust", so that it sees single members' sums, and a few
            absurd ones do no harm.
    """

    version: Literal[1, 2] = Field(default=1, exclude_if=lambda version: version == 1)
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    base: BaseIdentity
    adapters: AdapterRules = AdapterRules()
    corpus: CorpusRules = CorpusRules()
    privacy_mode: PrivacyMode = "pooled"
    # Left out where usual: identities that have the key of old have the bytes they always had.
    summing: Summing = Field(default="masked", exclude_if=lambda summing: summing == "masked")

    @model_validator(mode="after")
    def _has_the_keys_of_its_version(self) -> "Identity":
        has = [self.base.config is not None, bool(self.base.files)]
        if self.version == 1 and any(has):
            raise ValueError("base.config and base.files need version = 2")
        if self.version == 2 and not all(has):
            raise ValueError("version 2 needs base.config and base.files")
        if self.version == 1 and self.privacy_mode != "pooled":
            raise ValueError("privacy_mode other than pooled needs version = 2")
        if self.privacy_mode == "pooled" and self.summing != "masked":
            raise ValueError("summing needs a privacy_mode other than pooled")
        return self

    @property
    def privacy_rules(self) -> PrivacyRules:
        """Mode and way of summing together."""
        return PrivacyRules(mode=self.privacy_mode, summing=self.summing)


class TrainingRules(StrictModel):
    """How contributors train, unless they say otherwise.

    Attributes:
        kind: Adapter kind made by `molora join`.
        rank: Rank of low-rank kinds.
        steps: Optimiser steps.
        batch: Blocks per step.
        learning_rate: Peak of AdamW's rate; None takes the kind's default.
        validate_every: Steps between validations.
        patience: Validations without improvement before stopping.
        options: Options of the kind, e.g. {"precision": "int8"}; unknown keys are refused by it.
    """

    kind: str = "svd"
    rank: int = Field(default=64, ge=1)
    steps: int = Field(default=1400, ge=1)
    batch: int = Field(default=4, ge=1)
    learning_rate: float | None = Field(default=None, gt=0)
    validate_every: int = Field(default=100, ge=1)
    patience: int = Field(default=4, ge=1)
    # Left out where empty, so that amendments signed before there were any still verify.
    options: dict[str, Any] = Field(default={}, exclude_if=lambda options: not options)


class SampleRules(StrictModel):
    """Blocks each contributor sends under the pooled privacy mode; nothing else leaves.

    Attributes:
        calibration: Blocks the routers are fitted on.
        admission: Blocks the coordinator measures a contribution on before admitting it.
        held_out: Blocks of the reported figures.
    """

    calibration: int = Field(default=150, ge=0)
    admission: int = Field(default=32, ge=1)
    held_out: int = Field(default=160, ge=1)


class AdmissionRules(StrictModel):
    """Thresholds of the built-in admission checks.

    Attributes:
        max_loss_rise: Largest own-domain loss above the base's on the admission sample, nats.
        checks: Names of registered checks to run beside the core's own, which always run.
        max_start_gap: Largest difference between the loss that a contributor states of the model
            it started from and the base's, measured on the same blocks, nats.
    """

    max_loss_rise: float = Field(default=0.05, ge=0)
    checks: tuple[str, ...] = ()
    max_start_gap: float = Field(default=0.005, ge=0)


class FusionRules(StrictModel):
    """How the coordinator fuses.

    Attributes:
        mode: "router" mixes the specialists' outputs; "population" evolves their adapters inside
            one model, as `[amendment.population]` says.
        router: The router that is published.
        options: Its options; unknown keys are refused by the router.
        top_k: The published router mixes its best k experts only; None mixes all.
        compare: Further routers fitted and reported beside it, with default options.
        merges: Registered merges of all adapters, reported beside it; each costs a pass over the
            held-out blocks whenever it is fused.
        mixture: Probability mixture (default) or logit mixture (as published).
        base_expert: Whether the base is expert 0.
        collapse_nats: A domain this far above its best expert after fitting is a collapse.
        restarts: Refits from another initialisation after a collapse.
        fallback: Router published instead where every refit still loses a domain, if it loses
            fewer; empty publishes the collapsed one.
        headline: Gain predictors whose forecasts stand above the others; empty for none.
        shortlist: Experts that a member whose text stays at home measures on all of it, the base
            and its own among them; None measures all.
    """

    mode: Literal["router", "population"] = "router"
    router: str = _DEFAULT_ROUTER
    options: dict[str, Any] = Field(default={})
    top_k: int | None = Field(default=None, ge=1)
    compare: tuple[str, ...] = _DEFAULT_COMPARISONS
    merges: tuple[str, ...] = ("average",)
    mixture: Mixture = "probability"
    base_expert: bool = True
    collapse_nats: float = Field(default=0.05, gt=0)
    restarts: int = Field(default=3, ge=0)
    fallback: str = _UNNAMED_FALLBACK
    # Left out where usual, so that amendments signed before there were any still verify.
    headline: tuple[str, ...] = Field(
        default=_UNNAMED_HEADLINE, exclude_if=lambda names: tuple(names) == _UNNAMED_HEADLINE
    )
    shortlist: int | None = Field(default=None, ge=2, exclude_if=lambda size: size is None)


class Amendment(StrictModel):
    """What may change: numbered from 0, the latest counts.

    Attributes:
        number: 0 in the charter; each later one adds 1.
        domains: Domains the cooperative asks for.
        expected: Contributions to wait for before fusing.
        deadline_seconds: Fuse with what is admitted after this many seconds; 0 waits for ever.
        quorum: Contributions without which not even the deadline fuses; 0 is two, or `expected` if
            that is less.
        seed: Seed of routers, bootstraps and generated samples.
        dtype: Dtype that models compute in where losses are reported; the losses themselves are
            float32 sums.
    """

    number: int = Field(default=0, ge=0)
    domains: tuple[str, ...] = ()
    expected: int = Field(default=0, ge=0)
    deadline_seconds: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    # Left out where not set, so that amendments signed before there were any still verify.
    quorum: int = Field(default=0, ge=0, exclude_if=lambda quorum: quorum == 0)
    seed: int = 42
    # Left out where usual, so that amendments signed before there was a choice still verify.
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", exclude_if=lambda dtype: dtype == "float32"
    )
    training: TrainingRules = TrainingRules()
    samples: SampleRules = SampleRules()
    admission: AdmissionRules = AdmissionRules()
    fusion: FusionRules = FusionRules()
    population: PopulationRules = PopulationRules()


def read_amendment(raw: Mapping[str, Any]) -> Amendment:
    """An amendment as it was written; keys that it leaves out mean what they always have.

    Raises:
        ValidationError: If a key is unknown, or a value out of range.
    """
    return Amendment.model_validate(_name_unnamed(raw))


def _name_unnamed(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same with the names that a file of an earlier version may leave out."""
    fusion = raw.get("fusion", {})
    if not isinstance(fusion, Mapping):
        return raw
    unnamed = {"router": _UNNAMED_ROUTER, "compare": _UNNAMED_COMPARISONS}
    return {**raw, "fusion": {**unnamed, **fusion}}


class Charter(StrictModel):
    """A parsed `cooperative.toml`."""

    identity: Identity
    amendment: Amendment = Amendment()

    @property
    def is_private(self) -> bool:
        """Whether no text leaves contributors, who are asked for sums over it instead."""
        is_evolved = self.amendment.fusion.mode == "population"
        evolves_at_home = is_evolved and self.amendment.population.data == "private"
        return self.identity.privacy_mode != "pooled" or evolves_at_home

    @property
    def is_summed(self) -> bool:
        """Whether contributors are asked for sums over their text by a fusion."""
        return self.identity.privacy_mode != "pooled" and self.amendment.fusion.mode == "router"

    @property
    def publishes_statistics(self) -> bool:
        """Whether contributions have statistics of hidden states, from which routers are made."""
        return self.identity.privacy_mode == "statistics"

    @property
    def privacy(self) -> str:
        """What leaves contributors beside adapters, in a few words for people."""
        if not self.is_private:
            return "pooled: samples of text are sent to the coordinator"
        if not self.is_summed:
            mode = "statistics" if self.publishes_statistics else "private"
            return f"{mode}: no text leaves; adapted populations and sums over text do"
        seen = {
            "masked": "the coordinator sees totals of sums over three members at least",
            "robust": "the coordinator sees each member's sums",
        }
        way = self.identity.summing
        if self.publishes_statistics:
            return (
                "statistics of hidden states are published with adapters; sums that measure, "
                f"{way}: no text leaves; {seen[way]}"
            )
        return f"private, sums {way}: no text leaves; {seen[way]}"

    @property
    def identity_hash(self) -> str:
        """SHA-256 of the canonical JSON of `[identity]`, lower-case hex."""
        return hash_bytes(canonical_json(self.identity.model_dump(mode="json")))


def parse_charter(text: str, *, where: str = "cooperative.toml") -> Charter:
    """Parse and check a charter.

    Args:
        text: TOML.
        where: Name used in errors.

    Raises:
        CharterError: If it is not TOML, too large, deep or many-keyed, a key is unknown or
            missing, or a value is out of range; all offenders are named at once.
    """
    try:
        raw = parse_toml(text, max_bytes=MAX_CHARTER_BYTES)
        amendment = raw.get("amendment", {})
        if isinstance(amendment, Mapping):
            raw["amendment"] = _name_unnamed(amendment)
        return Charter.model_validate(raw)
    except ValidationError as error:
        offenders = describe_offenders(error, whole="charter", with_values=True)
        raise CharterError(
            f"Cannot read charter '{where}': expected only known keys with valid values, "
            f"got {offenders}. Correct or remove these."
        ) from error
    except ValueError as error:
        raise CharterError(
            f"Cannot read charter '{where}': expected TOML within bounds, got {error}. "
            "Correct that line."
        ) from error


def load_charter(path: Path) -> Charter:
    """Read `cooperative.toml`, or the one inside a folder.

    Raises:
        CharterError: If it is missing, too large, not UTF-8, or malformed.
    """
    file = path / "cooperative.toml" if path.is_dir() else path
    try:
        if file.stat().st_size > MAX_CHARTER_BYTES:
            raise CharterError(
                f"Cannot read charter '{file}': expected at most {MAX_CHARTER_BYTES} bytes, "
                f"got {file.stat().st_size}. Check that this is the right file."
            )
        with file.open("rb") as source:
            text = source.read(MAX_CHARTER_BYTES + 1).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise CharterError(
            f"Cannot read charter '{file}': expected a readable UTF-8 file, got {error}. "
            "Make one with `molora coop create NAME`."
        ) from error
    return parse_charter(text, where=str(file))


def write_charter(charter: Charter, path: Path) -> None:
    """Write a charter as TOML, whole or not at all.

    Raises:
        StorageError: On I/O errors.
    """
    data = charter.model_dump(mode="json", exclude_none=True)
    header = (
        f"# Cooperative '{charter.identity.name}', identity {charter.identity_hash}\n"
        "# [identity] can never change; [amendment] may, with a higher number.\n\n"
    )
    write_bytes(path, (header + tomli_w.dumps(data)).encode())
