"""Adapters: kinds, file format, compatibility, algebra on the product B@A.

What an author of an adapter kind needs is here, each name loaded when it is first used, so that
importing this package loads no torch. The kinds of the core are made of the same.
"""

from importlib import import_module
from typing import Any

_NAMES = {
    "contract": (
        "AdapterKind", "LinearOptions", "NoOptions", "check_rank", "choose_modules",
        "compute_difference", "copy_sharing",
    ),
    "files": (
        "CONFIG_FILE", "WEIGHTS_FILE", "build_loaded", "load_adapter", "load_json", "load_tensors",
        "write_adapter_folder",
    ),
    "headers": ("AdapterMeta", "TensorHeader", "describe_unreadable"),
    "limits": ("NO_BASE", "BaseWeights"),
    "save": ("load_differences", "load_factors", "write_differences", "write_factors"),
    "updates": (
        "Adapter", "LinearUpdate", "decompose", "decompose_update", "merge_products", "truncate",
    ),
}  # fmt: skip
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Load a public name on first use.

    Raises:
        AttributeError: If there is none of this name.
    """
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
