"""A cooperative on the coordinator's disk: charter, base, ledger, blobs and key in one folder.

`cooperative.toml` is written last, so a folder that has one is complete. The ledger holds the
signed amendments and decides which counts; the file is for people to read and hand on.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from molora_fed.charter import (
    AdapterRules,
    Amendment,
    BaseIdentity,
    Charter,
    CorpusRules,
    Identity,
    PrivacyRules,
    load_charter,
    write_charter,
)
from molora_fed.contributions.ledger import Ledger, LedgerReader, create_ledger
from molora_fed.contributions.reading import sign_amendment
from molora_fed.contributions.store import BlobStore
from molora_fed.cooperative.pins import build_pins, list_named
from molora_fed.errors import CharterError, describe_mismatch
from molora_fed.plugins import Plugins, get_plugins
from molora_fed.storage.compute import Compute, read_compute
from molora_fed.storage.files import make_home
from molora_fed.storage.keys import build_public_pem, load_key, load_or_make_key
from molora_fed.storage.options import check_choices
from molora_fed.types import Progress

if TYPE_CHECKING:
    from molora_fed.models.base import Base

__all__ = [
    "CharterAndBase",
    "Cooperative",
    "amend_cooperative",
    "build_charter",
    "check_charter_names",
    "create_cooperative",
    "load_charter_base",
    "open_cooperative",
]

CHARTER_FILE = "cooperative.toml"


@dataclass(frozen=True, eq=False)
class CharterAndBase:
    """A cooperative's charter with its base checkpoint loaded.

    Attributes:
        charter: The cooperative's charter.
        base: Its base checkpoint, checked against the charter.
    """

    charter: Charter
    base: "Base"


@dataclass(frozen=True)
class Cooperative:
    """A cooperative's folder and its charter with the amendment that counts.

    Attributes:
        folder: The coordinator's home.
        charter: Identity, and the last signed amendment.
        compute: Where models are to run, and in which dtype.
    """

    folder: Path
    charter: Charter
    compute: Compute = field(default_factory=Compute)

    @property
    def base_folder(self) -> Path:
        """Folder of the base checkpoint."""
        return self.folder / "base"

    @property
    def key_path(self) -> Path:
        """The coordinator's private key."""
        return self.folder / "keys" / "coordinator.pem"

    @property
    def ledger_path(self) -> Path:
        """The ledger's file."""
        return self.folder / "ledger.db"

    @property
    def public_folder(self) -> Path:
        """Folder of the coordinator's own public text, a file a domain."""
        return self.folder / "public"

    @property
    def store(self) -> BlobStore:
        """The files of contributions, by hash."""
        return BlobStore(self.folder / "blobs")

    def open_ledger(self) -> Ledger:
        """Open the ledger for writing; close it, or use it as a context manager.

        Raises:
            LedgerError: If another process writes it.
        """
        return Ledger(self.ledger_path)

    def read_ledger(self) -> LedgerReader:
        """Open the ledger for reading, also while another process writes it."""
        return LedgerReader(self.ledger_path)

    def load_base(self, progress: Progress | None = None) -> "Base":
        """Load the base checkpoint.

        Args:
            progress: See `molora_fed.models.base.load_base`.

        Raises:
            BaseCheckpointError: If it is missing or another one.
            ComputeError: If this machine lacks device, dtype or memory.
        """
        return load_charter_base(self.charter, self.base_folder, self.compute, progress)


def load_charter_base(
    charter: Charter,
    folder: Path,
    compute: Compute | None = None,
    progress: Progress | None = None,
) -> "Base":
    """Load a base checkpoint and check that it is the charter's.

    Args:
        charter: Names the base, and the dtype that losses are reported in.
        folder: The checkpoint.
        compute: Where to run, and in which dtype; the charter's where it says none.
        progress: See `molora_fed.models.base.load_base`.

    Raises:
        BaseCheckpointError: If it is missing or another one.
        ComputeError: If this machine lacks device, dtype or memory.
    """
    from molora_fed.models.base import check_base, load_base
    from molora_fed.models.runtime import choose_placement

    placement = choose_placement(compute or Compute(), charter.amendment.dtype)
    base = load_base(folder, placement, progress)
    check_base(base, charter.identity.base)
    return base


