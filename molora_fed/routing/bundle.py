"""A fused model as a folder: it can be moved or sent, and says what it was made from.

The folder holds `fused.json`, `router.safetensors` and `adapters/<expert>/`; the base is named by
a relative path and by the fingerprints of its weights and tokenizer, which decide.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from molora_fed.adapters.files import check_adapter_fits, load_adapter
from molora_fed.charter import BaseIdentity
from molora_fed.errors import BaseCheckpointError, RoutingError, describe_mismatch
from molora_fed.guard import guarded
from molora_fed.models.base import Base, check_base, load_base
from molora_fed.models.runtime import choose_placement
from molora_fed.plugins import Plugins, get_plugins
from molora_fed.routing.fused import FusedExpert, FusedModel
from molora_fed.routing.top_k import TopKRouter, limit_experts
from molora_fed.storage.compute import Compute
from molora_fed.storage.files import hash_bytes, replace_folder, write_bytes, write_json
from molora_fed.storage.settings import StrictModel, describe_offenders, read_model
from molora_fed.types import ADAPTER_FILES, Mixture

__all__ = [
    "BaseEntry",
    "FusedManifest",
    "describe_base",
    "find_fused",
    "has_fused",
    "load_fused",
    "load_manifest",
    "load_recorded_base",
    "save_fused",
]

MANIFEST_FILE = "fused.json"
ROUTER_FILE = "router.safetensors"
MAX_MANIFEST_BYTES = 4_000_000
MAX_ROUTER_BYTES = 1 * 2**30

_Sha = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_ExpertName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$")]


class BaseEntry(StrictModel):
    """Which base a model is on, and where it lies from the model's folder."""

    path: str
    dtype: Literal["float32", "float16", "bfloat16"]
    identity: BaseIdentity

    @field_validator("path")
    @classmethod
    def _is_relative(cls, path: str) -> str:
        if PurePosixPath(path).is_absolute():
            raise ValueError("must be relative to the folder")
        return path


class _ExpertEntry(StrictModel):
    name: _ExpertName
    domain: str | None
    contribution: _Sha | None
    adapter: _Sha | None


class _RouterEntry(StrictModel):
    name: str
    options: dict[str, Any]
    state: _Sha
    top_k: int | None = Field(default=None, ge=1)


class _PluginEntry(StrictModel):
    name: str
    plugin: str
    version: str


class FusedManifest(StrictModel):
    """Content of `fused.json`.

    Attributes:
        format_version: Version of this form.
        base: Relative path, dtype and identity of the base.
        frozen_depth: K; the blocks all experts share with the base.
        mixture: How distributions are mixed.
        router: Registered name, options, hash of its state, and how many experts it mixes.
        experts: Experts in the order of the gates, each with the hash of its adapter.
        plugins: Who registered the router: name, distribution and version; empty where an earlier
            version saved it, or it was made by hand.
    """

    format_version: Literal[1] = 1
    base: BaseEntry
    frozen_depth: int = Field(ge=0)
    mixture: Mixture
    router: _RouterEntry
    experts: tuple[_ExpertEntry, ...] = Field(min_length=1)
    plugins: dict[Literal["router"], _PluginEntry] = Field(default_factory=dict)

    @field_validator("experts")
    @classmethod
    def _are_distinct(cls, experts: tuple[_ExpertEntry, ...]) -> tuple[_ExpertEntry, ...]:
        if len({expert.name for expert in experts}) != len(experts):
            raise ValueError("names must be distinct")
        return experts


