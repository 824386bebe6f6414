"""A contribution: adapter files, counted samples, and a signed manifest that names every byte.

The folder of a contribution::

    manifest.json  signature  adapter/adapter_config.json  adapter/adapter_model.safetensors
    [adapter/molora_adapter.json]  samples/{calibration,admission,held-out}.safetensors
    [statistics.safetensors] [carried/NAME.safetensors ...]

Its id is the SHA-256 of the manifest's canonical JSON; the signature is over the same bytes. The
manifest holds no time of day, so the same training gives the same id.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field, JsonValue, ValidationError

from molora_fed.adapters.peft_folder import Claims
from molora_fed.charter import MAX_CARRIED_FILES, RegisteredName
from molora_fed.contributions.figures import check_figures
from molora_fed.corpus.blocks import Blocks, load_blocks
from molora_fed.errors import AdapterError, list_offenders
from molora_fed.storage.files import canonical_json, hash_bytes
from molora_fed.storage.keys import verify
from molora_fed.storage.settings import UntrustedModel, describe_offenders
from molora_fed.storage.untrusted import MAX_DEPTH, clean, parse_json
from molora_fed.types import ADAPTER_FILES, AdapterFile, Split

if TYPE_CHECKING:
    from molora_fed.adapters.carried_files import CarriedFiles

__all__ = [
    "SAMPLE_SPLITS",
    "Contribution",
    "FileEntry",
    "Manifest",
    "Origin",
    "QueryEntry",
    "SampleEntry",
    "load_contribution",
    "locate_carried",
    "parse_manifest",
    "read_manifest",
    "read_signature",
]

FORMAT_VERSION = 1
RESERVED_NAMES = ("base",)  # The base is an expert of this name beside the contributors'.
MAX_MANIFEST_BYTES = 1_000_000
MAX_SIGNATURE_BYTES = 1_000
MAX_CONFIG_BYTES = 1_000_000
MANIFEST_FILE = "manifest.json"
SIGNATURE_FILE = "signature"
STATISTICS_FILE = "statistics.safetensors"
CARRIED_FOLDER = "carried"
_MOST_NAMES = 100  # read of a folder that should hold three files

WEIGHTS_FILE = ADAPTER_FILES[1]
REQUIRED_ADAPTER_FILES: tuple[AdapterFile, ...] = ADAPTER_FILES[:2]

SAMPLE_SPLITS: tuple[Split, ...] = (Split.CALIBRATION, Split.ADMISSION, Split.HELD_OUT)
"""The splits of which blocks may leave a contributor's machine; never train or validation."""


def locate_carried(name: str) -> str:
    """Path of a carried file inside a contribution's folder."""
    return f"{CARRIED_FOLDER}/{name}.safetensors"


def _check_may_leave(split: Split) -> Split:
    if split not in SAMPLE_SPLITS:
        raise ValueError(f"blocks of split '{split}' must not leave the contributor's machine")
    return split


def _check_not_reserved(name: str) -> str:
    if name in RESERVED_NAMES:
        raise ValueError(f"'{name}' names something else in reports; choose another name")
    return name


Sha = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
ContributorName = Annotated[Name, AfterValidator(_check_not_reserved)]
SampleSplit = Annotated[Split, AfterValidator(_check_may_leave)]
Loss = Annotated[float, Field(ge=0)]


class FileEntry(UntrustedModel):
    """One file: SHA-256 as lower-case hex, and size in bytes."""

    sha256: Sha
    bytes: int = Field(ge=1)


class SampleEntry(FileEntry):
    """The file of one split's blocks, with the number of blocks and of tokens in it."""

    blocks: int = Field(ge=1)
    tokens: int = Field(ge=1)


class QueryEntry(FileEntry):
    """The query by which others' train text is asked for a contributor's held-out blocks.

    It commits to the query before anybody knows who is asked; see docs/overlap.md. The query
    itself is no part of a contribution.

    Attributes:
        blocks: Held-out blocks whose word 8-grams are in it.
    """

    blocks: int = Field(ge=1)


