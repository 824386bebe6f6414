"""What a registered target must look like; checked when it is first resolved.

The checks are structural (they ask for attributes, not for base classes) so that this module
imports neither torch nor the rooms.
"""

import inspect
from typing import Any

__all__ = [
    "check_adapter_kind",
    "check_adapter_router",
    "check_callable",
    "check_operator",
    "check_policy",
    "check_router",
]

_ROUTER_METHODS = (
    "reads", "fit", "scores", "gates", "init_state", "step", "reorder", "state_tensors",
    "from_state",
)  # fmt: skip
_KIND_METHODS = ("prepare", "export", "load")


def check_callable(target: Any) -> str | None:
    """Say what is wrong with a target that must be callable, or None."""
    return None if callable(target) else f"expected a callable, got {type(target).__name__}"


def check_router(target: Any) -> str | None:
    """Say what is wrong with a router class, or None."""
    if not inspect.isclass(target):
        return f"expected a class, got {type(target).__name__}"
    missing = [name for name in _ROUTER_METHODS if not callable(getattr(target, name, None))]
    if missing:
        return f"expected the router methods {', '.join(missing)}, got none of these"
    options = getattr(target, "Options", None)
    if not inspect.isclass(options) or not hasattr(options, "model_validate"):
        return "expected a pydantic model as attribute 'Options'"
    if getattr(options, "model_config", {}).get("extra") != "forbid":
        return "expected 'Options' to refuse unknown keys (extra='forbid')"
    return None


def check_adapter_kind(target: Any) -> str | None:
    """Say what is wrong with an adapter kind class, or None."""
    if not inspect.isclass(target):
        return f"expected a class, got {type(target).__name__}"
    missing = [name for name in _KIND_METHODS if not callable(getattr(target, name, None))]
    return f"expected the methods {', '.join(missing)}, got none of these" if missing else None


def check_adapter_router(target: Any) -> str | None:
    """Say what is wrong with an adapter router class, or None."""
    return _check_class(target, ("build", "reads", "forward", "set_progress", "reset_slot"))


def check_operator(target: Any) -> str | None:
    """Say what is wrong with a lifecycle operator class, or None."""
    return _check_class(target, ("apply",))


def check_policy(target: Any) -> str | None:
    """Say what is wrong with an escalation policy class, or None."""
    return _check_class(target, ("choose",))


def _check_class(target: Any, methods: tuple[str, ...]) -> str | None:
    if not inspect.isclass(target):
        return f"expected a class, got {type(target).__name__}"
    missing = [name for name in methods if not callable(getattr(target, name, None))]
    if missing:
        return f"expected the methods {', '.join(missing)}, got none of these"
    options = getattr(target, "Options", None)
    if not inspect.isclass(options) or not hasattr(options, "model_validate"):
        return "expected a pydantic model as attribute 'Options'"
    return None
