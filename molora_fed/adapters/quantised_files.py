"""The quantised format: factors or differences of 8, 4 or 2 bits, and what it takes to read them.

`adapter_config.json` holds `{"format": "quantised", "bits", "group", "modules": {name: {"rows",
"columns", "rank", "scale"}}}`; `rank` is null for a difference. The weights file holds for each
module `<name>.a.codes`, `<name>.a.scales` (A, R rows of D_in numbers) and `<name>.b.codes`,
`<name>.b.scales` (B transposed, R rows of D_out numbers, so that every direction has scales of its
own), or `<name>.dense.codes`, `<name>.dense.scales` (D_out rows of D_in), and a bias as it is in
`<name>.bias`. PEFT refuses such a folder, as it must: it knows nothing of scales.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from molora_fed.adapters.files import (
    ADAPTER_DTYPES,
    CONFIG_FILE,
    MAX_JSON_BYTES,
    WEIGHTS_FILE,
    AdapterMeta,
    TensorHeader,
    build_loaded,
    describe_unreadable,
    load_json,
    load_tensors,
    write_adapter_folder,
)
from molora_fed.adapters.limits import BaseLimits
from molora_fed.adapters.updates import Adapter, LinearUpdate
from molora_fed.charter import AdapterRules
from molora_fed.errors import AdapterError
from molora_fed.storage.settings import UntrustedModel, read_model
from molora_fed.storage.untrusted import clean

__all__ = [
    "BITS",
    "Bits",
    "Quantised",
    "count_row_bytes",
    "count_scales",
    "dequantise",
    "is_quantised",
    "load_quantised",
    "quantise",
    "write_quantised",
]


Bits = Literal[2, 4, 8]
BITS: tuple[Bits, ...] = (2, 4, 8)

# Shares of a group's largest number that are tried as the largest level.
_CLIPS = {
    2: tuple(1.0 - 0.05 * i for i in range(17)),
    4: tuple(1.0 - 0.025 * i for i in range(17)),
    8: tuple(1.0 - 0.025 * i for i in range(17)),
}
_NUMBERS_AT_ONCE = 2**18  # made of codes at a time; each takes some 20 bytes meanwhile
_TOP = {2: 1.5, 4: 7.0, 8: 127.0}
_OFFSET = {2: 1.5, 4: 8.0, 8: 128.0}


@dataclass(frozen=True, eq=False)
class Quantised:
    """A matrix of few bits.

    Attributes:
        codes: (rows, bytes of a row) uint8.
        scales: (rows, groups of a row) bfloat16.
    """

    codes: Tensor
    scales: Tensor


def count_row_bytes(columns: int, bits: int) -> int:
    """Bytes that the codes of one row take."""
    return -(-columns * bits // 8)


def count_scales(columns: int, group: int) -> int:
    """Scales of one row; the last group may be shorter."""
    return -(-columns // group)


def quantise(matrix: Tensor, bits: Bits, group: int) -> Quantised:
    """Round a matrix to b bits, each group's scale chosen for the least squared error.

    The scale is tried at several shares of what would fit the group's largest number: with few
    bits it pays to clip that one and round all others more finely. Equal matrices give equal bytes.

    Args:
        matrix: (rows, columns), finite.
        bits: b.
        group: Numbers of a row that share a scale.

    Raises:
        AdapterError: If a number is NaN or infinite.

    Source: symmetric absmax rounding by groups as in arXiv 2305.14314, section 2; the search over
    clips is own, by squared error.
    """
    if not bool(torch.isfinite(matrix).all()):
        raise AdapterError(
            "Cannot round an adapter: expected finite numbers, got NaN or infinity. "
            "Train again with a lower learning rate."
        )
    rows, columns = matrix.shape
    groups = count_scales(columns, group)
    padded = torch.zeros(rows, groups * group)
    padded[:, :columns] = matrix
    parts = padded.view(rows, groups, group)
    is_real = (torch.arange(groups * group) < columns).view(groups, group)
    largest = parts.abs().amax(dim=2, keepdim=True)  # (rows, groups, 1)
    best_scales = torch.zeros_like(largest)
    best_levels = torch.zeros_like(parts)
    least = torch.full_like(largest, torch.inf)
    for clip in _CLIPS[bits]:
        # Rounded first, so that levels are chosen for the scale that will be read.
        scales = (largest * (clip / _TOP[bits])).bfloat16().float()
        levels = _round(torch.where(scales > 0, parts / scales, 0.0), bits)
        # In units of the group's largest number: squares of very large ones have no float32.
        misses = torch.where(is_real & (largest > 0), (parts - levels * scales) / largest, 0.0)
        error = misses.square().sum(dim=2, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        best_scales = torch.where(better, scales, best_scales)
        best_levels = torch.where(better, levels, best_levels)
    levels = best_levels.reshape(rows, groups * group)[:, :columns]
    return Quantised(_pack(levels, bits), best_scales.squeeze(2).bfloat16())


def dequantise(quantised: Quantised, columns: int, bits: Bits, group: int) -> Tensor:
    """The numbers, (rows, columns) float32; little more than the result is allocated."""
    numbers = torch.empty((len(quantised.codes), columns), device=quantised.codes.device)
    _fill(numbers, quantised, bits, group)
    return numbers


def _fill(target: Tensor, quantised: Quantised, bits: Bits, group: int) -> None:
    """Write the numbers into a (rows, columns) tensor, some rows at a time."""
    rows, columns = target.shape
    index = torch.arange(columns, device=target.device) // group
    step = max(1, _NUMBERS_AT_ONCE // max(1, columns))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        levels = _unpack(quantised.codes[part], columns, bits)
        target[part] = levels.mul_(quantised.scales[part].float()[:, index])


def _round(values: Tensor, bits: Bits) -> Tensor:
    """The nearest levels; half a step beside whole numbers where the offset is."""
    half = _OFFSET[bits] % 1.0
    return ((values - half).round() + half).clamp(-_TOP[bits], _TOP[bits])


def _pack(levels: Tensor, bits: Bits) -> Tensor:
    """Levels (rows, columns) as bytes (rows, bytes of a row)."""
    per_byte = 8 // bits
    stored = (levels + _OFFSET[bits]).to(torch.uint8)
    stored = torch.nn.functional.pad(stored, (0, -stored.shape[1] % per_byte))
    packed = stored[:, 0::per_byte].clone()
    for place in range(1, per_byte):
        packed |= stored[:, place::per_byte] << (bits * place)
    return packed


def _unpack(packed: Tensor, columns: int, bits: Bits) -> Tensor:
    """Levels (rows, columns) float32 from bytes."""
    places = [packed >> (bits * place) for place in range(8 // bits)]
    stored = torch.stack(places, dim=2).flatten(1)[:, :columns]
    return (stored & (2**bits - 1)).float().sub_(_OFFSET[bits])


_FORMAT = "quantised"
_FIX = "Export the adapter again within these rules."
_Size = Field(ge=1, lt=2**31)


class _Module(UntrustedModel):
    """One module's entry in the config; (rows, columns) is (D_out, D_in)."""

    rows: int = _Size
    columns: int = _Size
    rank: int | None = Field(ge=1, lt=2**31)
    scale: float = Field(gt=0, lt=1e6)

    @model_validator(mode="after")
    def _check_scale(self) -> Self:
        if self.rank is None and self.scale != 1.0:
            raise ValueError(f"scale 1 of a difference expected, {self.scale:g} found")
        return self


