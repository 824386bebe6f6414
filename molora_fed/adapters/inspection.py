"""What an adapter's folder is, or why it cannot be used: the answer of `molora adapter check`.

Headers first: without a base no tensor is read and torch is not imported.
"""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molora_fed.adapters.headers import (
    CONFIG_FILE,
    INDEX_FILE,
    META_FILE,
    WEIGHTS_FILE,
    TensorHeader,
    describe_unreadable,
    load_json,
    load_meta,
    read_headers,
)
from molora_fed.adapters.peft_folder import (
    Claims,
    LoraFolder,
    check_has_adapter,
    check_plain,
    find_weight_files,
    open_lora_folder,
    read_claims,
)
from molora_fed.adapters.peft_tensors import list_missing_targets
from molora_fed.storage.files import is_folder, resolve_inside

if TYPE_CHECKING:
    from molora_fed.adapters.updates import Adapter

__all__ = [
    "AdapterReport",
    "check_folder",
    "inspect_folder",
    "is_own_format",
    "report_on_base",
]

_MOST_RANKS = 8  # different ones that are listed


@dataclass(frozen=True)
class AdapterReport:
    """What is known of an adapter's folder.

    Attributes:
        kind: Adapter kind, e.g. "lora".
        modules: Modules that it has factors or differences of.
        changed: Modules whose change is not exactly zero; None before tensors are read.
        ranks: Number of modules by rank; empty if it is dense or quantised.
        scale: How the product is scaled, e.g. "alpha / R".
        alphas: Number of modules by alpha.
        targets: What its config says it changes.
        precision: Number of tensors by element type.
        num_bytes: Bytes of its weights.
        claims: What it says of its origin.
        base_weights: Fingerprint of the base it was trained on; "" if it does not say.
        notes: What reading it took, and what to know.
        is_normal: Whether it is in the form that this library writes.
        base: Name of the base it was held against; "" without one.
    """

    kind: str
    modules: int
    changed: int | None
    ranks: Mapping[int, int]
    scale: str
    alphas: Mapping[float, int]
    targets: str
    precision: Mapping[str, int]
    num_bytes: int
    claims: Claims
    base_weights: str = ""
    notes: tuple[str, ...] = field(default=())
    is_normal: bool = False
    base: str = ""

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            **asdict(self),
            "ranks": {str(k): v for k, v in self.ranks.items()},
            "alphas": {f"{k:g}": v for k, v in self.alphas.items()},
            "notes": list(self.notes),
        }


def inspect_folder(
    folder: Path, *, has_base: bool = False, name: str | None = None
) -> AdapterReport:
    """Read config and headers of an adapter from anywhere.

    Args:
        folder: Its folder.
        has_base: Whether whole weights in it will be compared with a base's later.
        name: Name for errors; the folder's path by default.

    Raises:
        AdapterError: If it cannot be used; in one line, with what repairs it.
    """
    name = str(folder) if name is None else name
    check_folder(folder, name)
    meta = load_meta(folder, name)
    config = load_json(folder / CONFIG_FILE, name)
    if is_own_format(folder, name):
        paths = find_weight_files(folder, name)
        headers = read_headers(paths, name, max_bytes=None)
        names = {key.rpartition(".")[0] for key in headers if not key.endswith(".scales")}
        return AdapterReport(
            kind=meta.kind,
            modules=len(config["modules"]) if _is_mapping(config.get("modules")) else len(names),
            changed=None,
            ranks={},
            scale="",
            alphas={},
            targets="",
            precision=_count_types(headers),
            num_bytes=sum(path.stat().st_size for path in paths),
            claims=Claims(),
            base_weights=meta.base_weights,
            is_normal=True,
        )
    source = open_lora_folder(folder, name)
    check_plain(source, name, has_base=has_base)
    return _describe(folder, name, source)


