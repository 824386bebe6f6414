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
    "POPULATION_DOMAINS": "populations",
    "POPULATION_SHAPES": "populations",
    "RecordingLine": "traffic",
    "RouterCost": "router_costs",
    "ScriptedModel": "cascades",
    "ScriptedScorer": "cascades",
    "Table": "models",
    "TinyCooperative": "cooperatives",
    "build_candidate": "cooperatives",
    "build_carried_context": "carried_files",
    "build_case": "predictors",
    "build_contributed": "cooperatives",
    "build_evidence": "cascades",
    "build_fitness": "populations",
    "build_judge_request": "cascades",
    "build_lifecycle_state": "populations",
    "build_loss_table": "populations",
    "build_outcome": "predictors",
    "build_past": "predictors",
    "build_population": "populations",
    "build_random_adapter": "models",
    "build_synthetic_bank": "banks",
    "build_synthetic_view": "adapter_routers",
    "build_task": "cascades",
    "build_tiny_adapters": "merges",
    "build_tiny_checkpoint": "models",
    "build_tiny_contribution": "cooperatives",
    "build_tiny_cooperative": "cooperatives",
    "build_tiny_model": "models",
    "build_tiny_tokenizer": "models",
    "build_update": "populations",
    "check_adapter_kind_conformance": "adapter_kinds",
    "check_adapter_router_conformance": "adapter_routers",
    "check_admission_check_conformance": "admission_checks",
    "check_carried_files_conformance": "carried_files",
    "check_command_conformance": "commands",
    "check_domain_conformance": "domains",
    "check_extractor_conformance": "extractors",
    "check_gain_predictor_conformance": "predictors",
    "check_judge_conformance": "judges",
    "check_merge_conformance": "merges",
    "check_operator_conformance": "operators",
    "check_policy_conformance": "policies",
    "check_router_conformance": "routers",
    "check_scope_conformance": "scopes",
    "check_task_family_conformance": "task_families",
    "draw_blocks": "cooperatives",
    "examine_adapter_kind": "adapter_kinds",
    "examine_adapter_router": "adapter_routers",
    "examine_admission_check": "admission_checks",
    "examine_carried_files": "carried_files",
    "examine_command": "commands",
    "examine_domain": "domains",
    "examine_extractor": "extractors",
    "examine_gain_predictor": "predictors",
    "examine_judge": "judges",
    "examine_merge": "merges",
    "examine_operator": "operators",
    "examine_policy": "policies",
    "examine_router": "routers",
    "examine_scope": "scopes",
    "examine_task_family": "task_families",
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