def save_fused(fused: FusedModel, folder: Path, *, adapters: Mapping[str, Path]) -> FusedManifest:
    """Write a fused model; its folder is replaced whole or not at all.

    Args:
        fused: The model.
        folder: Target.
        adapters: Folder with the files of each expert's adapter, by expert name.

    Returns:
        What was written into `fused.json`.

    Raises:
        RoutingError: If an expert's name cannot be a folder's, or its files are missing.
        StorageError: On I/O errors.
    """
    with fused.run_router():
        learned = dict(fused.router.state_tensors())
    state = save({n: t.detach().cpu().contiguous() for n, t in learned.items()})
    missing = [e.name for e in fused.experts if e.adapter is not None and e.name not in adapters]
    if missing:
        raise RoutingError(
            f"Cannot save fused model '{folder}': expected adapter files of every expert, got none "
            f"of {', '.join(missing)}. Pass their folders."
        )
    content = {
        "base": describe_base(fused.base, folder),
        "frozen_depth": fused.frozen_depth,
        "mixture": fused.mixture,
        "router": {
            "name": fused.router_name,
            "options": fused.router.options.model_dump(mode="json"),
            "state": hash_bytes(state),
            "top_k": fused.router.top_k if isinstance(fused.router, TopKRouter) else None,
        },
        "experts": [
            {
                "name": expert.name,
                "domain": expert.domain,
                "contribution": expert.contribution,
                "adapter": None if expert.adapter is None else expert.adapter.hash,
            }
            for expert in fused.experts
        ],
        "plugins": {} if fused.entry is None else {"router": fused.entry.describe()},
    }
    manifest = _parse(content, folder, doing="save")
    with replace_folder(folder) as target:
        for expert in fused.experts:
            if expert.adapter is not None:
                _copy_adapter(adapters[expert.name], target / "adapters" / expert.name)
        write_bytes(target / ROUTER_FILE, state)
        write_json(target / MANIFEST_FILE, manifest.model_dump(mode="json"))
    return manifest


def describe_base(base: Base, folder: Path) -> dict[str, Any]:
    """The content of a `BaseEntry` of a model that is saved in a folder."""
    return {
        "path": Path(os.path.relpath(base.folder.resolve(), folder.resolve())).as_posix(),
        "dtype": str(base.model.dtype).removeprefix("torch."),
        "identity": base.identity().model_dump(mode="json"),
    }