class Origin(UntrustedModel):
    """What the folder of an adapter that was made elsewhere claims, and what was verified.

    Attributes:
        base: Name of the base it says it was trained on; "" if it does not say.
        revision: Revision of that base, or "".
        peft_version: Version of PEFT that saved it, or "".
        tool: Program that trained it, or "".
        verified: "shapes": its names and shapes fit the cooperative's base, and no more is known.
    """

    base: str = Field(default="", max_length=160)
    revision: str = Field(default="", max_length=64)
    peft_version: str = Field(default="", max_length=32)
    tool: str = Field(default="", max_length=32)
    verified: Literal["shapes"] = "shapes"

    @classmethod
    def of_claims(cls, claims: Claims) -> "Origin":
        """What a folder claims, nothing of it verified."""
        return cls(**asdict(claims))

    @property
    def has_quantised_base(self) -> bool:
        """Whether the base's name is that of a copy in four bits."""
        return Claims(base=self.base).has_quantised_base


class Manifest(UntrustedModel):
    """What a contributor signs.

    Attributes:
        format_version: Version of this form.
        contributor: The contributor's name in this cooperative.
        public_key: The contributor's P-384 public key, PEM.
        domain: Domain the specialist was trained on.
        charter_identity: Identity hash of the charter.
        amendment: Number of the amendment the contributor saw.
        base_weights: Fingerprint of the base's weights.
        base_tokenizer: Fingerprint of the base's tokenizer.
        kind: Adapter kind.
        adapter_files: Every file of the adapter by name.
        sample_files: Every split of which blocks leave the contributor's machine.
        training: Training record: threads, dtype, versions, steps, seed, ...
        base_loss: The base's loss on the contributor's validation blocks, nats per token.
        specialist_loss: The specialist's loss on the same blocks, nats per token.
        contamination: Share of held-out word 8-grams that occur in train, in [0, 1]; None if
            the corpus was not prepared here.
        start_loss: Loss of the model that training started from on the admission sample, nats per
            token; None in manifests of earlier versions, which do not have the key.
        origin: What an adapter made elsewhere claims; None, and no key, for one trained here.
        held_out_query: What asks others' train text for the held-out blocks; None, and no key,
            where held-out blocks are sent, or nobody's are compared with this contributor's text.
        statistics_file: Statistics of the base's hidden states that are published; None, and no
            key, where routers are not made from them.
        carried_files: What plugins computed, by their registered names; no key where there is
            none.
    """

    format_version: Literal[1] = 1
    contributor: ContributorName
    public_key: str = Field(max_length=1_000)
    domain: Name
    charter_identity: Sha
    amendment: int = Field(ge=0)
    base_weights: Sha
    base_tokenizer: Sha
    kind: Name
    adapter_files: dict[AdapterFile, FileEntry]
    sample_files: dict[SampleSplit, SampleEntry]
    training: dict[str, JsonValue]
    base_loss: Loss
    specialist_loss: Loss
    contamination: float | None = Field(default=None, ge=0, le=1)
    # Left out where there is none, so that manifests signed before there was the key verify.
    start_loss: Loss | None = Field(default=None, exclude_if=lambda loss: loss is None)
    origin: Origin | None = Field(default=None, exclude_if=lambda origin: origin is None)
    held_out_query: QueryEntry | None = Field(default=None, exclude_if=lambda query: query is None)
    statistics_file: FileEntry | None = Field(default=None, exclude_if=lambda entry: entry is None)
    carried_files: dict[RegisteredName, FileEntry] = Field(
        default={}, max_length=MAX_CARRIED_FILES, exclude_if=lambda files: not files
    )

    @property
    def canonical(self) -> bytes:
        """The bytes that are hashed and signed."""
        return canonical_json(self.model_dump(mode="json"))

    @property
    def contribution_id(self) -> str:
        """SHA-256 of the canonical bytes, lower-case hex."""
        return hash_bytes(self.canonical)

    @property
    def files(self) -> dict[str, FileEntry]:
        """Every file by its path inside the contribution's folder."""
        adapter = {f"adapter/{name}": entry for name, entry in self.adapter_files.items()}
        samples = {f"samples/{s}.safetensors": entry for s, entry in self.sample_files.items()}
        statistics = {} if self.statistics_file is None else {STATISTICS_FILE: self.statistics_file}
        carried = {locate_carried(name): entry for name, entry in self.carried_files.items()}
        return {**adapter, **samples, **statistics, **carried}

    @property
    def num_bytes(self) -> int:
        """Bytes of all files together, without manifest and signature."""
        return sum(entry.bytes for entry in self.files.values())