def create_cooperative(
    folder: Path,
    name: str,
    base: "Base",
    *,
    adapters: AdapterRules | None = None,
    corpus: CorpusRules | None = None,
    amendment: Amendment | None = None,
    privacy: PrivacyRules | None = None,
    plugins: Plugins | None = None,
) -> Cooperative:
    """Make a cooperative: key, base, ledger with amendment 0, charter.

    Safe to interrupt: call again to resume; called again when done, it opens what is
    there.

    Args:
        folder: The coordinator's home.
        name: Lower-case letters, digits and dashes.
        base: The base checkpoint; copied to `base/` unless it lies there.
        adapters: What an adapter may be.
        corpus: How text becomes blocks.
        amendment: What may change later; number 0.
        privacy: What leaves contributors; the usual if None.
        plugins: Where names in the charter are looked up; the installed plugins by default.

    Raises:
        CharterError: If a value cannot stand in a charter or does not suit the base, or the
            folder holds another cooperative.
        UnknownNameError: If it names a router, kind or check that nobody registers.
        PluginError: If a plugin that it names cannot be pinned.
        StorageError: On I/O errors.
    """
    plugins = plugins or get_plugins()
    charter = build_charter(name, base.whole_identity(), adapters, corpus, amendment, privacy)
    check_charter_names(charter, plugins)
    charter = _pin_plugins(charter, plugins)
    _check_suits_base(charter, base)
    cooperative = Cooperative(folder, charter)
    if (folder / CHARTER_FILE).exists():
        return _open_same(cooperative)
    make_home(folder)
    key = load_or_make_key(cooperative.key_path)
    if base.folder.resolve() != cooperative.base_folder.resolve():
        from molora_fed.corpus.overlap import copy_index
        from molora_fed.models.base import fetch_base

        fetch_base(str(base.folder), cooperative.base_folder)
        copy_index(base.folder, cooperative.base_folder)
    create_ledger(
        cooperative.ledger_path,
        coordinator_key=build_public_pem(key),
        first=sign_amendment(key, charter.identity_hash, charter.amendment),
    )
    write_charter(charter, folder / CHARTER_FILE)
    return cooperative


def open_cooperative(folder: Path, compute: Compute | None = None) -> Cooperative:
    """Open a cooperative's folder and hold its charter against the ledger.

    Args:
        folder: The coordinator's home.
        compute: Where models are to run; the home's settings where it says nothing.

    Raises:
        CharterError: If `[identity]` was changed, or `[amendment]` is not a signed one.
        LedgerError: If the ledger is missing or unreadable.
        SignatureError: If the last amendment is not signed by the coordinator.
        ComputeError: If the home's settings cannot be read.
    """
    path = folder / CHARTER_FILE
    charter = load_charter(path)
    with LedgerReader(folder / "ledger.db") as ledger:
        if ledger.identity_hash != charter.identity_hash:
            raise CharterError(
                describe_mismatch(
                    f"Cannot open cooperative '{folder}'",
                    expected=f"the charter its ledger belongs to, {ledger.identity_hash[:16]}",
                    got=charter.identity_hash[:16],
                    fix="Take back the change to [identity], or create another cooperative.",
                )
            )
        signed = ledger.amendments()
        signed[-1].check(ledger.coordinator_key)
    # An older signed amendment in the file means a stop between ledger and file: the ledger counts.
    if charter.amendment not in [one.amendment for one in signed]:
        raise CharterError(
            describe_mismatch(
                f"Cannot open cooperative '{folder}'",
                expected=f"an [amendment] that is signed, the last is {len(signed) - 1}",
                got=f"an unsigned one with number {charter.amendment.number}",
                fix="Take back the change, or sign it as the next amendment.",
            )
        )
    counting = Charter(identity=charter.identity, amendment=signed[-1].amendment)
    return Cooperative(folder, counting, read_compute(folder, compute))