class _Config(UntrustedModel):
    """Content of `adapter_config.json`."""

    format: str = Field(pattern=f"^{_FORMAT}$")
    bits: Bits
    group: int = Field(ge=1, le=65536)
    modules: dict[str, _Module] = Field(min_length=1)


def is_quantised(folder: Path, name: str) -> bool:
    """Whether a folder's config says that it is in this format.

    Raises:
        AdapterError: If the config cannot be read.
    """
    return load_json(folder / CONFIG_FILE, name).get("format") == _FORMAT


def write_quantised(
    folder: Path, updates: Mapping[str, LinearUpdate], meta: AdapterMeta, *, bits: Bits, group: int
) -> None:
    """Write updates with b bits a number; equal updates give equal bytes.

    Args:
        folder: Target, replaced whole or not at all.
        updates: Low-rank or dense updates by full module name.
        meta: Content of `molora_adapter.json`.
        bits: b.
        group: Numbers of a row that share a scale.

    Raises:
        AdapterError: If a number is NaN or infinite.
        StorageError: On I/O errors.
    """
    tensors: dict[str, Tensor] = {}
    modules = {}
    for name, update in updates.items():
        rows, columns = update.shape
        entry = _Module(rows=rows, columns=columns, rank=update.rank, scale=float(update.scale))
        modules[name] = entry.model_dump(mode="json")
        if update.a is not None and update.b is not None:
            parts = {"a": update.a, "b": update.b.T}
        else:
            parts = {"dense": update.product()}
        for part, matrix in parts.items():
            made = quantise(matrix.detach().cpu().float(), bits, group)
            tensors[f"{name}.{part}.codes"] = made.codes
            tensors[f"{name}.{part}.scales"] = made.scales
        if update.bias is not None:
            tensors[f"{name}.bias"] = update.bias.float()
    config = {"format": _FORMAT, "bits": bits, "group": group, "modules": modules}
    write_adapter_folder(folder, config, tensors, meta)


