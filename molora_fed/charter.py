"""The charter: what contributors of a cooperative agreed on, `cooperative.toml`.

Its identity, the hash of `[identity]`, can never change; everything else is an amendment
(numbered; signed and kept in the ledger), so that a cooperative can grow without voiding
anyone's signature.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from packaging.utils import canonicalize_name
from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from molora_fed.errors import CharterError
from molora_fed.rules import (
    MIN_MEMBERS,
    AdmissionRules,
    OperatorRules,
    PopulationRules,
    PrivacyMode,
    PrivacyRules,
    SampleRules,
    Summing,
    TrainingRules,
    choose_privacy,
)
from molora_fed.storage.files import canonical_json, hash_bytes, write_bytes
from molora_fed.storage.options import Choice, Choices, name_choices
from molora_fed.storage.settings import StrictModel, describe_offenders
from molora_fed.storage.toml import parse_toml
from molora_fed.types import Mixture

__all__ = [
    "MAX_CARRIED_FILES",
    "MIN_MEMBERS",
    "AdapterRules",
    "AdmissionRules",
    "Amendment",
    "BaseIdentity",
    "Charter",
    "CorpusRules",
    "FusionRules",
    "Identity",
    "OperatorRules",
    "PluginPin",
    "PopulationRules",
    "PrivacyRules",
    "SampleRules",
    "TrainingRules",
    "choose_privacy",
    "load_charter",
    "parse_charter",
    "read_amendment",
    "write_charter",
]

# What a key that an amendment leaves out has always meant. Signed amendments leave keys out, so
# these names stay, whatever is registered under them.
_UNNAMED_ROUTER = "evidence"
_UNNAMED_COMPARISONS = ("evidence-zero", "linear")
_UNNAMED_FALLBACK = "evidence-zero"
_UNNAMED_HEADLINE = ("measured-alone", "measured-specialist")

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


MAX_CARRIED_FILES = 16
"""That one contribution carries beside its adapter."""
_MAX_CARRIED_BYTES = 16 * 2**20
RegisteredName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9]*(-[a-z0-9]+)*$", max_length=63)]
_NAME = TypeAdapter(RegisteredName)


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


class FusionRules(StrictModel):
    """How the coordinator fuses.

    Attributes:
        mode: "router" mixes the specialists' outputs; "population" evolves their adapters inside
            one model, as `[amendment.population]` says.
        router: The router that is published.
        options: Its options; unknown keys are refused by the router.
        top_k: The published router mixes its best k experts only; None mixes all.
        compare: Further routers fitted and reported beside it.
        merges: Registered merges of all adapters, reported beside it; each costs a pass over the
            held-out blocks whenever it is fused.
        predictors: Options of gain predictors. All that are registered are asked; one named here
            has these options, one with a label is asked beside the predictor itself.
        mixture: Probability mixture (default) or logit mixture (as published).
        base_expert: Whether the base is expert 0.
        collapse_nats: A domain this far above its best expert after fitting is a collapse.
        restarts: Refits from another initialisation after a collapse.
        fallback: Router published instead where every refit still loses a domain, if it loses
            fewer; empty publishes the collapsed one.
        headline: Gain predictors whose forecasts stand above the others; empty for none.
        shortlist: Experts that a member whose text stays at home measures on all of it, the base
            and its own among them; None measures all.
        carried: Registered names of what every contribution carries beside its adapter, computed
            by plugins of those who contribute; routers read it.
        max_carried_bytes: Largest of these files.
    """

    mode: Literal["router", "population"] = "router"
    router: str = PrivacyRules(mode="pooled").router
    options: dict[str, Any] = Field(default={})
    top_k: int | None = Field(default=None, ge=1)
    compare: Choices = PrivacyRules(mode="pooled").comparisons
    merges: Choices = name_choices("average")
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
    predictors: Choices = Field(default=(), exclude_if=lambda chosen: not chosen)
    carried: Choices = Field(
        default=(), max_length=MAX_CARRIED_FILES, exclude_if=lambda chosen: not chosen
    )
    max_carried_bytes: int = Field(
        default=_MAX_CARRIED_BYTES,
        ge=1,
        le=2**30,
        exclude_if=lambda size: size == _MAX_CARRIED_BYTES,
    )

    @field_validator("carried")
    @classmethod
    def _carries_each_once(cls, chosen: tuple[Choice, ...]) -> tuple[Choice, ...]:
        names = [_NAME.validate_python(choice.key) for choice in chosen]
        if len(set(names)) != len(names):
            raise ValueError("a name twice")
        return chosen

    @property
    def carried_names(self) -> tuple[str, ...]:
        """Names of the files that contributions carry, without endings."""
        return tuple(choice.key for choice in self.carried)

    @model_validator(mode="after")
    def _can_tell_routers_apart(self) -> "FusionRules":
        taken = {self.router, self.fallback}
        wrong = sorted(one.key for one in self.compare if one.key in taken and not one.is_plain)
        if wrong:
            raise ValueError(
                "expected compared routers called otherwise than router and fallback, got "
                f"{', '.join(wrong)}; give each a label of its own"
            )
        return self

    @property
    def routers(self) -> dict[str, Choice]:
        """Every router that is fitted, by its key: the published one first, the fallback last."""
        published = Choice(name=self.router, options=self.options)
        last_resort = name_choices(self.fallback) if self.fallback else ()
        found: dict[str, Choice] = {}
        for choice in (published, *self.compare, *last_resort):
            found.setdefault(choice.key, choice)
        return found


MAX_PINS = 64
_Distribution = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,98}[A-Za-z0-9])?$")]
_Version = Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9.+_-]{0,62})?$")]


class PluginPin(StrictModel):
    """A plugin of others that can influence a result, as the coordinator has it.

    Attributes:
        name: Distribution, or file name of a one-file plugin.
        version: Of the distribution; empty for a file.
        hash: SHA-256 over its files, see `molora_fed.storage.distributions`, or of the file.
    """

    name: _Distribution
    version: _Version = ""
    hash: _Hash

    @property
    def title(self) -> str:
        """What messages call it, e.g. "molora-mine 0.1.0"."""
        return f"{self.name} {self.version}".rstrip()


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
        plugins: Plugins of others that can influence a result, one entry each.
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
    # Left out where empty, so that amendments signed before there were any still verify.
    plugins: tuple[PluginPin, ...] = Field(
        default=(), max_length=MAX_PINS, exclude_if=lambda pins: not pins
    )

    @field_validator("plugins")
    @classmethod
    def _names_a_plugin_once(cls, pins: tuple[PluginPin, ...]) -> tuple[PluginPin, ...]:
        if len({canonicalize_name(pin.name) for pin in pins}) < len(pins):
            raise ValueError("names a plugin twice")
        return pins


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