def amend_cooperative(
    cooperative: Cooperative,
    ledger: Ledger,
    amendment: Amendment,
    *,
    plugins: Plugins | None = None,
    actor: str = "coordinator",
) -> Cooperative:
    """Sign an amendment, add it to the ledger, and write the charter anew.

    Safe to interrupt: call again with the same amendment to resume.

    Args:
        cooperative: What to amend.
        ledger: Its ledger, open for writing.
        amendment: Everything that counts from now on, with the next number.
        plugins: Where names in it are looked up; the installed plugins by default.
        actor: Who does this, for the history.

    Raises:
        CharterError: If it contradicts `[identity]`.
        LedgerError: If its number is not the next one.
        SignatureError: If the coordinator's key is missing or another one.
        UnknownNameError: If it names a router, kind or check that nobody registers.
    """
    charter = Charter(identity=cooperative.charter.identity, amendment=amendment)
    check_charter_names(charter, plugins or get_plugins())
    key = load_key(cooperative.key_path)
    ledger.add_amendment(sign_amendment(key, charter.identity_hash, amendment), actor=actor)
    write_charter(charter, cooperative.folder / CHARTER_FILE)
    return Cooperative(cooperative.folder, charter, cooperative.compute)


def check_charter_names(charter: Charter, plugins: Plugins) -> None:
    """Look up every name a charter uses, and check the options that are given with names.

    Raises:
        UnknownNameError: If nobody registers a router, merge, carried file, adapter kind or
            admission check, or in mode "population" an adapter router, fitness scope or lifecycle
            operator.
        AdapterError: If the kind refuses its options.
        CharterError: If `[amendment.training]` asks for an adapter that `[identity]` forbids, or
            the quorum for more contributions than are expected, or a shortlist of experts where
            no member measures, or if its router cannot be made from published statistics where it
            has to be; if options are wrong, all of them named, or a label means something else.
    """
    rules, training = charter.identity.adapters, charter.amendment.training
    fusion = charter.amendment.fusion
    population, is_evolved = charter.amendment.population, fusion.mode == "population"
    for registry, name in list_named(charter, plugins):
        registry.entry(name)
    check_choices(
        (
            (plugins.fitness_scopes, "population.scope", (population.scope,) * is_evolved),
            (plugins.routers, "fusion.compare", fusion.compare),
            (plugins.merges, "fusion.merges", fusion.merges),
            (plugins.carried_files, "fusion.carried", fusion.carried),
            (plugins.gain_predictors, "fusion.predictors", fusion.predictors),
            (plugins.admission_checks, "admission.checks", charter.amendment.admission.checks),
        )
    )
    _check_labels(charter, plugins)
    problems = []
    if training.kind not in rules.kinds:
        accepted = f"a training kind among {', '.join(rules.kinds)} (--accept-kinds, at creation)"
        problems.append((accepted, training.kind))
    if training.rank > rules.max_rank:
        problems.append((f"a training rank of at most {rules.max_rank}", str(training.rank)))
    expected, quorum = charter.amendment.expected, charter.amendment.quorum
    if expected and quorum > expected:
        problems.append((f"a quorum of at most the {expected} expected", str(quorum)))
    if fusion.shortlist is not None and not charter.is_summed:
        way = f"{charter.identity.privacy_mode}, mode {fusion.mode}, shortlist {fusion.shortlist}"
        problems.append(("no fusion.shortlist but where members measure at home", way))
    _raise_problems(f"Cannot use charter '{charter.identity.name}'", problems)
    if charter.is_summed:
        from molora_fed.fusion.plan import check_published_router

        check_published_router(charter, plugins)
    if training.options:
        from molora_fed.adapters.contract import open_kind

        open_kind(training.kind, training.options, plugins)


def _check_labels(charter: Charter, plugins: Plugins) -> None:
    """Refuse labels that stand for something else; where there are none, nothing is imported."""
    fusion = charter.amendment.fusion
    own = {entry.name for entry in plugins.admission_checks if entry.is_own}
    checks = charter.amendment.admission.checks
    taken = sorted({one.key for one in checks if not one.is_plain} & own)
    if taken:
        raise CharterError(
            f"Cannot use charter '{charter.identity.name}': expected labels in admission.checks "
            f"beside the core's checks, which run as they are, got {', '.join(taken)}. Choose "
            "other labels."
        )
    if any(one.label for one in (*fusion.merges, *fusion.predictors)):
        from molora_fed.fusion.plan import check_labels

        check_labels(charter, plugins)


