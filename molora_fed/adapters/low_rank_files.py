"""PEFT's LoRA format, written and read without running PEFT's code on files from outside.

Reading accepts what `PeftModel.from_pretrained` would turn into `scale * B @ A` on linear layers,
and refuses every feature that would make it something else, instead of leaving it out silently.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from molora_fed.adapters.compatibility import list_endings, matches_target
from molora_fed.adapters.files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterMeta,
    TensorHeader,
    describe_unreadable,
    hash_adapter_files,
    load_json,
    load_meta,
    load_tensors,
    write_adapter_folder,
)
from molora_fed.adapters.updates import Adapter, LinearUpdate
from molora_fed.charter import AdapterRules
from molora_fed.storage.untrusted import clean

__all__ = ["load_low_rank", "write_low_rank"]

_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
_PATTERN_KEY = re.compile(r"\^?[A-Za-z0-9_.]+")
_READ_KEYS = frozenset(
    {
        "alpha_pattern",
        "lora_alpha",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "use_rslora",
    }
)
# These say how it was trained, or how PEFT should hold it; the update is the same either way.
# `layers_to_transform` and its like only choose modules, and the tensors say which.
_NEUTRAL_KEYS = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out",
        "inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout",
        "megatron_core", "peft_version", "qalora_group_size", "revision", "task_type",
    }
)  # fmt: skip
_NEUTRAL_INITS = (True, False, None, "gaussian", "orthogonal")
_RESTRICTING_KEYS = ("exclude_modules", "layers_pattern", "layers_to_transform")


def write_low_rank(
    folder: Path,
    updates: Mapping[str, LinearUpdate],
    meta: AdapterMeta,
    *,
    transposed: bool,
    use_rslora: bool,
) -> None:
    """Write low-rank updates so that plain `PeftModel.from_pretrained` loads them.

    Ranks and scales may differ by module; the most common of each goes to the config's head and
    the others to PEFT's patterns.

    Args:
        folder: Target, replaced whole or not at all.
        updates: Low-rank updates by full module name.
        meta: Content of `molora_adapter.json`.
        transposed: Whether the modules are Conv1D (PEFT's `fan_in_fan_out`).
        use_rslora: Whether the scale is written as alpha / sqrt(R) or as alpha / R.

    Raises:
        StorageError: On I/O errors.
    """
    ranks = {name: update.rank or 0 for name, update in updates.items()}
    alphas = {}
    for name, update in updates.items():
        divisor = math.sqrt(ranks[name]) if use_rslora else ranks[name]
        alpha = update.scale * divisor
        # Rounding restores the whole number that the scale was made from.
        alphas[name] = round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha
    rank = _most_common(ranks.values())
    alpha = _most_common(alphas.values())
    config = {
        "alpha_pattern": {n: a for n, a in alphas.items() if a != alpha},
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {n: r for n, r in ranks.items() if r != rank},
        "target_modules": sorted(updates),
        "task_type": "CAUSAL_LM",
        "use_rslora": use_rslora,
    }
    tensors = {}
    for name, update in updates.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = update.a
        tensors[f"base_model.model.{name}.lora_B.weight"] = update.b
    write_adapter_folder(folder, config, tensors, meta)


def _most_common(values: Any) -> Any:
    """The value that occurs most often, the smallest among equals."""
    counted = list(values)
    return min(set(counted), key=lambda value: (-counted.count(value), value))


def _check_config(config: dict[str, Any], name: str) -> None:
    """Refuse a config that asks for more than `scale * B @ A` on linear layers."""
    offenders = []
    if config.get("peft_type") != "LORA":
        offenders.append(f"peft_type {clean(config.get('peft_type'), 80)!r}")
    if config.get("bias", "none") != "none":
        offenders.append(f"bias {clean(config['bias'], 80)!r}")
    if config.get("init_lora_weights", True) not in _NEUTRAL_INITS:
        # PiSSA and its like change the base weights, too.
        offenders.append(f"init_lora_weights {clean(config['init_lora_weights'], 80)!r}")
    known = _READ_KEYS | _NEUTRAL_KEYS | {"bias", "init_lora_weights"}
    offenders += [
        f"{clean(key, 40)} {clean(config[key], 40)!r}"
        for key in sorted(config.keys() - known)
        if config[key]
    ]
    if offenders:
        raise describe_unreadable(
            name,
            expected="a plain LoRA config (no DoRA, no bias, no further trained modules)",
            got=", ".join(offenders[:5]),
            fix="Train it again without these.",
        )
    targets = config.get("target_modules")
    if (
        not isinstance(targets, list)
        or not targets
        or not all(isinstance(target, str) and target for target in targets)
    ):
        raise describe_unreadable(
            name,
            expected="target_modules as a list of module names",
            got=clean(targets, 80),
            fix="Save the adapter with the names written out.",
        )
    numbers = [config.get("r"), config.get("lora_alpha")]
    patterns = [config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}]
    valid = all(isinstance(pattern, dict) for pattern in patterns)
    if valid:
        numbers += [value for pattern in patterns for value in pattern.values()]
        valid = all(_PATTERN_KEY.fullmatch(key) for pattern in patterns for key in pattern)
    valid = valid and isinstance(config.get("use_rslora", False), bool)
    valid = valid and all(
        isinstance(number, int | float) and not isinstance(number, bool) and 0 < number < 1e6
        for number in numbers
    )
    if not valid:
        raise describe_unreadable(
            name,
            expected="positive ranks and alphas, patterns keyed by plain module names",
            got=f"r {clean(config.get('r'), 40)}, "
            f"lora_alpha {clean(config.get('lora_alpha'), 40)}, "
            f"patterns {clean(patterns, 120)}",
            fix="Correct adapter_config.json.",
        )


class _Pattern:
    """PEFT's `rank_pattern` or `alpha_pattern`: the first key that names a module decides.

    A key names a module by its full name or an ending of it; `^` before it, by the full name only.
    PEFT takes keys as regular expressions; here a dot is a dot, so that a module is looked up once,
    however many keys there are.

    Args:
        pattern: Values by key, in the config's order.
        default: The value of modules that no key names.
    """

    def __init__(self, pattern: Mapping[str, Any] | None, default: Any) -> None:
        self._values = list((pattern or {}).values())
        self._places = {key: place for place, key in enumerate(pattern or {})}
        self._default = default

    def find(self, module: str) -> Any:
        """The value of a module."""
        keys = (f"^{module}", *list_endings(module))
        places = [self._places[key] for key in keys if key in self._places]
        return self._values[min(places)] if places else self._default


def _check_headers(
    headers: Mapping[str, TensorHeader],
    config: dict[str, Any],
    rules: AdapterRules | None,
    name: str,
) -> None:
    """Judge names, shapes and ranks by the header alone."""
    targets = frozenset(config["target_modules"])
    ranks = _Pattern(config.get("rank_pattern"), config["r"])
    offenders: list[str] = []
    pairs: dict[str, dict[str, TensorHeader]] = {}
    for key, header in headers.items():
        match = _TENSOR.fullmatch(key)
        if match is None or not matches_target(match["module"], targets):
            offenders.append(f"extra tensor '{key}'")
        elif len(header.shape) != 2:
            offenders.append(f"'{key}' of shape {header.shape} instead of two dimensions")
        else:
            pairs.setdefault(match["module"], {})[match["part"]] = header
    named = {ending for module in pairs for ending in list_endings(module) if ending in targets}
    offenders += [
        f"no tensors for target module '{clean(target)}'" for target in sorted(targets - named)
    ]
    limit = math.inf if rules is None else rules.max_rank
    for module, pair in pairs.items():
        missing = {"A", "B"} - pair.keys()
        if missing:
            offenders.append(f"missing tensor '{module}.lora_{missing.pop()}.weight'")
            continue
        rank = ranks.find(module)
        found = (pair["A"].shape[0], pair["B"].shape[1])
        if found != (rank, rank):
            offenders.append(f"'{module}' of rank {found[0]} and {found[1]} instead of {rank}")
        elif rank > limit:
            offenders.append(f"'{module}' of rank {rank} above the charter's {limit}")
    if offenders or not pairs:
        raise describe_unreadable(
            name,
            expected=f"a pair lora_A (R, D_in), lora_B (D_out, R) for each module '{CONFIG_FILE}' "
            "names, and nothing else",
            got="; ".join(offenders[:5]) or "no tensor",
            fix="Export the adapter again within these rules.",
        )


def load_low_rank(folder: Path, rules: AdapterRules | None, name: str) -> Adapter:
    """Read a LoRA folder of PEFT's format; safe on files from outside.

    Args:
        folder: The adapter's folder.
        rules: Limits on rank and bytes, checked before anything is allocated.
        name: The adapter's name, for errors.

    Raises:
        AdapterError: If a file is missing, malformed, too large, unsafe, or asks for a feature
            that is not a low-rank change of linear layers.
    """
    config = load_json(folder / CONFIG_FILE, name)
    _check_config(config, name)
    tensors = load_tensors(
        folder / WEIGHTS_FILE,
        name,
        max_bytes=None if rules is None else rules.max_bytes,
        check=lambda headers: _check_headers(headers, config, rules, name),
    )
    updates = {}
    alphas = _Pattern(config.get("alpha_pattern"), config["lora_alpha"])
    for module in sorted({match["module"] for k in tensors if (match := _TENSOR.fullmatch(k))}):
        a = tensors[f"base_model.model.{module}.lora_A.weight"]
        b = tensors[f"base_model.model.{module}.lora_B.weight"]
        rank = a.shape[0]
        alpha = alphas.find(module)
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        updates[module] = LinearUpdate(a=a, b=b, scale=scale)
    meta = load_meta(folder, name)
    restricted = any(config.get(key) for key in _RESTRICTING_KEYS)
    return Adapter(
        name=name,
        kind=meta.kind,
        frozen_depth=meta.frozen_depth,
        updates=updates,
        hash=hash_adapter_files(folder),
        num_bytes=(folder / WEIGHTS_FILE).stat().st_size,
        base_weights=meta.base_weights,
        targets=None if restricted else tuple(config["target_modules"]),
    )
