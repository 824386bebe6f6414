"""Reads safetensors files from outside: the header is judged before any tensor is allocated."""

import json
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from molora_fed.errors import AdapterError

__all__ = ["ADAPTER_DTYPES", "TensorHeader", "describe_unreadable", "load_json", "load_tensors"]

ADAPTER_DTYPES = ("F32", "F16", "BF16")
"""Element types an adapter may have, as safetensors names them."""

MAX_JSON_BYTES = 2**20
MAX_HEADER_BYTES = 16 * 2**20
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
    return AdapterError(f"Cannot read adapter '{name}': expected {expected}, got {got}. {fix}")


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
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise describe_unreadable(
            name,
            expected=f"JSON in '{path.name}'",
            got=" ".join(str(error).split())[:120],
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
            headers = {}
            for key in sorted(file.keys()):
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
            got=" ".join(str(error).split())[:160],
            fix="It is truncated or malformed; copy or export it again.",
        ) from error
