"""An adapter on disk: `adapter_config.json`, `adapter_model.safetensors`, `molora_adapter.json`.

A kind decides what is in them: PEFT's format of factors (`low_rank_files`), differences
(`delta_files`), few bits of either (`quantised_files`), or tensors of its own.
`molora_adapter.json` says what PEFT's config cannot: kind, frozen depth, base fingerprint; a plain
PEFT LoRA folder without it is read as kind "lora".
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from molora_fed.adapters.compatibility import check_adapter_fits, find_misfits, find_non_finite
from molora_fed.adapters.headers import (
    ADAPTER_DTYPES,
    CONFIG_FILE,
    MAX_JSON_BYTES,
    MAX_TENSORS,
    META_FILE,
    WEIGHTS_FILE,
    AdapterMeta,
    TensorHeader,
    check_frame,
    check_joined,
    check_total,
    describe_unreadable,
    load_json,
    load_meta,
    opened,
    read_header,
)
from molora_fed.adapters.limits import NO_BASE, BaseLimits, BaseWeights
from molora_fed.adapters.updates import Adapter, LinearUpdate
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
from molora_fed.types import ADAPTER_FILES

__all__ = [
    "ADAPTER_DTYPES",
    "CONFIG_FILE",
    "MAX_JSON_BYTES",
    "MAX_TENSORS",
    "META_FILE",
    "WEIGHTS_FILE",
    "AdapterMeta",
    "TensorHeader",
    "build_loaded",
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


def load_tensors(
    path: Path | Sequence[Path],
    name: str,
    *,
    max_bytes: int | None,
    check: Callable[[Mapping[str, TensorHeader]], Collection[str] | None],
    dtypes: tuple[str, ...] = ADAPTER_DTYPES,
) -> dict[str, Tensor]:
    """Read a safetensors file whose sender is not trusted.

    Args:
        path: The file, or the shards that are one.
        name: The adapter's name, for errors.
        max_bytes: Refused above this size, before anything is allocated; None for no limit.
        check: Judges names, shapes and dtypes by the header, before anything is allocated; raises
            AdapterError. Gives back which tensors are read, None for all.
        dtypes: Element types that what is read may have, as safetensors names them.

    Returns:
        The tensors by name, sorted, on the CPU, in the file's dtype.

    Raises:
        AdapterError: If the file is missing, too large, not safetensors, truncated, of a dtype
            that is not allowed, or refused by `check`.
    """
    paths = [path] if isinstance(path, Path) else list(path)
    headers: dict[str, TensorHeader] = {}
    places: dict[str, Any] = {}
    with ExitStack() as stack:
        for each in paths:
            check_frame(each, name, max_bytes)
            file = stack.enter_context(opened(each, name, framework="pt"))
            found = read_header(file, each, name)
            check_joined(headers, found, each, name)
            headers |= found
            places |= dict.fromkeys(found, file)
        check_total(paths, name, max_bytes)
        chosen = check(headers)
        wanted = sorted(headers if chosen is None else chosen)
        wrong = [f"'{k}' {headers[k].dtype}" for k in wanted if headers[k].dtype not in dtypes]
        if wrong:
            raise describe_unreadable(
                name,
                expected=f"tensors of {', '.join(dtypes)}",
                got=", ".join(wrong[:5]),
                fix="Convert them before saving: integers are of a quantised copy.",
            )
        # Copies: what safetensors returns is the mapped file, which may be cut short later.
        return {key: places[key].get_tensor(key).clone() for key in wanted}


def hash_adapter_files(folder: Path, weights: Sequence[Path] = ()) -> str:
    """SHA-256 over names and hashes of an adapter's files; other files beside them do not count.

    Args:
        folder: The adapter's folder.
        weights: Its weights files, where these are shards of another name.
    """
    names = sorted({*ADAPTER_FILES, *(path.name for path in weights)})
    hashes = {n: hash_file(folder / n) for n in names if is_file(folder / n)}
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


def build_loaded(folder: Path, updates: Mapping[str, LinearUpdate], name: str) -> Adapter:
    """The adapter of a folder of one weights file, once its numbers are read.

    Args:
        folder: Its folder.
        updates: What was read, by full module name.
        name: The adapter's name, for errors.

    Raises:
        AdapterError: If `molora_adapter.json` is malformed.
    """
    meta = load_meta(folder, name)
    return Adapter(
        name=name,
        kind=meta.kind,
        frozen_depth=meta.frozen_depth,
        updates=updates,
        hash=hash_adapter_files(folder),
        num_bytes=(folder / WEIGHTS_FILE).stat().st_size,
        base_weights=meta.base_weights,
    )


def load_adapter(
    folder: Path,
    *,
    rules: AdapterRules | None = None,
    model: Any | None = None,
    tokenizer: Any | None = None,
    plugins: Plugins | None = None,
    name: str | None = None,
) -> Adapter:
    """Read an adapter whose sender is not trusted; its numbers are not judged here.

    Args:
        folder: Folder with the adapter's files.
        rules: Limits of the charter on kind, rank and bytes, checked before anything is allocated.
        model: The base model, with no adapter applied; it bounds what is expanded (`BaseLimits`),
            decides how names of tensors are read that something was put around, and gives kinds
            the weights that they need (`BaseWeights`).
        tokenizer: The base's tokenizer, to name tokens in errors.
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
    limits = rules if model is None else BaseLimits.of(rules, model, tokenizer)
    weights = NO_BASE if model is None else BaseWeights(model)
    with guarded(entry, "loading", passing=(AdapterError,)):
        adapter = kinds.resolve(meta.kind)().load(folder, limits, name=name, base=weights)
    if not isinstance(adapter, Adapter):
        raise refuse(entry, "loading", expected="an Adapter", got=type(adapter).__name__)
    return adapter
