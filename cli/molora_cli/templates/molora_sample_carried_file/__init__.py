"""Registered by name, so that nothing heavy loads before it is used."""

from molora_fed import Register, hookimpl


@hookimpl
def register_carried_files(register: Register) -> None:
    """Register what this package adds."""
    register(
        "sample-carried-file",
        f"{__name__}.compute:compute",
        summary="The mean of the base's states over the contributor's validation text",
        source="own definition",
    )