def _copy_adapter(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for name in ADAPTER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def load_manifest(folder: Path) -> FusedManifest:
    """Read `fused.json`; safe on files from outside.

    Raises:
        RoutingError: If it is missing, too large or malformed; all offenders are named.
    """
    return read_model(
        folder / MANIFEST_FILE,
        FusedManifest,
        what=f"Cannot load fused model '{folder}'",
        error=RoutingError,
        fix="Fuse again, or copy the folder again.",
        max_bytes=MAX_MANIFEST_BYTES,
    )


def _parse(content: Any, folder: Path, *, doing: str) -> FusedManifest:
    try:
        return FusedManifest.model_validate(content)
    except ValidationError as error:
        offenders = describe_offenders(error, whole=MANIFEST_FILE)
        raise RoutingError(
            f"Cannot {doing} fused model '{folder}': expected a valid {MANIFEST_FILE}, "
            f"got {offenders}. Fuse again, or copy the folder again."
        ) from error


def find_fused(folder: Path) -> Path:
    """The fused model in a folder: the folder itself, or its `fused/` or `result/fused/`."""
    for inner in (folder, folder / "fused", folder / "result" / "fused"):
        if _is_file(inner / MANIFEST_FILE):
            return inner
    return folder


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name longer than any file has, or a folder that is closed to us
        return False


def has_fused(folder: Path) -> bool:
    """Whether there is a fused model in a folder, see `find_fused`."""
    return _is_file(find_fused(folder) / MANIFEST_FILE)


def load_fused(
    folder: Path,
    *,
    base_folder: Path | None = None,
    compute: Compute | None = None,
    plugins: Plugins | None = None,
) -> FusedModel:
    """Read a fused model, here or wherever its folder was moved to.

    Args:
        folder: Folder written by `save_fused`.
        base_folder: Where the base is; the recorded relative path if None.
        compute: Where to run, and in which dtype; the dtype it was made in where it says none.
        plugins: Where routers and adapter kinds are registered; the installed ones if None.

    Raises:
        RoutingError: If a file is missing, malformed, or not the one recorded.
        BaseCheckpointError: If the base is not there, or is another one.
        AdapterError: If an adapter is malformed or does not fit the base.
        UnknownNameError: If nobody registers the router or an adapter kind.
    """
    plugins = plugins or get_plugins()
    manifest = load_manifest(folder)
    state = _read(folder / ROUTER_FILE, MAX_ROUTER_BYTES, folder)
    _check_hash(folder, ROUTER_FILE, expected=manifest.router.state, got=hash_bytes(state))
    router_class = plugins.routers.resolve(manifest.router.name)
    if manifest.router.top_k is not None:
        router_class = limit_experts(router_class, manifest.router.top_k)
    base = load_recorded_base(folder, manifest.base, base_folder, compute)
    experts = tuple(_load_expert(folder, entry, base, plugins) for entry in manifest.experts)
    try:
        tensors: dict[str, Tensor] = load(state)
        options = router_class.Options.model_validate(manifest.router.options)
        entry = plugins.routers.entry(manifest.router.name)
        with guarded(entry, "loading", passing=(KeyError, ValueError)):
            router = router_class(len(experts), options, tensors)
    except (SafetensorError, ValidationError, KeyError, ValueError) as error:
        raise RoutingError(
            f"Cannot load fused model '{folder}': expected options and state of router "
            f"'{manifest.router.name}', got {' '.join(str(error).split())[:300]}. Install the "
            "plugin version that fitted it, or fuse again."
        ) from error
    return FusedModel(
        base,
        experts,
        router,
        manifest.router.name,
        manifest.mixture,
        manifest.frozen_depth,
        entry,
    )


def _read(path: Path, limit: int, folder: Path) -> bytes:
    what = f"Cannot load fused model '{folder}'"
    try:
        size = path.stat().st_size
        if size > limit:
            raise RoutingError(
                f"{what}: expected at most {limit} bytes in {path.name}, got {size}. "
                "Check that this is the right folder."
            )
        return path.read_bytes()
    except OSError as error:
        raise RoutingError(
            f"{what}: expected a readable {path.name}, got {error.strerror}. "
            "Make one with `molora fuse`."
        ) from error


def _check_hash(folder: Path, what: str, *, expected: str, got: str) -> None:
    if expected != got:
        raise RoutingError(
            describe_mismatch(
                f"Cannot load fused model '{folder}', {what}",
                expected=f"SHA-256 {expected[:12]}",
                got=got[:12],
                fix="Copy the folder again, whole.",
            )
        )


def load_recorded_base(
    folder: Path, entry: BaseEntry, base_folder: Path | None, compute: Compute | None = None
) -> Base:
    """Load the base that a model's folder names.

    Args:
        folder: The model's folder.
        entry: What it says of its base.
        base_folder: Where the base is; the recorded relative path if None.
        compute: Where to run, and in which dtype; the dtype it was made in where it says none.

    Raises:
        BaseCheckpointError: If the base is not there, or is another one.
        ComputeError: If this machine lacks device, dtype or memory.
    """
    where = base_folder or (folder / entry.path)
    identity = entry.identity
    if not where.is_dir():
        raise BaseCheckpointError(
            f"Cannot load model '{folder}': expected base {identity.id} with weights "
            f"{identity.weights[:12]} in '{where}', got no such folder. Say where the base is."
        )
    base = load_base(where, choose_placement(compute or Compute(), entry.dtype))
    check_base(base, identity)
    return base


def _load_expert(folder: Path, entry: _ExpertEntry, base: Base, plugins: Plugins) -> FusedExpert:
    adapter = None
    if entry.adapter is not None:
        adapter = load_adapter(
            folder / "adapters" / entry.name, model=base.model, plugins=plugins, name=entry.name
        )
        _check_hash(folder, f"adapter '{entry.name}'", expected=entry.adapter, got=adapter.hash)
        check_adapter_fits(adapter, base.model)
    return FusedExpert(entry.name, adapter, entry.domain, entry.contribution)
