"""Registered by name, so that nothing heavy loads before it is used."""

from molora_fed import Register, hookimpl


@hookimpl
def register_routers(register: Register) -> None:
    """Register what this package adds."""
    register(
        "sample-router",
        f"{__name__}.router:SampleRouter",
        summary="Follows whichever expert predicted the last token best",
        source="own definition",
    )
