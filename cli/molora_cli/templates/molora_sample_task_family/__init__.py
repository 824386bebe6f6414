"""Registered by name, so that nothing heavy loads before it is used."""

from molora_fed import Register, hookimpl


@hookimpl
def register_task_families(register: Register) -> None:
    """Register what this package adds."""
    register(
        "sample-task-family",
        f"{__name__}.tasks:draw",
        summary="Words to spell backwards",
        source="own definition",
    )
