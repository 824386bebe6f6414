"""An adapter on disk: `adapter_config.json`, `adapter_model.safetensors`, `molora_adapter.json`.

`lora` and `svd` are PEFT's format (`low_rank_files`), `delta` holds differences (`delta_files`).
`molora_adapter.json` says what PEFT's config cannot: kind, frozen depth, base fingerprint; a plain
PEFT LoRA folder without it is read as kind "lora".
"""

import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from molora_fed.adapters.compatibility import check_adapter_fits, find_misfits, find_non_finite
from molora_fed.adapters.limits import BaseLimits
from molora_fed.adapters.updates import Adapter
from molora_fed.charter import AdapterRules
from molora_fed.errors import AdapterError
from molora_fed.guard import guarded, refuse
from molora_fed.plugins import Plugins, get_plugins
from molora_fed.storage.files import (
    canonical_json,
    hash_bytes,
    hash_file,
    is_file,
    is_folder,
    replace_folder,
    write_bytes,
    write_json,
)
from molora_fed.storage.settings import read_model
from molora_fed.storage.untrusted import clean, parse_json
from molora_fed.types import ADAPTER_FILES

__all__ = [
    "ADAPTER_DTYPES",
    "CONFIG_FILE",
    "META_FILE",
    "WEIGHTS_FILE",
    "AdapterMeta",
    "TensorHeader",
    "check_adapter_fits",
    "describe_unreadable",
    "find_misfits",
    "find_non_finite",
    "hash_adapter_files",
    "load_adapter",
    "load_json",
    "load_meta",
    "load_tensors",
    "write_adapter_folder",
]


ADAPTER_DTYPES = ("F32", "F16", "BF16")
"""Element types an adapter may have, as safetensors names them."""

