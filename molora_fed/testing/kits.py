"""Conformance kits by hook, looked up when one is asked for: a kit loads what its kind needs.

`examine_<kind>(target, options=None)` of a kit gives one result a check; every kit is importable
from `molora_fed.testing`, wherever its module is.
"""

import importlib
from collections.abc import Callable, Sequence

from molora_fed.errors import PluginError
from molora_fed.testing.findings import CheckResult

__all__ = ["KITS", "Kit", "open_kit"]

Kit = Callable[..., Sequence[CheckResult]]
"""`(target, options=None) -> Sequence[CheckResult]`; options None takes the defaults."""

_HOME = "molora_fed.testing"

KITS: dict[str, str] = {
    "adapter_kinds": f"{_HOME}:examine_adapter_kind",
    "adapter_routers": f"{_HOME}:examine_adapter_router",
    "admission_checks": f"{_HOME}:examine_admission_check",
    "carried_files": f"{_HOME}:examine_carried_files",
    "commands": f"{_HOME}:examine_command",
    "domains": f"{_HOME}:examine_domain",
    "escalation_policies": f"{_HOME}:examine_policy",
    "extractors": f"{_HOME}:examine_extractor",
    "fitness_scopes": f"{_HOME}:examine_scope",
    "gain_predictors": f"{_HOME}:examine_gain_predictor",
    "judges": f"{_HOME}:examine_judge",
    "lifecycle_operators": f"{_HOME}:examine_operator",
    "merges": f"{_HOME}:examine_merge",
    "routers": f"{_HOME}:examine_router",
    "task_families": f"{_HOME}:examine_task_family",
}
"""Where the kit of a hook is, by the hook's suffix: "routers" for `register_routers`."""


def open_kit(suffix: str) -> Kit:
    """The kit of a hook.

    Args:
        suffix: Suffix of the hook, e.g. "routers".

    Raises:
        PluginError: If no kit checks this kind of plugin.
    """
    module, _, name = KITS.get(suffix, "").partition(":")
    kit = getattr(importlib.import_module(module), name, None) if module else None
    if kit is None:
        raise PluginError(
            f"Cannot check plugins of 'register_{suffix}': expected a conformance kit, got none. "
            "Test them with tests of their own."
        )
    found: Kit = kit
    return found