def check_folder(folder: Path, name: str) -> None:
    """Refuse a path that is no folder, a folder without an adapter, and links out of it.

    Raises:
        AdapterError: Saying which.
    """
    if not is_folder(folder):
        raise describe_unreadable(
            name,
            expected=f"a folder with {CONFIG_FILE}",
            got="a file" if os.path.exists(folder) else "no such folder",
            fix="Check the path.",
        )
    check_has_adapter(folder, name)
    for file in (CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE, META_FILE):
        if resolve_inside(folder / file, folder) is None:
            raise describe_unreadable(
                name,
                expected="files of its own",
                got=f"'{file}', a link that leads out of the folder, as in the Hub's cache",
                fix="Copy the folder with `cp -rL` and use the copy.",
            )


def is_own_format(folder: Path, name: str) -> bool:
    """Whether a folder holds differences or quantised numbers, which only this library writes."""
    return os.path.exists(folder / META_FILE) and "peft_type" not in load_json(
        folder / CONFIG_FILE, name
    )


def _is_mapping(value: object) -> bool:
    return isinstance(value, dict)


def _count_types(headers: Mapping[str, TensorHeader]) -> dict[str, int]:
    return dict(sorted(Counter(header.dtype for header in headers.values()).items()))


def _describe(folder: Path, name: str, source: LoraFolder) -> AdapterReport:
    meta = load_meta(folder, name)
    claims = read_claims(folder, name)
    settings, layout = source.settings, source.layout
    pairs = layout.pairs.values()
    notes = list(layout.notes)
    if len(source.paths) > 1:
        notes.append(f"{len(source.paths)} shards")
    if claims.has_quantised_base:
        notes.append(
            f"trained on '{claims.base}', a base in four bits: on the whole base its loss differs"
        )
    missing = list_missing_targets(layout, settings)
    if missing:
        notes.append(f"no factors of the target modules {', '.join(missing[:5])}")
    keys = [key for pair in pairs for key in (pair.a, pair.b)]
    return AdapterReport(
        kind=meta.kind,
        modules=len(layout.pairs),
        changed=None,
        ranks=dict(Counter(pair.rank for pair in pairs).most_common(_MOST_RANKS)),
        scale="alpha / sqrt(R)" if settings.use_rslora else "alpha / R",
        alphas=dict(Counter(float(pair.alpha) for pair in pairs).most_common(_MOST_RANKS)),
        targets=settings.shown_targets,
        precision=_count_types({key: layout.headers[key] for key in keys}),
        num_bytes=source.num_bytes,
        claims=claims,
        base_weights=meta.base_weights,
        notes=tuple(notes),
        is_normal=os.path.exists(folder / META_FILE),
    )


def report_on_base(
    folder: Path, model: Any, *, tokenizer: Any = None, base: str = "", name: str | None = None
) -> "tuple[AdapterReport, Adapter]":
    """Read an adapter whole, hold it against a base, and count what it changes.

    Args:
        folder: Its folder.
        model: The base model.
        tokenizer: The base's tokenizer, to name tokens in errors.
        base: Name of the base, for the report.
        name: Name for errors; the folder's path by default.

    Returns:
        The report and the adapter.

    Raises:
        AdapterError: If it cannot be used; in one line, with what repairs it.
    """
    from dataclasses import replace

    from molora_fed.adapters.compatibility import check_adapter_fits, count_changed
    from molora_fed.adapters.files import load_adapter
    from molora_fed.adapters.limits import BaseLimits
    from molora_fed.adapters.low_rank_files import read_lora

    name = str(folder) if name is None else name
    check_folder(folder, name)
    if is_own_format(folder, name):
        adapter = load_adapter(folder, model=model, name=name)
        report = inspect_folder(folder, name=name)
    else:
        loaded = read_lora(folder, BaseLimits.of(None, model, tokenizer), name)
        adapter = loaded.adapter
        report = _describe(folder, name, loaded.source)
        if loaded.source.layout.kept:
            left_out = ", ".join(each.key for each in loaded.source.layout.kept[:3])
            more = len(loaded.source.layout.kept) - 3
            text = left_out + (f" and {more} more" if more > 0 else "")
            notes = (*report.notes, f"left out, equal to the base's bit for bit: {text}")
            report = replace(report, notes=notes)
    check_adapter_fits(adapter, model)
    return replace(report, changed=count_changed(adapter), base=base), adapter
