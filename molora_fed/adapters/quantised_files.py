"""The quantised format: factors or differences of 8, 4 or 2 bits, and what it takes to read them.

`adapter_config.json` holds `{"format": "quantised", "bits", "group", "modules": {name: {"rows",
"columns", "rank", "scale"}}}`; `rank` is null for a difference. The weights file holds for each
module `<name>.a.codes`, `<name>.a.scales` (A, R rows of D_in numbers) and `<name>.b.codes`,
`<name>.b.scales` (B transposed, R rows of D_out numbers, so that every direction has scales of its
own), or `<name>.dense.codes`, `<name>.dense.scales` (D_out rows of D_in), and a bias as it is in
`<name>.bias`. PEFT refuses such a folder, as it must: it knows nothing of scales.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from molora_fed.adapters.files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterMeta,
    hash_adapter_files,
    load_meta,
    write_adapter_folder,
)
from molora_fed.adapters.quantise import (
    Bits,
    Quantised,
    count_row_bytes,
    count_scales,
    dequantise,
    quantise,
)
from molora_fed.adapters.tensor_files import (
    ADAPTER_DTYPES,
    TensorHeader,
    describe_unreadable,
    load_json,
    load_tensors,
)
from molora_fed.adapters.updates import Adapter, LinearUpdate
from molora_fed.charter import AdapterRules

__all__ = ["is_quantised", "load_quantised", "write_quantised"]

_FORMAT = "quantised"
_FIX = "Export the adapter again within these rules."
_Size = Field(ge=1, lt=2**31)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class _Module(_Strict):
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


class _Config(_Strict):
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
        StorageError: If the disk refuses.
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
    takes at most 16 bytes of memory for each byte of the file (2 bits become 32).
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
    if offenders:
        raise describe_unreadable(
            name,
            expected=f"the codes and scales that '{CONFIG_FILE}' describes, and nothing else",
            got="; ".join(offenders[:5]),
            fix=_FIX,
        )


def _load_config(folder: Path, name: str) -> _Config:
    try:
        return _Config.model_validate(load_json(folder / CONFIG_FILE, name))
    except ValidationError as error:
        offenders = "; ".join(
            f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()
        )
        raise describe_unreadable(
            name,
            expected=f"format '{_FORMAT}', bits, group and modules in '{CONFIG_FILE}'",
            got=" ".join(offenders.split())[:300],
            fix=_FIX,
        ) from error


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
    meta = load_meta(folder, name)
    return Adapter(
        name=name,
        kind=meta.kind,
        frozen_depth=meta.frozen_depth,
        updates={module: _read(module, config, tensors) for module in sorted(config.modules)},
        hash=hash_adapter_files(folder),
        num_bytes=(folder / WEIGHTS_FILE).stat().st_size,
        base_weights=meta.base_weights,
    )


def _read(module: str, config: _Config, tensors: Mapping[str, Tensor]) -> LinearUpdate:
    entry = config.modules[module]
    matrices = {}
    for part, (_, numbers) in _parts(entry).items():
        stored = Quantised(tensors[f"{module}.{part}.codes"], tensors[f"{module}.{part}.scales"])
        matrices[part] = dequantise(stored, numbers, config.bits, config.group)
    bias = tensors.get(f"{module}.bias")
    if entry.rank is None:
        return LinearUpdate(dense=matrices["dense"], bias=bias)
    b = matrices["b"].T.contiguous()
    return LinearUpdate(a=matrices["a"], b=b, scale=entry.scale, bias=bias)
