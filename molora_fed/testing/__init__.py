"""What tests and plugin authors test with: tiny models and adapters, and checks of contracts.

Names are looked up on first use, so that importing this package loads neither torch nor
transformers.
"""

import importlib
from typing import Any

_HOMES = {
    "ARCHITECTURES": "models",
    "CheckResult": "findings",
    "KITS": "kits",
    "RecordingLine": "traffic",
    "RouterCost": "router_costs",
    "Table": "table",
    "TinyCooperative": "cooperatives",
    "build_candidate": "cooperatives",
    "build_carried_context": "carried_files",
    "build_case": "predictors",
    "build_contributed": "cooperatives",
    "build_outcome": "predictors",
    "build_past": "predictors",
    "build_random_adapter": "models",
    "build_synthetic_bank": "banks",
    "build_synthetic_view": "adapter_routers",
    "build_tiny_adapters": "merges",
    "build_tiny_checkpoint": "models",
    "build_tiny_contribution": "cooperatives",
    "build_tiny_cooperative": "cooperatives",
    "build_tiny_model": "models",
    "build_tiny_tokenizer": "models",
    "check_adapter_kind_conformance": "adapter_kinds",
    "check_adapter_router_conformance": "adapter_routers",
    "check_admission_check_conformance": "admission_checks",
    "check_carried_files_conformance": "carried_files",
    "check_domain_conformance": "domains",
    "check_gain_predictor_conformance": "predictors",
    "check_merge_conformance": "merges",
    "check_router_conformance": "routers",
    "draw_blocks": "cooperatives",
    "examine_adapter_kind": "adapter_kinds",
    "examine_adapter_router": "adapter_routers",
    "examine_admission_check": "admission_checks",
    "examine_carried_files": "carried_files",
    "examine_domain": "domains",
    "examine_gain_predictor": "predictors",
    "examine_merge": "merges",
    "examine_router": "routers",
    "find_text": "traffic",
    "find_tokens": "traffic",
    "found_tiny_cooperative": "cooperatives",
    "measure_router": "router_costs",
    "open_kit": "kits",
    "open_tiny_cooperative": "cooperatives",
    "permute_experts": "banks",
    "serve_faults": "endpoints",
    "take_blocks": "banks",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)