MAX_JSON_BYTES = 2**20
MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 65_536
"""Of one file; a mixture of experts with 20,000 linear layers has 40,000 factors."""
_TENSOR_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,200}")
_MAX_FOUND = 1_000  # characters of what an error quotes
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors header says of one tensor.

    Attributes:
        shape: Its dimensions.
        dtype: Its element type as safetensors names it, e.g. "F32".
    """

    shape: tuple[int, ...]
    dtype: str


def describe_unreadable(name: str, *, expected: str, got: str, fix: str) -> AdapterError:
    """The one-line error of an adapter whose files cannot be read."""
    found = clean(got, _MAX_FOUND)
    return AdapterError(f"Cannot read adapter '{name}': expected {expected}, got {found}. {fix}")


def _file_size(path: Path, name: str) -> int:
    """Size of a regular file; a pipe or a device, which could never end, is refused."""
    try:
        info = path.stat()
    except OSError as error:
        raise describe_unreadable(
            name,
            expected=f"a file '{path.name}'",
            got=error.strerror or "nothing",
            fix="Check the folder's name, or export the adapter again.",
        ) from error
    if not stat.S_ISREG(info.st_mode):
        raise describe_unreadable(
            name,
            expected=f"a regular file '{path.name}'",
            got="a folder or a special file",
            fix="Copy the file itself into the folder.",
        )
    return info.st_size


def load_json(path: Path, name: str) -> dict[str, Any]:
    """Read a small JSON object of an adapter.

    Args:
        path: The file.
        name: The adapter's name, for errors.

    Raises:
        AdapterError: If it is missing, too large, or not a JSON object.
    """
    size = _file_size(path, name)
    fix = "Export the adapter again."
    if size > MAX_JSON_BYTES:
        raise describe_unreadable(
            name,
            expected=f"at most {MAX_JSON_BYTES} bytes in '{path.name}'",
            got=str(size),
            fix=fix,
        )
    try:
        value = parse_json(path.read_bytes(), max_bytes=MAX_JSON_BYTES)
    except (OSError, ValueError) as error:
        raise describe_unreadable(
            name,
            expected=f"JSON in '{path.name}'",
            got=clean(error),
            fix=fix,
        ) from error
    if not isinstance(value, dict):
        raise describe_unreadable(
            name,
            expected=f"a JSON object in '{path.name}'",
            got=type(value).__name__,
            fix=fix,
        )
    return value


def _check_frame(path: Path, name: str, max_bytes: int | None) -> None:
    """Judge size, first bytes and header length, before the file is opened as safetensors."""
    size = _file_size(path, name)
    if max_bytes is not None and size > max_bytes:
        raise describe_unreadable(
            name,
            expected=f"at most {max_bytes} bytes in '{path.name}'",
            got=str(size),
            fix="Lower the rank, or choose a smaller adapter kind.",
        )
    with path.open("rb") as file:
        start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) == 8 and length <= size - 8 and length <= MAX_HEADER_BYTES:
        return  # first of all: a header of 640 bytes, say, begins like a pickle of protocol 2
    if start.startswith(_PICKLE_STARTS):
        raise describe_unreadable(
            name,
            expected=f"safetensors in '{path.name}'",
            got="a pickle, which could run code",
            fix="Save the tensors with safetensors; renaming the file is not enough.",
        )
    raise describe_unreadable(
        name,
        expected=f"a whole safetensors file '{path.name}'",
        got=f"{size} bytes with a header of {length}",
        fix="It is truncated or something else; copy or export it again.",
    )


def load_tensors(
    path: Path,
    name: str,
    *,
    max_bytes: int | None,
    check: Callable[[Mapping[str, TensorHeader]], None],
    dtypes: tuple[str, ...] = ADAPTER_DTYPES,
) -> dict[str, Tensor]:
    """Read a safetensors file whose sender is not trusted.

    Args:
        path: The file.
        name: The adapter's name, for errors.
        max_bytes: Refused above this size, before anything is allocated; None for no limit.
        check: Judges names, shapes and dtypes by the header, before anything is allocated; raises
            AdapterError.
        dtypes: Element types the file may have, as safetensors names them.

    Returns:
        The tensors by name, sorted, on the CPU, in the file's dtype.

    Raises:
        AdapterError: If the file is missing, too large, not safetensors, truncated, of a dtype
            that is not allowed, or refused by `check`.
    """
    _check_frame(path, name, max_bytes)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            keys = sorted(file.keys())
            _check_names(keys, name, path)
            headers = {}
            for key in keys:
                part = file.get_slice(key)
                headers[key] = TensorHeader(tuple(part.get_shape()), part.get_dtype())
            wrong = [f"'{k}' {h.dtype}" for k, h in headers.items() if h.dtype not in dtypes]
            if wrong:
                raise describe_unreadable(
                    name,
                    expected=f"tensors of {', '.join(dtypes)}",
                    got=", ".join(wrong[:5]),
                    fix="Convert them before saving.",
                )
            check(headers)
            # Copies: what safetensors returns is the mapped file, which may be cut short later.
            return {key: file.get_tensor(key).clone() for key in headers}
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, AdapterError):
            raise
        raise describe_unreadable(
            name,
            expected=f"a whole safetensors file '{path.name}'",
            got=clean(error),
            fix="It is truncated or malformed; copy or export it again.",
        ) from error


def _check_names(keys: Sequence[str], name: str, path: Path) -> None:
    """Refuse names that no layer has, and more of them than any base, before one is looked at."""
    fix = "Export the adapter again from training on this base."
    if len(keys) > MAX_TENSORS:
        raise describe_unreadable(
            name, expected=f"at most {MAX_TENSORS} tensors", got=str(len(keys)), fix=fix
        )
    strange = [clean(key) for key in keys if not _TENSOR_NAME.fullmatch(key)]
    if strange:
        raise describe_unreadable(
            name,
            expected=f"names of tensors in '{path.name}' of letters, digits and dots, 200 at most",
            got=f"'{strange[0]}'" + (f" and {len(strange) - 1} more" if strange[1:] else ""),
            fix=fix,
        )


CONFIG_FILE, WEIGHTS_FILE, META_FILE = ADAPTER_FILES
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
    if not os.path.exists(folder / META_FILE):
        return AdapterMeta(kind="lora", frozen_depth=0)
    return read_model(
        folder / META_FILE,
        AdapterMeta,
        what=f"Cannot read adapter '{name}'",
        error=AdapterError,
        fix="Export the adapter again with this version.",
        max_bytes=MAX_JSON_BYTES,
    )


def hash_adapter_files(folder: Path) -> str:
    """SHA-256 over names and hashes of an adapter's files; other files beside them do not count."""
    hashes = {n: hash_file(folder / n) for n in ADAPTER_FILES if is_file(folder / n)}
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
        StorageError: On I/O errors.
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
    model: Any | None = None,
    plugins: Plugins | None = None,
    name: str | None = None,
) -> Adapter:
    """Read an adapter whose sender is not trusted; its numbers are not judged here.

    Args:
        folder: Folder with the adapter's files.
        rules: Limits of the charter on kind, rank and bytes, checked before anything is allocated.
        model: The base model; with the rules it bounds what is expanded (`BaseLimits`).
        plugins: Where kinds are looked up; the installed plugins by default.
        name: Name for errors and reports; the folder's path by default.

    Returns:
        The adapter, on the CPU. Whether it fits a base says `check_adapter_fits`.

    Raises:
        AdapterError: If a file is missing, malformed, too large, unsafe or against the rules.
        UnknownNameError: If no plugin registers its kind.
    """
    name = str(folder) if name is None else name
    if not is_folder(folder):
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
    kinds = (plugins or get_plugins()).adapter_kinds
    entry = kinds.entry(meta.kind)
    limits = rules if rules is None or model is None else BaseLimits.of(rules, model)
    with guarded(entry, "loading", passing=(AdapterError,)):
        adapter = kinds.resolve(meta.kind)().load(folder, limits, name=name)
    if not isinstance(adapter, Adapter):
        raise refuse(entry, "loading", expected="an Adapter", got=type(adapter).__name__)
    return adapter
