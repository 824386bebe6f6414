"""An adapter on disk: `adapter_config.json`, `adapter_model.safetensors`, `molora_adapter.json`.

`lora` and `svd` are PEFT's format (`low_rank_files`), `delta` holds differences (`delta_files`).
`molora_adapter.json` says what PEFT's config cannot: kind, frozen depth, base fingerprint; a plain
PEFT LoRA folder without it is read as kind "lora".
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save
from torch import Tensor

from molora_fed.adapters.compatibility import check_adapter_fits, find_misfits, find_non_finite
from molora_fed.adapters.tensor_files import describe_unreadable, load_json
from molora_fed.adapters.updates import Adapter
from molora_fed.charter import AdapterRules
from molora_fed.errors import AdapterError
from molora_fed.files import (
    canonical_json,
    hash_bytes,
    hash_file,
    replace_folder,
    write_bytes,
    write_json,
)
from molora_fed.plugins import Plugins, get_plugins

__all__ = [
    "ADAPTER_FILES",
    "CONFIG_FILE",
    "META_FILE",
    "WEIGHTS_FILE",
    "AdapterMeta",
    "check_adapter_fits",
    "find_misfits",
    "find_non_finite",
    "hash_adapter_files",
    "load_adapter",
    "load_meta",
    "write_adapter_folder",
]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
META_FILE = "molora_adapter.json"
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, META_FILE)
FORMAT_VERSION = 1


class AdapterMeta(BaseModel):
    """Content of `molora_adapter.json`.

    Attributes:
        format_version: Version of the format; others are refused.
        kind: Adapter kind.
        frozen_depth: K; blocks below it are not changed.
        base_weights: Fingerprint of the base it was trained on; empty if not stated.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format_version: int = Field(default=FORMAT_VERSION, ge=FORMAT_VERSION, le=FORMAT_VERSION)
    kind: str = Field(pattern=r"^[a-z][a-z0-9]*(-[a-z0-9]+)*$", max_length=64)
    frozen_depth: int = Field(ge=0)
    base_weights: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")


def load_meta(folder: Path, name: str) -> AdapterMeta:
    """Read `molora_adapter.json`; where it is absent, the folder is a plain PEFT LoRA.

    Args:
        folder: The adapter's folder.
        name: The adapter's name, for errors.

    Raises:
        AdapterError: If it is malformed or of another format version.
    """
    if not (folder / META_FILE).exists():
        return AdapterMeta(kind="lora", frozen_depth=0)
    try:
        return AdapterMeta.model_validate(load_json(folder / META_FILE, name))
    except ValidationError as error:
        offenders = "; ".join(
            f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()
        )
        raise describe_unreadable(
            name,
            expected=f"known keys with valid values in '{META_FILE}'",
            got=offenders[:300],
            fix="Export the adapter again with this version.",
        ) from error


def hash_adapter_files(folder: Path) -> str:
    """SHA-256 over names and hashes of an adapter's files; other files beside them do not count."""
    hashes = {n: hash_file(folder / n) for n in ADAPTER_FILES if (folder / n).exists()}
    return hash_bytes(canonical_json(hashes))


def write_adapter_folder(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], meta: AdapterMeta
) -> None:
    """Write an adapter's three files; the folder is replaced whole or not at all.

    Args:
        folder: Target; what was there before is replaced.
        config: Content of `adapter_config.json`.
        tensors: Tensors by their names in the file; equal tensors give equal bytes.
        meta: Content of `molora_adapter.json`.

    Raises:
        StorageError: If the disk refuses.
    """
    plain = {key: tensors[key].detach().cpu().contiguous() for key in sorted(tensors)}
    with replace_folder(folder) as target:
        write_bytes(target / WEIGHTS_FILE, save(plain, metadata={"format": "pt"}))
        write_json(target / CONFIG_FILE, config)
        write_json(target / META_FILE, meta.model_dump(mode="json"))


def load_adapter(
    folder: Path,
    *,
    rules: AdapterRules | None = None,
    plugins: Plugins | None = None,
    name: str | None = None,
) -> Adapter:
    """Read an adapter whose sender is not trusted; its numbers are not judged here.

    Args:
        folder: Folder with the adapter's files.
        rules: Limits of the charter on kind, rank and bytes, checked before anything is allocated.
        plugins: Where kinds are looked up; the installed plugins by default.
        name: Name for errors and reports; the folder's path by default.

    Returns:
        The adapter, on the CPU. Whether it fits a base says `check_adapter_fits`.

    Raises:
        AdapterError: If a file is missing, malformed, too large, unsafe or against the rules.
        UnknownNameError: If no plugin registers its kind.
    """
    name = str(folder) if name is None else name
    if not folder.is_dir():
        raise describe_unreadable(
            name,
            expected=f"a folder with {CONFIG_FILE} and {WEIGHTS_FILE}",
            got="no such folder",
            fix="Check the path.",
        )
    meta = load_meta(folder, name)
    if rules is not None and meta.kind not in rules.kinds:
        raise describe_unreadable(
            name,
            expected=f"a kind among {', '.join(rules.kinds)}",
            got=f"'{meta.kind}'",
            fix="Train a kind that the charter accepts.",
        )
    kind = (plugins or get_plugins()).adapter_kinds.resolve(meta.kind)()
    adapter = kind.load(folder, rules, name=name)
    if not isinstance(adapter, Adapter):
        raise AdapterError(
            f"Cannot read adapter '{name}': expected kind '{meta.kind}' to give an Adapter, "
            f"got {type(adapter).__name__}. Correct or uninstall the plugin."
        )
    return adapter