@dataclass(frozen=True)
class Contribution:
    """A contribution on disk whose signature was verified.

    Attributes:
        folder: Its folder.
        manifest: The signed manifest.
        signature: Hex signature over the manifest's canonical bytes.
    """

    folder: Path
    manifest: Manifest
    signature: str

    @property
    def id(self) -> str:
        """The contribution id, 64 hex digits."""
        return self.manifest.contribution_id

    @property
    def adapter_folder(self) -> Path:
        """Folder with the adapter's files."""
        return self.folder / "adapter"

    @property
    def statistics_path(self) -> Path | None:
        """Where its statistics of hidden states lie; None if it has none."""
        return None if self.manifest.statistics_file is None else self.folder / STATISTICS_FILE

    @property
    def carried(self) -> "CarriedFiles":
        """What it carries, by the registered name of what computed it; read when it is asked for.

        Reading raises an AdapterError if a file is malformed.
        """
        from molora_fed.adapters.carried_files import CarriedFiles, load_carried  # loads torch

        manifest = self.manifest
        return CarriedFiles(
            {
                name: partial(
                    load_carried,
                    self.folder / locate_carried(name),
                    name,
                    who=manifest.contributor,
                    max_bytes=entry.bytes,
                )
                for name, entry in manifest.carried_files.items()
            }
        )

    def load_samples(self, split: Split) -> Blocks:
        """Read the blocks of one split and hold them against the manifest.

        Raises:
            AdapterError: If the manifest lists no such blocks, or the file has other blocks than
                it states.
            CorpusError: If the file is malformed.
        """
        manifest = self.manifest
        entry = next((e for s, e in manifest.sample_files.items() if s == split), None)
        what = f"Cannot read {split} sample of '{manifest.contributor}'"
        if entry is None:
            raise AdapterError(
                f"{what}: expected one in the manifest, got {', '.join(manifest.sample_files)}. "
                "Ask the contributor for a contribution with these blocks."
            )
        path = self.folder / "samples" / f"{split}.safetensors"
        blocks = load_blocks(path, max_bytes=entry.bytes)
        stated = (manifest.domain, split, entry.blocks, entry.tokens)
        found = (blocks.domain, blocks.split, len(blocks), blocks.tokens.size)
        if stated != found:
            raise AdapterError(
                f"{what}: expected (domain, split, blocks, tokens) = {_list(stated)} as the "
                f"manifest states, got {clean(_list(found))}. Build the contribution again."
            )
        return blocks


def _list(values: tuple[object, ...]) -> str:
    return f"({', '.join(str(value) for value in values)})"


def parse_manifest(data: bytes, *, where: str = MANIFEST_FILE) -> Manifest:
    """Parse a manifest from outside.

    Args:
        data: JSON, in any layout.
        where: Name used in errors.

    Raises:
        AdapterError: If it is too large or too deep, not JSON, or a key is unknown, missing or has
            a bad value, figures of the training record among them; all offenders are named at once.
    """
    what = f"Cannot read manifest '{clean(where)}'"
    fix = "Build the contribution again."
    try:
        value = parse_json(data, max_bytes=MAX_MANIFEST_BYTES, max_depth=MAX_DEPTH)
        # Written anew: one parser decided what is in it, and is held to by the next one.
        manifest = _validate(canonical_json(value), what)
        check_figures(manifest.training)
    except ValidationError as error:
        raise AdapterError(
            f"{what}: expected figures that a report can hold in the training record, got "
            f"{describe_offenders(error, whole='training')}. {fix}"
        ) from error
    except AdapterError:
        raise
    except ValueError as error:
        raise AdapterError(
            f"{what}: expected JSON of at most {MAX_MANIFEST_BYTES} bytes, got {clean(error)}. "
            f"{fix}"
        ) from error
    missing = [name for name in REQUIRED_ADAPTER_FILES if name not in manifest.adapter_files]
    if missing:
        raise AdapterError(
            f"{what}: expected adapter files {', '.join(REQUIRED_ADAPTER_FILES)}, "
            f"got none called {', '.join(missing)}. {fix}"
        )
    return manifest