def _parts(entry: _Module) -> dict[str, tuple[int, int]]:
    """(rows, numbers of a row) of a module's matrices by their names in the file."""
    if entry.rank is None:
        return {"dense": (entry.rows, entry.columns)}
    return {"a": (entry.rank, entry.columns), "b": (entry.rank, entry.rows)}


def _expect_headers(config: _Config) -> dict[str, TensorHeader]:
    """What the weights file must hold, biases left out, which it may hold."""
    expected = {}
    for name, entry in config.modules.items():
        for part, (rows, numbers) in _parts(entry).items():
            row_bytes = count_row_bytes(numbers, config.bits)
            scales = count_scales(numbers, config.group)
            expected[f"{name}.{part}.codes"] = TensorHeader((rows, row_bytes), "U8")
            expected[f"{name}.{part}.scales"] = TensorHeader((rows, scales), "BF16")
    return expected


def _check_headers(
    headers: Mapping[str, TensorHeader], config: _Config, rules: AdapterRules | None, name: str
) -> None:
    """Judge names, shapes, dtypes and ranks by config and header alone.

    Every number that will be made has its code in the file, whose size is limited: the adapter
    takes at most 16 bytes of memory for each byte of the file (2 bits become 32). With a base it
    is at most what its own layers take.
    """
    expected = _expect_headers(config)
    offenders = [f"missing tensor '{key}'" for key in sorted(expected.keys() - headers.keys())]
    for key, header in headers.items():
        wanted = expected.get(key)
        module, _, part = key.rpartition(".")
        if wanted is not None:
            if header != wanted:
                offenders.append(
                    f"'{key}' of {header.dtype} {header.shape} instead of "
                    f"{wanted.dtype} {wanted.shape}"
                )
        elif part != "bias" or module not in config.modules:
            offenders.append(f"extra tensor '{key}'")
        elif header.dtype not in ADAPTER_DTYPES or header.shape != (config.modules[module].rows,):
            offenders.append(f"'{key}' of {header.dtype} {header.shape}")
    if rules is not None:
        offenders += [
            f"'{module}' of rank {entry.rank} above the charter's {rules.max_rank}"
            for module, entry in config.modules.items()
            if (entry.rank or 0) > rules.max_rank
        ]
    if isinstance(rules, BaseLimits):
        misfits = (
            rules.find_misfit(module, (entry.rows, entry.columns), entry.rank)
            for module, entry in config.modules.items()
        )
        offenders += [misfit for misfit in misfits if misfit is not None]
    if offenders:
        raise describe_unreadable(
            name,
            expected=f"the codes and scales that '{CONFIG_FILE}' describes, and nothing else",
            got="; ".join(clean(offender) for offender in offenders[:5]),
            fix=_FIX,
        )


def _load_config(folder: Path, name: str) -> _Config:
    return read_model(
        folder / CONFIG_FILE,
        _Config,
        what=f"Cannot read adapter '{name}'",
        error=AdapterError,
        fix=_FIX,
        max_bytes=MAX_JSON_BYTES,
    )


def load_quantised(folder: Path, rules: AdapterRules | None, name: str) -> Adapter:
    """Read a folder written by `write_quantised`; safe on files from outside.

    Args:
        folder: The adapter's folder.
        rules: Limits on rank and bytes, checked before anything is allocated.
        name: The adapter's name, for errors.

    Returns:
        The adapter with float32 numbers, at most 16 bytes of memory for each byte of the file.

    Raises:
        AdapterError: If a file is missing, malformed, too large or unsafe.
    """
    config = _load_config(folder, name)
    tensors = load_tensors(
        folder / WEIGHTS_FILE,
        name,
        max_bytes=None if rules is None else rules.max_bytes,
        dtypes=("U8", *ADAPTER_DTYPES),
        check=lambda headers: _check_headers(headers, config, rules, name),
    )
    updates = {module: _read(module, config, tensors) for module in sorted(config.modules)}
    return build_loaded(folder, updates, name)


def _read(module: str, config: _Config, tensors: Mapping[str, Tensor]) -> LinearUpdate:
    entry = config.modules[module]
    bias = tensors.get(f"{module}.bias")

    def read(part: str, target: Tensor) -> None:
        stored = Quantised(tensors[f"{module}.{part}.codes"], tensors[f"{module}.{part}.scales"])
        _fill(target, stored, config.bits, config.group)

    if entry.rank is None:
        dense = torch.empty(entry.rows, entry.columns)
        read("dense", dense)
        return LinearUpdate(dense=dense, bias=bias)
    a, b = torch.empty(entry.rank, entry.columns), torch.empty(entry.rows, entry.rank)
    read("a", a)
    read("b", b.T)  # directions are rows in the file
    return LinearUpdate(a=a, b=b, scale=entry.scale, bias=bias)
