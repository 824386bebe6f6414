"""Registered by name, so that nothing heavy loads before it is used."""

from molora_fed import Register, hookimpl


@hookimpl
def register_carried_files(register: Register) -> None:
    """Register what this package adds."""
    register(
        "sample-carried-file",
        f"{__name__}.carried:compute",
        summary="The specialist's mean last state on its own text",
        source="own definition",
    )