def read_manifest(data: bytes, *, where: str) -> Manifest:
    """Read a manifest that the ledger holds, under whatever bounds it was received.

    Args:
        data: Its canonical bytes.
        where: Name used in errors.

    Raises:
        AdapterError: If it is no manifest.
    """
    return _validate(data, f"Cannot read manifest '{where}'")


def _validate(data: bytes, what: str) -> Manifest:
    try:
        manifest = Manifest.model_validate_json(data)
        manifest.canonical  # noqa: B018 (pydantic lets NaN through in the training record)
    except ValidationError as error:
        raise AdapterError(
            f"{what}: expected the keys of format {FORMAT_VERSION} with valid values, "
            f"got {describe_offenders(error, whole='manifest')}. Build the contribution again."
        ) from error
    except ValueError as error:
        raise AdapterError(
            f"{what}: expected values that JSON can carry in the training record, got "
            f"{clean(error)}. Build the contribution again."
        ) from error
    return manifest


def read_signature(data: bytes) -> str:
    """The hex text of a signature file, which one newline may end.

    Raises:
        AdapterError: If it is too large or not ASCII.
    """
    if len(data) > MAX_SIGNATURE_BYTES or not data.isascii():
        raise AdapterError(
            f"Cannot read signature: expected at most {MAX_SIGNATURE_BYTES} hex digits, "
            f"got {len(data)} bytes of something else. Build the contribution again."
        )
    return data.decode("ascii").removesuffix("\n")


def load_contribution(folder: Path) -> Contribution:
    """Read a contribution's folder: manifest, signature, and which files are there.

    The files' sizes are held against the manifest here; their hashes when they are stored
    (`molora_fed.contributions.receive.receive_contribution`).

    Args:
        folder: Folder of a contribution.

    Raises:
        AdapterError: If the manifest or a file is missing, malformed, of another size than
            stated, a link, or not named in the manifest; all offending files are named.
        SignatureError: If the signature does not verify.
    """
    manifest = parse_manifest(
        _read_small(folder / MANIFEST_FILE, MAX_MANIFEST_BYTES), where=str(folder / MANIFEST_FILE)
    )
    signature = read_signature(_read_small(folder / SIGNATURE_FILE, MAX_SIGNATURE_BYTES))
    what = f"contribution of '{manifest.contributor}'"
    verify(manifest.public_key, manifest.canonical, signature, what=what)
    problems = [
        f"{name}: {found}"
        for name, entry in manifest.files.items()
        if (found := _describe_file(folder / name)) != f"{entry.bytes} bytes"
    ]
    for part in ("adapter", "samples", CARRIED_FOLDER):
        problems += _find_unsigned(folder, part, manifest)
    if problems:
        raise AdapterError(
            f"Cannot read {what} in '{clean(folder)}': expected exactly the plain files of its "
            f"manifest with their sizes, got {list_offenders([clean(p) for p in problems])}. "
            "Build the contribution again."
        )
    return Contribution(folder, manifest, signature)


def _find_unsigned(folder: Path, part: str, manifest: Manifest) -> Iterator[str]:
    """What lies in a part of a contribution's folder beside the files of its manifest."""
    if (folder / part).is_symlink():
        yield f"{part}: a link"
        return
    try:
        names = [entry.name for entry in islice(os.scandir(folder / part), _MOST_NAMES)]
    except FileNotFoundError:
        return
    except OSError as error:
        yield f"{part}: {error.strerror}"
        return
    signed = manifest.files.keys()
    for name in sorted(names):
        if f"{part}/{name}" not in signed:
            yield f"{part}/{clean(name, 150)}: not signed"


def _describe_file(path: Path) -> str:
    try:
        status = path.lstat()
    except (OSError, ValueError):  # also a name that no file can have
        return "missing"
    return f"{status.st_size} bytes" if stat.S_ISREG(status.st_mode) else "not a plain file"


def _read_small(path: Path, max_bytes: int) -> bytes:
    """Read a file of at most `max_bytes`."""
    found = _describe_file(path)
    try:
        if found.endswith("bytes") and path.lstat().st_size <= max_bytes:
            return path.read_bytes()
    except OSError as error:
        found = error.strerror or "an error"
    raise AdapterError(
        f"Cannot read '{clean(path)}': expected a plain file of at most {max_bytes} bytes, "
        f"got {found}. Point to the folder of a contribution."
    )
