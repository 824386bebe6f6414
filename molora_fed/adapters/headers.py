"""The outside of an adapter's files, without torch: sizes, JSON, names and shapes of tensors.

The first look at a folder from anywhere takes no tensor and imports no heavy library.
"""

import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open

from molora_fed.errors import AdapterError
from molora_fed.storage.settings import read_model
from molora_fed.storage.untrusted import clean, parse_json
from molora_fed.types import ADAPTER_FILES

__all__ = [
    "ADAPTER_DTYPES",
    "CONFIG_FILE",
    "INDEX_FILE",
    "META_FILE",
    "WEIGHTS_FILE",
    "AdapterMeta",
    "TensorHeader",
    "check_frame",
    "check_joined",
    "check_names",
    "check_total",
    "describe_unreadable",
    "load_json",
    "load_meta",
    "opened",
    "read_header",
    "read_headers",
]


CONFIG_FILE, WEIGHTS_FILE, META_FILE = ADAPTER_FILES
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
FORMAT_VERSION = 1

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
    found, name = clean(got, _MAX_FOUND), clean(name, _MAX_FOUND)
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


def check_frame(path: Path, name: str, max_bytes: int | None) -> None:
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


def check_names(keys: Sequence[str], name: str, path: Path) -> None:
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


@contextmanager
def opened(path: Path, name: str, *, framework: str) -> Iterator[Any]:
    """Open a safetensors file from outside, whose frame was checked; errors become one line.

    Args:
        path: The file.
        name: The adapter's name, for errors.
        framework: "np" for headers alone, "pt" where tensors are read.

    Raises:
        AdapterError: If it is truncated or malformed.
    """
    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, AdapterError):
            raise
        raise describe_unreadable(
            name,
            expected=f"a whole safetensors file '{path.name}'",
            got=clean(error),
            fix="It is truncated or malformed; copy or export it again.",
        ) from error


def read_header(file: Any, path: Path, name: str) -> dict[str, TensorHeader]:
    """Names, shapes and dtypes of an opened file's tensors, sorted by name.

    Raises:
        AdapterError: If there are too many, or a name is none of a tensor.
    """
    keys = sorted(file.keys())
    check_names(keys, name, path)
    headers = {}
    for key in keys:
        part = file.get_slice(key)
        headers[key] = TensorHeader(tuple(part.get_shape()), part.get_dtype())
    return headers


def read_headers(
    paths: Sequence[Path], name: str, *, max_bytes: int | None
) -> dict[str, TensorHeader]:
    """What the headers of a weights file, or of all its shards, say; no tensor is read.

    Args:
        paths: The file, or the shards.
        name: The adapter's name, for errors.
        max_bytes: Refused above this size of all together; None for no limit.

    Raises:
        AdapterError: If a file is missing, too large, malformed, or names a tensor twice.
    """
    headers: dict[str, TensorHeader] = {}
    for path in paths:
        check_frame(path, name, max_bytes)
        with opened(path, name, framework="np") as file:
            found = read_header(file, path, name)
        check_joined(headers, found, path, name)
        headers |= found
    check_total(paths, name, max_bytes)
    return headers


def check_joined(
    known: dict[str, TensorHeader], found: dict[str, TensorHeader], path: Path, name: str
) -> None:
    """Refuse a shard that names a tensor again, or makes too many of them."""
    twice = sorted(known.keys() & found.keys())
    if twice or len(known) + len(found) > MAX_TENSORS:
        raise describe_unreadable(
            name,
            expected=f"each tensor once, at most {MAX_TENSORS} in all shards",
            got=f"'{twice[0]}' again in '{path.name}'" if twice else "more",
            fix="Save the adapter again.",
        )


def check_total(paths: Sequence[Path], name: str, max_bytes: int | None) -> None:
    """Refuse shards that are too large together; one file alone was judged by `check_frame`."""
    total = sum(path.stat().st_size for path in paths)
    if max_bytes is not None and total > max_bytes:
        raise describe_unreadable(
            name,
            expected=f"at most {max_bytes} bytes in '{WEIGHTS_FILE}'",
            got=f"{total} in {len(paths)} shards",
            fix="Lower the rank, or choose a smaller adapter kind.",
        )
