"""Registered by name, so that nothing heavy loads before it is used."""

from molora_fed import Register, hookimpl


@hookimpl
def register_commands(register: Register) -> None:
    """Register what this package adds."""
    register(
        "sample-command",
        f"{__name__}.command:run",
        summary="Show the domains of a cooperative",
        source="own definition",
    )
