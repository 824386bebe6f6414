"""Files that plugins compute for a contribution and that lie beside its adapter: form and bounds.

A carried file is a safetensors file of named floating-point tensors. What they mean is agreed
between the plugin that computes them and the router that reads them; here they are checked to be
bounded and finite, no more.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from molora_fed.adapters.headers import ADAPTER_DTYPES
from molora_fed.errors import AdapterError
from molora_fed.storage.untrusted import clean

__all__ = [
    "MAX_CARRIED_TENSORS",
    "CarriedFiles",
    "complete_carried",
    "encode_carried",
    "find_carried_fault",
    "load_carried",
]

MAX_CARRIED_TENSORS = 4_096
"""Of one file: a few for each linear layer of a large base."""
_MAX_AXES = 4
_MAX_HEADER_BYTES = 2**20
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,200}")
_DTYPES = dict(zip(ADAPTER_DTYPES, (torch.float32, torch.float16, torch.bfloat16), strict=True))

LoadCarried = Callable[[], Mapping[str, Tensor]]


class CarriedFiles(Mapping[str, Mapping[str, Tensor] | None]):
    """What an expert's contribution carries, by the registered name of what computed it.

    `files[name]` has the tensors by name, read anew each time, so that whoever changes them changes
    a copy; None where the contribution carries nothing of that name.

    Args:
        files: How each is read.
    """

    def __init__(self, files: Mapping[str, LoadCarried] = MappingProxyType({})) -> None:
        self._files = dict(files)

    def __getitem__(self, name: str) -> Mapping[str, Tensor] | None:
        load = self._files.get(name)
        return None if load is None else load()

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._files))

    def __len__(self) -> int:
        return len(self._files)


def complete_carried(
    carried: Mapping[str, CarriedFiles], expert_names: Iterable[str]
) -> Mapping[str, CarriedFiles]:
    """What each of these experts carries, by name; nothing of one that nothing is known of.

    Args:
        carried: By expert's name, of some of them.
        expert_names: All experts.
    """
    return MappingProxyType({name: carried.get(name, CarriedFiles()) for name in expert_names})


def find_carried_fault(tensors: Any) -> tuple[str, str] | None:
    """What tensors of a carried file are expected to be, and what these are; None if they are.

    Args:
        tensors: What a plugin gave, or what was read.
    """
    if not isinstance(tensors, Mapping) or not 0 < len(tensors) <= MAX_CARRIED_TENSORS:
        got = f"{len(tensors)}" if isinstance(tensors, Mapping) else type(tensors).__name__
        return f"1 to {MAX_CARRIED_TENSORS:,} tensors by name", got
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            got = f"{type(tensor).__name__} under {clean(name, 80)}"
            return "tensors by name", got
        fault = _find_header_fault(name, _name_dtype(tensor.dtype), tuple(tensor.shape))
        if fault is not None:
            return fault
        if not bool(tensor.isfinite().all()):
            return f"finite numbers in '{name}'", "NaN or infinity"
    return None


def _find_header_fault(name: str, dtype: str, shape: tuple[int, ...]) -> tuple[str, str] | None:
    """The same of what a header says of one tensor."""
    if not _NAME.fullmatch(name):
        return "names of tensors of letters, digits and dots, 200 at most", f"'{clean(name, 80)}'"
    if dtype not in _DTYPES:
        return f"{', '.join(_DTYPES)} in '{name}'", dtype
    if len(shape) > _MAX_AXES or any(size < 1 for size in shape):
        return f"at most {_MAX_AXES} axes, none of them empty, in '{name}'", str(shape)
    return None


def _name_dtype(dtype: torch.dtype) -> str:
    """A dtype as safetensors names it, or else as torch does."""
    return next((name for name, known in _DTYPES.items() if known is dtype), str(dtype))


def encode_carried(tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of a carried file; equal tensors give equal bytes.

    Args:
        tensors: In which `find_carried_fault` finds none.
    """
    plain = {name: tensors[name].detach().cpu().contiguous().clone() for name in sorted(tensors)}
    return save(plain)


def load_carried(path: Path, name: str, *, who: str, max_bytes: int) -> dict[str, Tensor]:
    """Read a carried file from outside.

    Args:
        path: The file.
        name: Registered name of what computed it, for errors.
        who: Whose contribution carries it, for errors.
        max_bytes: Larger files are not opened.

    Raises:
        AdapterError: If the file is missing, too large or malformed, has too many tensors or one
            that is not finite.
    """

    def refuse(expected: str, got: object) -> AdapterError:
        return AdapterError(
            f"Cannot read carried file '{name}' of '{clean(who)}': expected {expected}, got "
            f"{clean(got, 100)}. Build the contribution again."
        )

    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise refuse(f"at most {max_bytes:,} bytes", f"{size:,}")
        with path.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise refuse("a safetensors file", f"{size:,} bytes with a header of {length:,}")
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys())
            if not 0 < len(names) <= MAX_CARRIED_TENSORS:
                raise refuse(f"1 to {MAX_CARRIED_TENSORS:,} tensors", f"{len(names):,}")
            # By the header, before torch makes room for anything.
            for key in names:
                part = file.get_slice(key)
                fault = _find_header_fault(key, part.get_dtype(), tuple(part.get_shape()))
                if fault is not None:
                    raise refuse(*fault)
            # The file is mapped: without a copy, tensors would change with it.
            tensors = {key: file.get_tensor(key).clone() for key in names}
    except OSError as error:
        raise refuse("a file", error.strerror) from error
    except (SafetensorError, ValueError) as error:
        if isinstance(error, AdapterError):
            raise
        raise refuse("a safetensors file", error) from error
    fault = find_carried_fault(tensors)
    if fault is not None:
        raise refuse(*fault)
    return tensors