def _pin_plugins(charter: Charter, plugins: Plugins) -> Charter:
    """The charter with the plugins of others that it names, as they are installed here."""
    first = charter.amendment.model_copy(update={"plugins": build_pins(charter, plugins)})
    return Charter(identity=charter.identity, amendment=first)


def _check_suits_base(charter: Charter, base: "Base") -> None:
    from molora_fed.models.layout import decoder_blocks

    depth = len(decoder_blocks(base.model)[1])
    frozen = charter.identity.adapters.frozen_depth
    positions = base.max_positions
    size = charter.identity.corpus.block_size
    problems = []
    if frozen >= depth:
        problems.append((f"a frozen depth below the base's {depth} blocks", str(frozen)))
    if positions is not None and size > positions:
        problems.append((f"a block size of at most the base's {positions} positions", str(size)))
    samples = charter.amendment.samples
    if charter.publishes_statistics:
        from molora_fed.models.hidden_statistics import TOKENS_PER_WIDTH

        least = -(-TOKENS_PER_WIDTH * base.hidden_size // size)
        if samples.calibration < least:
            wanted = f"{least} calibration blocks at least, for statistics of hidden states"
            problems.append((wanted, str(samples.calibration)))
    _raise_problems(f"Cannot use charter '{charter.identity.name}' on this base", problems)


def _raise_problems(what: str, problems: Iterable[tuple[str, str]]) -> None:
    pairs = list(problems)
    if pairs:
        raise CharterError(
            describe_mismatch(
                what,
                expected=", ".join(want for want, _ in pairs),
                got=", ".join(got for _, got in pairs),
                fix="Correct these in the charter.",
            )
        )


def build_charter(
    name: str,
    base: BaseIdentity,
    adapters: AdapterRules | None,
    corpus: CorpusRules | None,
    amendment: Amendment | None,
    privacy: PrivacyRules | None,
) -> Charter:
    """Put a charter together that is not written anywhere yet.

    Raises:
        CharterError: If the name or the amendment's number is wrong.
    """
    first, privacy = amendment or Amendment(), privacy or PrivacyRules()
    if first.number != 0:
        raise CharterError(
            f"Cannot create cooperative '{name}': expected amendment 0, got {first.number}. "
            "Number the first amendment 0."
        )
    try:
        identity = Identity(
            version=2,
            name=name,
            base=base,
            adapters=adapters or AdapterRules(),
            corpus=corpus or CorpusRules(),
            privacy_mode=privacy.mode,
            summing=privacy.summing,
        )
    except ValidationError as error:
        raise CharterError(
            f"Cannot create cooperative '{name}': expected a name of lower-case letters, digits "
            f"and dashes, got '{name}'. Choose another name."
        ) from error
    return Charter(identity=identity, amendment=first)


def _open_same(wanted: Cooperative) -> Cooperative:
    """Open the cooperative that is there if it is the one wanted."""
    found = open_cooperative(wanted.folder)
    with found.read_ledger() as ledger:
        first = ledger.amendments()[0].amendment
    identity = wanted.charter.identity
    if found.charter.identity.version == 1:  # founded before there was another
        base = identity.base.model_copy(update={"config": None, "files": {}})
        identity = identity.model_copy(update={"version": 1, "base": base})
    if (found.charter.identity, first) != (identity, wanted.charter.amendment):
        raise CharterError(
            describe_mismatch(
                f"Cannot create cooperative '{wanted.charter.identity.name}' in '{wanted.folder}'",
                expected="no cooperative there, or the same",
                got=f"'{found.charter.identity.name}', charter {found.charter.identity_hash[:16]}, "
                "with other rules",
                fix="Choose another folder, or amend the one there.",
            )
        )
    return found
